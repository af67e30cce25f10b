"""lm-evaluation-harness on one exported model, through its own `hf` model and through this project's: metrics and time.

    python benchmarks/evaluate_against_hf.py [--items N] [--layers L] [--width D] [--batch-size B] [--output FILE]

Four tasks are made for it: multiple choice, the last word of a passage, rolling perplexity, text written up to a stop
string. The weights are random and the tokenizer is trained on the tasks' own sentences. Each side runs by itself in a
process that has loaded the model beforehand; a task's time is from its first request to its metrics, what is compiled
counted ("again": a second time, when all has been compiled). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 256
TASKS = ("choosing", "last_word", "reading", "writing")
_WHO = ("The geese", "A river", "Two servers", "Many readers", "An old model", "The committee", "Seven proofs")
_DOES = ("waited for", "read about", "wrote to", "counted", "remembered", "followed", "forgot", "drew")
_WHAT = ("the café", "every token", "a field of clover", "the year 2021", "its own tail", "an even number", "the sea")
_HOW = ("slowly", "at noon", "without a word", "for the third time", "and laughed", "in spite of the rain", "by heart")
_FORMS = {
    "choosing": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "reading": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": [".", " at"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def sentences(chosen: random.Random, n: int) -> list[str]:
    """`n` sentences of one pattern."""
    return [" ".join(chosen.choice(words) for words in (_WHO, _DOES, _WHAT, _HOW)) + "." for _ in range(n)]


def make_tasks(place: Path, n: int) -> None:
    """The four tasks: a .yaml and a file of `n` documents each."""
    chosen = random.Random(7)
    documents: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for i in range(n):
        passage = " ".join(sentences(chosen, 2 + i % 5))
        *start, last = sentences(chosen, 1)[0].split(" ")
        question = f"{passage} {' '.join(start)}"
        choices = [last, *(" ".join(each.split(" ")[-(1 + k) :]) for k, each in enumerate(sentences(chosen, 3)))]
        # As in winogrande, a space may end the question.
        documents["choosing"].append({"question": question + " " * (i % 2), "choices": choices, "label": i % 4})
        documents["last_word"].append({"text": f"{question} {last}"})
        # The longest go beyond the context several times.
        documents["reading"].append({"text": " ".join(sentences(chosen, 1 + (i * i) % 60))})
        documents["writing"].append({"question": question, "answer": f" {last[:-1]}"})
    for name, form in _FORMS.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents[name]))
        where = {"data_files": {"test": str(place / f"{name}.jsonl")}, "cache_dir": str(place / "cache")}
        head = {"task": name, "dataset_path": "json", "dataset_kwargs": where, "test_split": "test"}
        (place / f"{name}.yaml").write_text(json.dumps(head | form))  # every JSON is YAML


def make_model(place: Path, *, layers: int, width: int, scale: float = 0.1) -> Path:
    """A model of random weights as a Hugging Face directory, with a tokenizer of its own."""
    import jax
    import jax.numpy as jnp

    import mesh_transformer as mt
    from mesh_transformer.config.model import ModelConfig
    from mesh_transformer.data.tokenizer import train_bpe
    from mesh_transformer.model.params import abstract_params

    tokenizer = train_bpe(sentences(random.Random(0), 400), 512)
    cfg = ModelConfig(
        n_layers=layers, d_model=width, n_heads=width // 32, n_vocab=tokenizer.n_vocab, n_ctx=CONTEXT, d_rotary=16
    )
    normal = np.random.default_rng(2021)

    def one(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray((keys[-1].key == "scale") + scale * normal.normal(size=leaf.shape), jnp.float32)

    params: dict[str, Any] = dict(jax.tree_util.tree_map_with_path(one, abstract_params(cfg)))
    mt.Model(cfg, params, tokenizer).save(place, format="huggingface")
    return place


def open_side(side: str, model: Path, batch_size: int) -> Any:
    """The harness' model class with the model in it."""
    if side == "hf":
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=batch_size)
    from mesh_transformer.api import load
    from mesh_transformer.evaluate.harness import HarnessModel

    return HarnessModel.of(load(model))


def run_task(opened: Any, tasks: Path, name: str) -> tuple[dict[str, Any], float]:
    """The harness' results of one task, answers included, and seconds."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    found = TaskManager(include_path=str(tasks), include_defaults=False).load([name])
    for task in found["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    begun = time.perf_counter()
    results = evaluate(lm=opened, task_dict=found, bootstrap_iters=0, log_samples=True)
    assert results is not None
    return dict(results), time.perf_counter() - begun


def metrics_of(results: dict[str, Any], name: str) -> dict[str, float]:
    """The task's numbers by name."""
    found = results["results"][name]
    return {key: float(value) for key, value in found.items() if "," in key and isinstance(value, int | float)}


def measure(side: str, model: Path, tasks: Path, batch_size: int) -> dict[str, Any]:
    """What one process prints."""
    opened = open_side(side, model, batch_size)
    report: dict[str, Any] = {}
    for name in TASKS:
        results, seconds = run_task(opened, tasks, name)
        report[name] = {"seconds": seconds, "metrics": metrics_of(results, name)}
    for name in TASKS:
        report[name]["again"] = run_task(opened, tasks, name)[1]
    if side == "ours":
        report["counts"] = vars(opened.scorer.counts)
    return report


def in_a_process(side: str, model: Path, tasks: Path, batch_size: int) -> dict[str, Any]:
    """`measure` in a process that does nothing else."""
    line = [sys.executable, __file__, "--side", side, "--model", str(model), "--tasks", str(tasks)]
    done = subprocess.run([*line, "--batch-size", str(batch_size)], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(model: Path, tasks: Path, items: int, batch_size: int) -> dict[str, Any]:
    """Both sides one after the other."""
    sides = {side: in_a_process(side, model, tasks, batch_size) for side in ("ours", "hf")}
    report: dict[str, Any] = {"items": items, "hf_batch_size": batch_size, "counts": sides["ours"].pop("counts")}
    for name in TASKS:
        ours, theirs = sides["ours"][name], sides["hf"][name]
        pairs = [(value, theirs["metrics"][key]) for key, value in ours["metrics"].items()]
        report[name] = {
            "metrics": ours["metrics"],
            "largest_relative_difference": max(abs(a - b) / max(abs(b), 1e-12) if a != b else 0.0 for a, b in pairs),
            "seconds": {"ours": ours["seconds"], "hf": theirs["seconds"]},
            "seconds_again": {"ours": ours["again"], "hf": theirs["again"]},
            "hf_over_ours": theirs["seconds"] / ours["seconds"],
            "hf_over_ours_again": theirs["again"] / ours["again"],
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="See the head of the file.")
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16, help="of the harness' hf model")
    parser.add_argument("--output", type=Path)
    for name in ("--side", "--model", "--tasks"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(given.side, Path(given.model), Path(given.tasks), given.batch_size)))
        return
    with tempfile.TemporaryDirectory() as place:
        tasks = Path(place) / "tasks"
        tasks.mkdir()
        make_tasks(tasks, given.items)
        model = make_model(Path(place) / "model", layers=given.layers, width=given.width)
        text = json.dumps(compare(model, tasks, given.items, given.batch_size), indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
