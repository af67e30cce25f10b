"""The zero-shot table that GPT-J was published with: its rows as they stand there, and a row of the same columns.

Source of the published rows: the README of Mesh Transformer JAX, "Zero-Shot Evaluations",
https://github.com/kingoflolz/mesh-transformer-jax/blob/master/README.md
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.evaluate.running import plain_metrics

# What the published table has where there is no figure.
ABSENT = "-----"


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of scores: its title there, and which metric of which task of the harness it is."""

    title: str
    task: str
    metric: str

    @property
    def is_share(self) -> bool:
        """Whether it is written as a percentage."""
        return self.metric.startswith("acc")

    def cell(self, value: float | None) -> str:
        """A score as the published table writes it: 3.99, 69.7%."""
        if value is None:
            return ABSENT
        return f"{100 * value:.1f}%" if self.is_share else f"{value:.2f}"


# HellaSwag is the length-normalised accuracy: the README of GPT-Neo has the plain one of three models of the table
# (GPT-2-1.5B 40.03%, GPTNeo-1.3B 38.66%, GPTNeo-2.7B 42.73%), and the table has other, higher figures. PIQA is the
# plain one of two of these (70.78%, 71.11%) and not of the third (72.14%), so which form it is remains open.
COLUMNS = (
    Column("LAMBADA PPL ↓", "lambada_openai", "perplexity"),
    Column("LAMBADA Acc ↑", "lambada_openai", "acc"),
    Column("Winogrande ↑", "winogrande", "acc"),
    Column("Hellaswag ↑", "hellaswag", "acc_norm"),
    Column("PIQA ↑", "piqa", "acc"),
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A row as published, each cell as it stands there.

    `cells` are those of `COLUMNS`. Where it is a model that opens here, `preset` names its architecture and `hub` its
    weights on the Hugging Face Hub.
    """

    model: str
    weights: bool
    flops: str
    cells: tuple[str, str, str, str, str]
    gigabytes: str
    preset: str | None = None
    hub: str | None = None


PUBLISHED = (
    Published("Chance", True, "0", ("~a lot", "~0%", "50%", "25%", "25%"), "0"),
    Published("GPT-3-Ada‡", False, ABSENT, ("9.95", "51.6%", "52.9%", "43.4%", "70.5%"), ABSENT),
    Published(
        "GPT-2-1.5B",
        True,
        ABSENT,
        ("10.63", "51.21%", "59.4%", "50.9%", "70.8%"),
        "40",
        "gpt2-xl",
        "openai-community/gpt2-xl",
    ),
    Published(
        "GPTNeo-1.3B‡",
        True,
        "3.0e21",
        ("7.50", "57.2%", "55.0%", "48.9%", "71.1%"),
        "825",
        "gpt-neo-1.3b",
        "EleutherAI/gpt-neo-1.3B",
    ),
    Published("Megatron-2.5B*", False, "2.4e21", (ABSENT, "61.7%", ABSENT, ABSENT, ABSENT), "174"),
    Published(
        "GPTNeo-2.7B‡",
        True,
        "6.8e21",
        ("5.63", "62.2%", "56.5%", "55.8%", "73.0%"),
        "825",
        "gpt-neo-2.7b",
        "EleutherAI/gpt-neo-2.7B",
    ),
    Published("GPT-3-1.3B*‡", False, "2.4e21", ("5.44", "63.6%", "58.7%", "54.7%", "75.1%"), "~800"),
    Published("GPT-3-Babbage‡", False, ABSENT, ("5.58", "62.4%", "59.0%", "54.5%", "75.5%"), ABSENT),
    Published("Megatron-8.3B*", False, "7.8e21", (ABSENT, "66.5%", ABSENT, ABSENT, ABSENT), "174"),
    Published("GPT-3-2.7B*‡", False, "4.8e21", ("4.60", "67.1%", "62.3%", "62.8%", "75.6%"), "~800"),
    Published("Megatron-11B†", True, "1.0e22", (ABSENT,) * 5, "161"),
    Published(
        "GPT-J-6B‡",
        True,
        "1.5e22",
        ("3.99", "69.7%", "65.3%", "66.1%", "76.5%"),
        "825",
        "gpt-j-6b",
        "EleutherAI/gpt-j-6b",
    ),
    Published("GPT-3-6.7B*‡", False, "1.2e22", ("4.00", "70.3%", "64.5%", "67.4%", "78.0%"), "~800"),
    Published("GPT-3-Curie‡", False, ABSENT, ("4.00", "69.3%", "65.6%", "68.5%", "77.9%"), ABSENT),
    Published("GPT-3-13B*‡", False, "2.3e22", ("3.56", "72.5%", "67.9%", "70.9%", "78.5%"), "~800"),
    Published("GPT-3-175B*‡", False, "3.1e23", ("3.00", "76.2%", "70.2%", "78.9%", "81.0%"), "~800"),
    Published("GPT-3-Davinci‡", False, ABSENT, ("3.0", "75%", "72%", "78%", "80%"), ABSENT),
)


def published_row(cfg: ModelConfig) -> Published | None:
    """The published row of the model that has this architecture; a fine-tuned model has that of its base."""
    return next((row for row in PUBLISHED if row.preset and PRESETS[row.preset] == cfg), None)


def row_of(
    results: Mapping[str, Any], cfg: ModelConfig, model: str, *, legacy_prompts: bool = False
) -> dict[str, Any] | None:
    """A model's row, JSON-serialisable; None where no task of the table has a metric.

    Args:
        results: of `running.run_tasks`.
        model: what the row is called.
        legacy_prompts: how the prompts were made, which is noted.

    `columns`: title -> task, metric, value (a share for accuracies), standard error, number of questions and the cell's
    text. `others`: metrics of these tasks that the table does not have, such as the other accuracy. `published`: the
    published row of this architecture, or None. `whole`: whether every column is there and of every question.
    `markdown`: the table of both rows.
    """
    metrics = plain_metrics(results)
    columns: dict[str, Any] = {}
    for column in COLUMNS:
        found = metrics.get(column.task, {})
        value, asked = found.get(column.metric), results.get("n-samples", {}).get(column.task, {})
        columns[column.title] = {
            "task": column.task,
            "metric": column.metric,
            "value": value,
            "stderr": found.get(f"{column.metric}_stderr"),
            "questions": asked.get("effective"),
            "of": asked.get("original"),
            "cell": column.cell(value),
        }
    if all(cell["value"] is None for cell in columns.values()):
        return None
    used = {(column.task, column.metric) for column in COLUMNS}
    row = published_row(cfg)
    report: dict[str, Any] = {
        "model": model,
        "columns": columns,
        "others": {
            f"{task} {name}": value
            for task in dict.fromkeys(column.task for column in COLUMNS)
            for name, value in metrics.get(task, {}).items()
            if (task, name) not in used and "stderr" not in name
        },
        "prompts": "legacy" if legacy_prompts else "harness",
        "published": row and {"model": row.model, **dict(zip(columns, row.cells, strict=True))},
        "whole": all(cell["value"] is not None and cell["questions"] == cell["of"] for cell in columns.values()),
    }
    return report | {"markdown": markdown(report)}


def markdown(row: Mapping[str, Any]) -> str:
    """The table of a row of `row_of`, below the published one if there is one, and a line where it is not the whole."""
    titles = list(row["columns"])
    lines = [("Model", *titles), ("---",) * (1 + len(titles))]
    published = row["published"]
    if published:
        lines.append((f"{published['model']}, as published", *(published[title] for title in titles)))
    lines.append((row["model"], *(row["columns"][title]["cell"] for title in titles)))
    text = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
    if not row["whole"]:
        asked = {
            f"{cell['task']} {cell['questions']} of {cell['of']}"
            for cell in row["columns"].values()
            if cell["value"] is not None
        }
        text += f"\nNot the whole table: questions asked were {', '.join(sorted(asked))}.\n"
    return text
