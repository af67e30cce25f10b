"""A trace of some steps of a run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from run_cases import Listener, Toy, command, terminate

from mesh_transformer.train.profile import Profiler
from mesh_transformer.train.run import Result, train


def traces(directory: Path) -> list[Path]:
    return list(directory.glob("plugins/profile/*/perfetto_trace.json.gz"))


def test_the_trace_is_of_the_steps_asked_for(tmp_path: Path, toy: Toy, quick_compile: None) -> None:
    run, listener = toy.run(tmp_path / "run", steps=6), Listener()
    with Profiler(listener, tmp_path / "profile", 2) as profiler:
        assert train(run, profiler) == Result(6, None)
    assert [metrics.step for metrics in listener.steps] == list(range(1, 7))
    assert len(listener.validations) == 4
    (trace,) = traces(tmp_path / "profile")
    (said,) = [note for note in listener.notes if note.startswith("profile: ")]
    assert str(trace) in said
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    executed = [event for event in events if "ExecuteHelper" in event.get("name", "") or "jit_step" in str(event)]
    assert executed


@pytest.mark.long
def test_a_run_that_is_stopped_leaves_what_there_was(tmp_path: Path, toy: Toy, quick_compile: None) -> None:
    run, listener = toy.run(tmp_path / "run"), Listener(on_step={4: terminate})
    with Profiler(listener, tmp_path / "profile", 100) as profiler:
        assert train(run, profiler).stopped_by == 15
    assert len(traces(tmp_path / "profile")) == 1


def test_a_run_too_short_for_it_says_so(tmp_path: Path, toy: Toy, quick_compile: None) -> None:
    run, listener = toy.run(tmp_path / "run", steps=1), Listener()
    with Profiler(listener, tmp_path / "profile", 1) as profiler:
        train(run, profiler)
    assert listener.notes[-1] == "no profile: the first 2 steps are not traced, and there were 1"
    assert traces(tmp_path / "profile") == []


def test_the_option(
    tmp_path: Path,
    toy: Toy,
    quick_compile: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = toy.run(tmp_path / "run", steps=4)
    assert command(run, tmp_path, monkeypatch, "--profile", "1") == 0
    assert len(traces(run.run_directory / "profile")) == 1
    assert "ui.perfetto.dev" in capsys.readouterr().err
