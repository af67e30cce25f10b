"""The preset gpt-j-table on a small llama, its table's columns on a gpt2 and a gpt_neo, over documents made here.

The harness' own hf model scores the same directories on the same tasks.
"""

from __future__ import annotations

import functools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluate_cases import benchmark, compiled_quickly

import mesh_transformer as mt
from mesh_transformer import compat
from mesh_transformer.cli.main import main
from mesh_transformer.data.tokenizer import train_bpe
from mesh_transformer.evaluate import running
from mesh_transformer.evaluate.tasks import PRESETS, TABLE, load_tasks
from mesh_transformer.evaluate.zero_shot import COLUMNS
from mesh_transformer.model.params import abstract_params
from small_families import small

# Deprecations inside torch, transformers and the harness are theirs to mend.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

N = 17  # documents of each task; fifteen others stand before a question of one
# Of perplexities in the millions, over rotary angles that transformers rounds before it multiplies them by positions.
CLOSE = 1e-4
FAMILIES = ("gpt2", "gpt_neo", "llama")
# Where the harness has each task.
_FILES = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "mathqa": "mathqa/mathqa.yaml",
    "pubmedqa": "pubmedqa/pubmedqa.yaml",
    "lambada_openai_cloze_yaml": "lambada_cloze/lambada_openai_cloze.yaml",
}


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with compiled_quickly():
        yield


def document(task: str, chosen: random.Random, i: int) -> dict[str, Any]:
    """With the fields of the task's data set."""
    passage, *others = benchmark().sentences(chosen, 5)
    if task.startswith("lambada"):
        return {"text": f"{passage} {others[0].removesuffix('.')}"}
    if task == "piqa":
        return {"goal": passage, "sol1": others[0], "sol2": others[1], "label": i % 2}
    if task == "hellaswag":
        parts = {"activity_label": "Waiting", "ctx_a": passage, "ctx_b": "the geese", "label": str(i % 4)}
        return parts | {"endings": [f"[title] {each}" for each in others]}
    if task == "winogrande":
        sentence = f"{passage} Then _ {' '.join(others[0].split(' ')[2:])}"
        return {"sentence": sentence, "option1": "the sea", "option2": "a river", "answer": str(1 + i % 2)}
    if task == "mathqa":
        options = " , ".join(f"{letter} ) {chosen.randrange(90)}" for letter in "abcde")
        return {"Problem": f"{passage} How many geese?", "options": options, "correct": "abcde"[i % 5]}
    return {"QUESTION": "Did the geese wait?", "CONTEXTS": [passage, others[0]], "final_decision": ("yes", "no")[i % 2]}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seven tasks as the harness has them, but for where their documents are."""
    import lm_eval

    place, own = tmp_path_factory.mktemp("tasks"), Path(lm_eval.__file__).parent / "tasks"
    assert _FILES.keys() == PRESETS[TABLE].keys()
    for task, file in _FILES.items():
        chosen = random.Random(task)
        documents = place / f"{task}.jsonl"
        documents.write_text("".join(json.dumps(document(task, chosen, i)) + "\n" for i in range(N)))
        where = {"data_files": dict.fromkeys(("train", "validation", "test"), str(documents))}
        head = {"include": str(own / file), "task": task, "dataset_path": "json", "dataset_name": None}
        (place / f"{task}.yaml").write_text(
            json.dumps(head | {"dataset_kwargs": where | {"cache_dir": str(place / "cache")}})
        )
    return place


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers writes it, with weights large enough for answers to differ."""
    tokenizer = train_bpe(benchmark().sentences(random.Random(0), 400), 400)
    cfg = small(request.param, d_model=64, d_ff=96, n_vocab=tokenizer.n_vocab, n_ctx=512)
    normal = np.random.default_rng(2021)

    def one(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray((keys[-1].key == "scale") + 0.25 * normal.normal(size=leaf.shape), jnp.float32)

    params: dict[str, Any] = dict(jax.tree_util.tree_map_with_path(one, abstract_params(cfg)))
    place = tmp_path_factory.mktemp("model") / request.param
    mt.Model(cfg, params, tokenizer).save(place, format="huggingface")
    assert json.loads((place / "config.json").read_text())["model_type"] == request.param
    return place


def scored_by_hf(model: Path, tasks: Path) -> dict[str, dict[str, Any]]:
    """The results of the harness' own model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found = load_tasks([TABLE], include_path=str(tasks))
    theirs = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=16)
    results = simple_evaluate(theirs, tasks=list(found.loaded), task_manager=found.manager, bootstrap_iters=0)
    assert results is not None
    return dict(results["results"])


def test_the_row_is_made_of_what_hf_scores(
    model: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compat, "prepare_process", lambda: None)
    monkeypatch.setattr(compat, "use_compile_cache", lambda: None)
    few = functools.partial(running.RunOptions, bootstrap_iters=running.FEW_BOOTSTRAPS)  # draws take long
    monkeypatch.setattr(running, "RunOptions", few)
    output = tmp_path / "row.json"
    if model.name != "llama":  # the columns of the table alone, which are two thirds of the time less
        asked = {task: PRESETS[TABLE][task] for task in dict.fromkeys(column.task for column in COLUMNS)}
        monkeypatch.setitem(PRESETS, TABLE, asked)
    options = ["--tasks", TABLE, "--include-path", str(tasks), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["mesh-transformer", "evaluate", str(model), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert not ended.value.code, shown.err
    results = json.loads(output.read_text())
    expected = scored_by_hf(model, tasks)
    assert results["results"].keys() == expected.keys() == PRESETS[TABLE].keys()
    for task, metrics in expected.items():
        numbers = {name: value for name, value in metrics.items() if "," in name and "stderr" not in name}
        assert numbers, task
        for name, value in numbers.items():
            assert results["results"][task][name] == pytest.approx(value, rel=CLOSE), (task, name)
    assert results["n-shot"] == PRESETS[TABLE]

    row = results[TABLE]
    for column in COLUMNS:
        cell = row["columns"][column.title]
        assert cell["value"] == pytest.approx(expected[column.task][f"{column.metric},none"], rel=CLOSE)
        assert cell["questions"] == cell["of"] == N
    assert row["whole"] and row["published"] is None and row["model"] == model.name
    assert row["others"]["piqa acc_norm"] == pytest.approx(expected["piqa"]["acc_norm,none"], rel=CLOSE)
    assert (tmp_path / "row_table.md").read_text() == row["markdown"]
    assert row["markdown"] in shown.out and f"| {model.name} | " in shown.out
    # Neither all right nor all wrong: the figures could be told from others.
    assert any(0.1 < row["columns"][column.title]["value"] < 0.9 for column in COLUMNS if column.is_share)
