"""Runs measured in epochs, tasks that are evaluated on the way, and documents that are kept apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from run_cases import MODEL, Listener, T, Toy, state_of

from mesh_transformer.config.errors import DataError, RunError
from mesh_transformer.config.load import load_run_config
from mesh_transformer.config.run import RunConfig, TrainConfig
from mesh_transformer.config.tuning import EvaluateConfig
from mesh_transformer.train.data import count_steps
from mesh_transformer.train.metrics import curves_of, read_metrics
from mesh_transformer.train.run import train

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_epochs_are_counted_in_the_data(tmp_path: Path, toy: Toy) -> None:
    """40 sequences in batches of 4: three tenths of an epoch are three steps."""
    run = toy.run(tmp_path / "run", validate_every=0)
    asked = TrainConfig(epochs=0.3, batch_size=4, learning_rate=1e-2, warmup_fraction=0.5)
    run = dataclasses.replace(run, train=asked)
    assert (count_steps(run).train.steps, count_steps(run).train.warmup_steps) == (3, 2)
    assert train(run, Listener()).step == 3
    # What is recorded is what was done, and reads back as it was counted.
    recorded = load_run_config(run.run_directory / "config.toml")[0]
    assert recorded.train == count_steps(run).train and recorded.train.epochs is None
    listener = Listener()
    assert train(run, listener).step == 3 and not listener.steps


class Evaluation:
    """In place of the tasks: what it was made with, and a number that tells parameters apart."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.seen: list[float] = []

    def make(self, *given: Any) -> Any:
        self.made.append(given)
        return self.evaluate

    def evaluate(self, params: Any) -> dict[str, dict[str, float]]:
        self.seen.append(float(sum(np.abs(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(params))))
        return {"first": {"acc": self.seen[-1], "acc_stderr": 0.5}, "second": {"perplexity": float("inf")}}


def test_tasks_are_evaluated_on_the_way_and_at_the_end(tmp_path: Path, toy: Toy) -> None:
    run = toy.run(tmp_path / "run", steps=5, validate_every=0)
    run = dataclasses.replace(run, evaluate=EvaluateConfig(tasks=("first", "second"), every=2))
    listener, evaluation = Listener(), Evaluation()
    train(run, listener, evaluate=evaluation.make)
    ((given, policy, tokenizer, layout, processes),) = evaluation.made
    assert given == run and policy.dtype == "float32" and tokenizer is None and layout.sizes.n_devices == 1
    assert processes.count == 1
    assert [(m.step, m.evaluation) for m in listener.evaluations] == [
        (step, task) for step in (2, 4, 5) for task in ("first", "second")
    ]
    assert len(set(evaluation.seen)) == 3
    kept = curves_of(read_metrics(run.run_directory / "metrics.jsonl"))
    assert [line["acc"] for line in kept.evaluation["first"]] == evaluation.seen
    assert kept.evaluation["second"][0] == {"step": 2, "evaluation": "second", "perplexity": None}
    # Nothing of the training depends on it.
    plain = toy.run(tmp_path / "plain", steps=5, validate_every=0)
    train(plain, Listener(), evaluate=evaluation.make)
    assert len(evaluation.made) == 1 and state_of(plain, 5) == state_of(run, 5)


def test_tasks_that_cannot_be_had_end_the_run_before_it_begins(tmp_path: Path, toy: Toy) -> None:
    run = dataclasses.replace(toy.run(tmp_path / "run"), evaluate=EvaluateConfig(tasks=("a",), every=1))

    def refuse(*given: Any) -> Any:
        raise DataError("no such task")

    with pytest.raises(DataError, match="no such task"):
        train(run, Listener(), evaluate=refuse)
    assert not run.run_directory.exists()
    with pytest.raises(ValueError, match="nothing was given to evaluate them with"):
        train(run, Listener())


def test_documents_are_kept_apart_at_the_end_of_text(tmp_path: Path, toy: Toy) -> None:
    def run_of(name: str, **data: Any) -> RunConfig:
        return toy.run(tmp_path / name, steps=2, validate_every=1, data=data)

    with pytest.raises(DataError, match="needs a tokenizer that has an end-of-text token"):
        train(run_of("none", separate_documents=True), Listener())
    assert not (tmp_path / "none").exists()
    # Every other sequence begins again in its middle.
    rows = np.random.default_rng(6).integers(0, 256, (8, T + 1))
    rows[::2, T // 2] = 256
    where = str(toy.write("joined.tfrecords", rows))
    bytes_model = dataclasses.replace(MODEL, n_vocab=264)
    losses = []
    for name, apart in (("apart", True), ("joined", False)):
        data = {"train": where, "validation": {"same": where}, "tokenizer": "bytes", "separate_documents": apart}
        listener = Listener()
        train(toy.run(tmp_path / name, model=bytes_model, steps=1, validate_every=1, data=data), listener)
        losses.append((listener.steps[0].loss, listener.validations[0].loss))
    assert all(abs(a - b) > 1e-6 for a, b in zip(*losses, strict=True)), losses


def test_a_validation_set_of_which_nothing_is_learned(tmp_path: Path, toy: Toy) -> None:
    where = str(toy.write("unlearned.tfrecords", ~np.random.default_rng(7).integers(0, 64, (8, T + 1))))
    run = toy.run(tmp_path / "run", steps=1, validate_every=1, data={"validation": {"prompts": where}})
    with pytest.raises(RunError, match="validation set 'prompts': no token of what is read of it is learned"):
        train(run, Listener())
