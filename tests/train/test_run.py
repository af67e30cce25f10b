"""Runs from their beginning to their end: stopped and gone on with, refused, complete, begun again."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_cases import (
    MODEL,
    TIMES,
    Listener,
    Spy,
    T,
    Toy,
    checkpoints,
    command,
    lines,
    state_of,
    terminate,
    timeless,
    trained_steps,
)

from mesh_transformer.checkpoint.digest import digest
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.checkpoint.opening import restore_params
from mesh_transformer.config.run import RunConfig
from mesh_transformer.data.loader import TrainLoader
from mesh_transformer.data.source import RecordSource, open_source
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import abstract_params
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.train import run as train_run
from mesh_transformer.train.loop import StopRequest, compile_programs
from mesh_transformer.train.run import Result, train

pytestmark = pytest.mark.usefixtures("quick_compile")

STEP_FIELDS = {"step", "loss", "last_loss", "z_loss", "total_loss", "grad_norm", "learning_rate", "tokens"} | TIMES
VALIDATION_FIELDS = {"step", "validation", "loss", "perplexity"}


def digest_of(run: RunConfig, step: int) -> str:
    path = run.run_directory / "checkpoints" / str(step)
    return digest(run.model, restore_params(path, abstract_params(run.model)))


# ------------------------------------------------------------------------------------------------ stopping, going on


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation": 2},
        pytest.param(
            {"param_dtype": "bfloat16", "moment_dtype": "bfloat16", "compute_dtype": "bfloat16"}, marks=pytest.mark.long
        ),
    ],
    ids=["float32", "accumulation", "bfloat16"],
)
def test_stopping_and_going_on_changes_no_bit(tmp_path: Path, toy: Toy, settings: dict[str, Any]) -> None:
    undisturbed = toy.run(tmp_path / "undisturbed", **settings)
    assert train(undisturbed, Listener()) == Result(12, None)

    stopped = toy.run(tmp_path / "stopped", **settings)
    first = Listener({6: terminate})
    assert train(stopped, first) == Result(6, signal.SIGTERM)
    assert [m.step for m in first.steps] == [1, 2, 3, 4, 5, 6]
    assert checkpoints(stopped) == ["5", "6"]
    second = Listener()
    assert train(stopped, second) == Result(12, None)
    assert [m.step for m in second.steps] == [7, 8, 9, 10, 11, 12]
    assert any("going on from checkpoint 6" in note for note in second.notes)

    assert state_of(stopped, 12) == state_of(undisturbed, 12)
    assert digest_of(stopped, 12) == digest_of(undisturbed, 12) != digest_of(undisturbed, 10)
    assert timeless(stopped) == timeless(undisturbed)
    assert trained_steps(stopped) == list(range(1, 13))
    assert checkpoints(undisturbed) == ["5", "10", "12"]


def test_metrics_have_the_fields_that_are_promised(whole: RunConfig) -> None:
    training = [line for line in lines(whole) if "validation" not in line]
    assert all(line.keys() == STEP_FIELDS for line in training)
    assert [line["tokens"] for line in training] == [4 * T * step for step in range(1, 13)]
    assert [line["learning_rate"] for line in training[:3]] == pytest.approx([0, 0.005, 0.01])
    for line in training:
        assert line["total_loss"] == pytest.approx(line["loss"] + line["z_loss"], rel=1e-6)
        assert line["tokens_per_second"] == pytest.approx(4 * T / line["step_time"])
    validation = [line for line in lines(whole) if "validation" in line]
    assert all(line.keys() == VALIDATION_FIELDS for line in validation)
    assert [(line["step"], line["validation"]) for line in validation] == list(
        itertools.product([4, 8, 12], ["near", "far"])
    )
    assert all(line["perplexity"] == math.exp(line["loss"]) for line in validation)


def test_accumulation_computes_the_same(tmp_path: Path, toy: Toy, whole: RunConfig) -> None:
    run = toy.run(tmp_path / "run", gradient_accumulation=2, steps=4, validate_every=0)
    train(run, Listener())
    for ours, theirs in zip(lines(run), (line for line in lines(whole) if "validation" not in line), strict=False):
        for field in ("loss", "last_loss", "total_loss", "grad_norm"):
            assert ours[field] == pytest.approx(theirs[field], rel=1e-4)
    assert trained_steps(run) == [1, 2, 3, 4]


def test_a_checkpoint_has_dtypes_as_configured(tmp_path: Path, toy: Toy) -> None:
    run = toy.run(tmp_path / "run", param_dtype="bfloat16", moment_dtype="bfloat16", compute_dtype="bfloat16", steps=1)
    train(run, Listener())
    dtypes = {name: dtype for name, (dtype, _) in state_of(run, 1).items()}
    assert {dtype for name, dtype in dtypes.items() if "params" in name or ".mu" in name or ".nu" in name} == {
        "bfloat16"
    }


def test_the_same_seed_is_the_same_run_and_another_is_another(tmp_path: Path, toy: Toy, whole: RunConfig) -> None:
    again, other = toy.run(tmp_path / "again", steps=2), toy.run(tmp_path / "other", steps=2, seed=1)
    for run in (again, other):
        train(run, Listener())
    losses = [[line["loss"] for line in lines(run) if "validation" not in line][:2] for run in (whole, again, other)]
    assert losses[0] == losses[1] != losses[2]


def test_a_signal_before_the_first_step_saves_nothing(tmp_path: Path, toy: Toy) -> None:
    run = toy.run(tmp_path / "run")
    stopping = Listener(on_note=lambda text: terminate() if text == "compiling" else None)
    assert train(run, stopping) == Result(0, signal.SIGTERM)
    assert stopping.steps == [] and lines(run) == [] and not (run.run_directory / "checkpoints").exists()


def test_a_signal_during_validation_or_a_save_keeps_that_step(
    tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated = toy.run(tmp_path / "validated")
    listener = Listener()
    monkeypatch.setattr(listener, "validation", lambda metrics: terminate() if metrics.validation == "near" else None)
    assert train(validated, listener) == Result(4, signal.SIGTERM)
    assert checkpoints(validated) == ["4"] and len(lines(validated)) == 6  # the second set was finished too

    saved = toy.run(tmp_path / "saved")
    save = CheckpointStore.save

    def save_and_stop(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        patch.undo()
        terminate()

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", save_and_stop)
        result = train(saved, Listener())
    # The signal came after the step was saved; whatever step the run stops at, that one is kept.
    assert result.stopped_by == signal.SIGTERM and checkpoints(saved)[-1] == str(result.step) == "6"


def test_a_second_signal_leaves_at_once() -> None:
    with StopRequest() as stop:
        terminate()
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            terminate()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_needs_no_main_thread() -> None:
    found: list[object] = []

    def elsewhere() -> None:
        with StopRequest() as stop:
            found.append(stop.signal)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [None]


def test_sigterm_of_the_command_exits_143(
    tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mesh_transformer.cli.console import TrainingDisplay

    step = TrainingDisplay.step
    monkeypatch.setattr(TrainingDisplay, "step", lambda self, m: (step(self, m), m.step == 3 and terminate()))
    run = toy.run(tmp_path / "run")
    assert command(run, tmp_path, monkeypatch) == 143
    assert checkpoints(run) == ["3"]
    assert "step 3 is saved" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ order of data


def test_the_order_of_data_does_not_depend_on_the_batch_size(tmp_path: Path, toy: Toy, spy: Spy) -> None:
    run = toy.run(tmp_path / "run", steps=12, validate_every=0)
    train(run, Listener())
    loader = TrainLoader(source_of(toy), seed=0, batch_size=1)
    batches = loader.batches()
    expected = [rows[0].tolist() for rows in itertools.islice(batches, 48)]
    batches.close()
    assert spy.rows == expected  # more than an epoch, which has 40
    spy.rows.clear()

    wider = toy.run(tmp_path / "wider", steps=4, data={"validation": {}})
    train(wider, Listener())
    widened = dataclasses.replace(
        wider, train=dataclasses.replace(wider.train, steps=8, batch_size=8, checkpoint_every=2, end_learning_rate=2e-3)
    )
    train(widened, Listener())
    assert spy.rows == expected
    assert [line["tokens"] for line in lines(wider)] == [T * n for n in (4, 8, 12, 16, 24, 32, 40, 48)]
    # Allowed on going on, and written down:
    changes = [json.loads(line) for line in (wider.run_directory / "changes.jsonl").read_text().splitlines()]
    assert changes == [
        {
            "step": 4,
            "changed": {
                "train.batch_size": [4, 8],
                "train.checkpoint_every": [5, 2],
                "train.end_learning_rate": [1e-3, 2e-3],
                "train.steps": [4, 8],
            },
        }
    ]
    assert "end_learning_rate = 0.002" in (wider.run_directory / "config.toml").read_text()
    assert checkpoints(wider) == ["4", "6", "8"]


def source_of(toy: Toy) -> RecordSource:
    return open_source(str(toy.directory / "train.index"), sequence_length=T, n_vocab=64)


@pytest.fixture
def real_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what `quick_compile` does to a run's own call."""
    monkeypatch.setattr(train_run, "compile_programs", compile_programs)


def test_compiling_takes_no_batch_and_happens_once(
    tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch, real_compile: None, spy: Spy
) -> None:
    events: list[str] = []
    batches = TrainLoader.batches

    def watched(self: TrainLoader, position: int = 0) -> Any:
        events.append(f"batches from {position} after {spy.compiled} compilation")
        return batches(self, position)

    monkeypatch.setattr(TrainLoader, "batches", watched)
    compilations: list[str] = []
    counting = False

    def count(name: str, _: float, **__: Any) -> None:
        if counting and "backend_compile" in name:
            compilations.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)

    def begin() -> None:
        nonlocal counting
        counting = True

    run = toy.run(tmp_path / "run", steps=9)
    listener = Listener({1: begin})
    train(run, listener)
    counting = False
    assert events == ["batches from 0 after 1 compilation"]
    assert listener.steps[0].step == 1 and listener.steps[0].tokens == 4 * T
    assert len(spy.rows) == 9 * 4
    assert compilations == []  # in nine steps, three validations and two saves
    counting = True
    jax.jit(lambda x: x * 3 + 1)(jnp.arange(7.0)).block_until_ready()
    assert compilations  # so it is counted at all
    counting = False


# --------------------------------------------------------------------------------------------------- what is computed


def test_validation_is_the_mean_over_the_rows_of_each_set(toy: Toy, whole: RunConfig) -> None:
    path = whole.run_directory / "checkpoints" / "12"
    params = restore_params(path, abstract_params(MODEL))
    loss = jax.jit(functools.partial(loss_report, cfg=MODEL, policy=ComputePolicy()))
    # Ten rows are two whole batches of four; seven are one.
    for name, n_rows in {"near": 8, "far": 4}.items():
        source = open_source(str(toy.directory / f"{name}.tfrecords"), sequence_length=T, n_vocab=64)
        one_by_one = [float(loss(params, jnp.asarray(source[i][None])).loss) for i in range(n_rows)]
        reported = [line["loss"] for line in lines(whole) if line.get("validation") == name and line["step"] == 12]
        assert reported == pytest.approx([np.mean(one_by_one)], rel=1e-5)


def test_the_loss_of_what_can_be_learned_falls(tmp_path: Path, toy: Toy) -> None:
    run = toy.run(tmp_path / "run", steps=60, validate_every=60, checkpoint_every=60)
    train(run, Listener())
    losses = [line["loss"] for line in lines(run) if "validation" not in line]
    assert losses[0] == pytest.approx(math.log(64), rel=0.2)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    held_out = {line["validation"]: line["loss"] for line in lines(run) if "validation" in line}
    assert held_out["near"] < 0.6 * losses[0] < losses[0] < held_out["far"]


def test_recomputation_changes_no_loss(tmp_path: Path, toy: Toy, whole: RunConfig) -> None:
    kept = [line["loss"] for line in lines(whole) if "validation" not in line][:4]
    for remat in ("dots", "full"):
        run = toy.run(tmp_path / remat, remat=remat, steps=4, validate_every=0)
        train(run, Listener())
        assert [line["loss"] for line in lines(run)] == pytest.approx(kept, rel=1e-6)


def test_the_picture_is_a_picture(whole: RunConfig) -> None:
    data = (whole.run_directory / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82") and len(data) > 5000
