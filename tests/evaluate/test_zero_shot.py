"""The published zero-shot table, and a row of its columns out of the harness' results."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from mesh_transformer.config.presets import PRESETS, preset
from mesh_transformer.evaluate import tasks
from mesh_transformer.evaluate.zero_shot import ABSENT, COLUMNS, PUBLISHED, published_row, row_of

# As the harness names them; what has no formula has a standard error that is a text.
RESULTS: dict[str, Any] = {
    "results": {
        "lambada_openai": {
            "alias": "lambada_openai", "perplexity,none": 7.4982, "perplexity_stderr,none": "N/A", "acc,none": 0.57229,
            "acc_stderr,none": 0.0069,
        },
        "winogrande": {"acc,none": 0.55012, "acc_stderr,none": 0.014},
        "hellaswag": {"acc,none": 0.3866, "acc_norm,none": 0.4893},
        "piqa": {"acc,none": 0.7111, "acc_norm,none": 0.7122},
        "mathqa": {"acc,none": 0.24},
    },
    "n-samples": {
        name: {"original": 40, "effective": 40}
        for name in ("lambada_openai", "winogrande", "hellaswag", "piqa", "mathqa")
    },
}  # fmt: skip


def test_the_columns_are_of_tasks_that_the_preset_runs_without_examples() -> None:
    ran = tasks.PRESETS[tasks.TABLE]
    assert {column.task for column in COLUMNS} <= ran.keys()
    assert all(ran[column.task] == 0 for column in COLUMNS)


def test_the_published_rows() -> None:
    rows = {row.model: row for row in PUBLISHED}
    assert len(rows) == len(PUBLISHED) == 17
    assert rows["GPT-J-6B‡"].cells == ("3.99", "69.7%", "65.3%", "66.1%", "76.5%")
    assert all(len(row.cells) == len(COLUMNS) for row in PUBLISHED)
    assert [row.preset for row in PUBLISHED if row.preset] == ["gpt2-xl", "gpt-neo-1.3b", "gpt-neo-2.7b", "gpt-j-6b"]


def test_an_architecture_has_the_row_of_its_model() -> None:
    found = {name: row.model for name, cfg in PRESETS.items() if (row := published_row(cfg))}
    assert found == {
        "gpt2-xl": "GPT-2-1.5B",
        "gpt-neo-1.3b": "GPTNeo-1.3B‡",
        "gpt-neo-2.7b": "GPTNeo-2.7B‡",
        "gpt-j-6b": "GPT-J-6B‡",
    }
    assert published_row(dataclasses.replace(preset("gpt-neo-1.3b"), window=128)) is None


def test_a_row_in_the_published_shape() -> None:
    row = row_of(RESULTS, preset("gpt-neo-1.3b"), "gpt-neo|mine")
    assert row is not None and row["whole"] and row["prompts"] == "harness"
    assert row["markdown"] == (
        "| Model | LAMBADA PPL ↓ | LAMBADA Acc ↑ | Winogrande ↑ | Hellaswag ↑ | PIQA ↑ |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| GPTNeo-1.3B‡, as published | 7.50 | 57.2% | 55.0% | 48.9% | 71.1% |\n"
        "| gpt-neo\\|mine | 7.50 | 57.2% | 55.0% | 48.9% | 71.1% |\n"
    )
    assert row["others"] == {"hellaswag acc": 0.3866, "piqa acc_norm": 0.7122}
    assert row["columns"]["LAMBADA Acc ↑"] == {
        "task": "lambada_openai", "metric": "acc", "value": 0.57229, "stderr": 0.0069, "questions": 40, "of": 40,
        "cell": "57.2%",
    }  # fmt: skip
    assert row["columns"]["LAMBADA PPL ↓"]["stderr"] is None
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("what", ["a task", "some questions"])
def test_a_part_of_the_table_is_called_so(what: str) -> None:
    results = json.loads(json.dumps(RESULTS))
    if what == "a task":
        del results["results"]["piqa"], results["n-samples"]["piqa"]
    else:
        results["n-samples"]["piqa"]["effective"] = 10
    row = row_of(results, preset("gpt-j-tiny"), "tiny", legacy_prompts=True)
    assert row is not None and not row["whole"] and row["published"] is None and row["prompts"] == "legacy"
    assert "as published" not in row["markdown"] and "Not the whole table: questions asked were " in row["markdown"]
    assert (f"| {ABSENT} |\n" in row["markdown"]) is (what == "a task")
    assert ("piqa 10 of 40" in row["markdown"]) is (what == "some questions")


def test_answers_without_metrics_have_no_row() -> None:
    assert row_of({"results": {"piqa": {"alias": "piqa"}}, "n-samples": {}}, preset("gpt-j-tiny"), "tiny") is None
