"""What TensorBoard reads of a run: every step once, however often the run was interrupted."""

from __future__ import annotations

import builtins
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_cases import Listener, Toy, lines, terminate
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mesh_transformer.config.run import RunConfig
from mesh_transformer.data.tfrecord import read_record, scan_offsets
from mesh_transformer.train.metrics import EvaluationMetrics, validation_metrics
from mesh_transformer.train.run import Result, train
from mesh_transformer.train.tensorboard import MISSING, TensorBoard


def events(directory: Path) -> list[Any]:
    """Every event, file after file in the order of their time, checksums verified."""
    found = []
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        offsets, lengths = scan_offsets(path)
        with path.open("rb") as file:
            for i, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
                payload = read_record(file.fileno(), int(offset), int(length), path=str(path), record=i)
                found.append(Event.FromString(bytes(payload)))
    return found


def shown(directory: Path) -> list[tuple[str, int, float]]:
    """Curve, step and value as TensorBoard shows them: a START drops what has its step or a later one."""
    values: list[tuple[str, int, float]] = []
    for event in events(directory):
        if event.session_log.status == SessionLog.START:
            values = [value for value in values if value[1] < event.step]
        values += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return values


def test_every_kind_of_line_is_a_curve(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard", 0)
    board.write(validation_metrics(3, "far", 800.0))  # its perplexity is infinite: no point
    board.write(EvaluationMetrics(step=3, evaluation="piqa", metrics={"acc": 0.5, "acc_stderr": 0.125}))
    board.close()
    assert shown(tmp_path / "tensorboard") == [
        ("validation/far/loss", 3, 800.0),
        ("evaluation/piqa/acc", 3, 0.5),
        ("evaluation/piqa/acc_stderr", 3, 0.125),
    ]


@pytest.mark.parametrize("stop_at", [7, 12])
def test_an_interrupted_run_shows_every_step_once(
    tmp_path: Path, toy: Toy, quick_compile: None, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy.run(tmp_path / "run")
    die_after(stop_at, run, monkeypatch)
    assert train(run, Listener()) == Result(12, None)
    values = shown(run.run_directory / "tensorboard")
    assert max(Counter((tag, step) for tag, step, _ in values).values()) == 1
    losses = [(step, value) for tag, step, value in values if tag == "train/loss"]
    expected = [(line["step"], line["loss"]) for line in lines(run) if "validation" not in line]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]
    assert len(losses) == 12
    assert {tag for tag, _, _ in values} >= {"train/learning_rate", "validation/near/loss", "validation/far/perplexity"}


def die_after(step: int, run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error after step `step`, of which no checkpoint is saved, and one more stop by a signal."""
    with pytest.raises(ZeroDivisionError):
        train(run, Listener(on_step={step: lambda: 1 // 0}))
    assert train(run, Listener(on_step={step - 1: terminate})).stopped_by == 15


def test_without_the_package_the_run_says_so_once_and_goes_on(
    tmp_path: Path, toy: Toy, quick_compile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_it: Callable[..., Any] = builtins.__import__

    def refuse(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return import_it(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    run, listener = toy.run(tmp_path / "run", steps=2), Listener()
    assert train(run, listener) == Result(2, None)
    assert listener.notes.count(MISSING) == 1
    assert not (run.run_directory / "tensorboard").exists()
