"""A run directory that holds a run already: refused, left as it is, begun again, in use."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_cases import (
    MODEL,
    TRAIN,
    Listener,
    Spy,
    Toy,
    checkpoints,
    contents,
    copy_of,
    sequences,
    state_of,
    timeless,
    trained_steps,
)

from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.run import RunConfig
from mesh_transformer.train.run import Result, train

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("change", ["model", "seed", "order", "files", "sequence_length"])
def test_going_on_with_something_else_is_refused(tmp_path: Path, toy: Toy, ten_steps: RunConfig, change: str) -> None:
    where = copy_of(ten_steps, tmp_path / "run")
    before = contents(where)
    swapped = toy.text("swapped.index", "train_2.tfrecords\ntrain_1.tfrecords\n")
    short = Toy(tmp_path_for(tmp_path, "short"))
    for name, n in {"train_1": 25, "train_2": 15, "near": 10, "far": 7}.items():
        short.write(f"{name}.tfrecords", sequences(n, seed=0)[:, :9])
    changed = {
        "model": lambda: toy.run(where, steps=12, model=dataclasses.replace(MODEL, d_ff=48)),
        "seed": lambda: toy.run(where, steps=12, seed=7),
        "order": lambda: toy.run(where, steps=12, data={"train": str(swapped)}),
        "files": lambda: toy.run(where, steps=12, data={"train": str(toy.directory / "train_1.tfrecords")}),
        "sequence_length": lambda: short.run(where, steps=12, data={"sequence_length": 8}),
    }[change]()
    named = {
        "model": "d_ff is 32 there, 48 here",
        "seed": "another seed: 0, now 7",
        "order": "another list of data files",
        "files": "another list of data files",
        "sequence_length": "another data.sequence_length: 16, now 8",
    }[change]
    with pytest.raises(CheckpointError, match=re.escape(named)) as caught:
        train(changed, Listener())
    message = str(caught.value)
    assert "--new" in message and message.count("\n") == 1 and str(where / "checkpoints" / "10") in message
    assert contents(where) == before


def tmp_path_for(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_a_complete_run_is_left_as_it_is(tmp_path: Path, toy: Toy, ten_steps: RunConfig, spy: Spy) -> None:
    where = copy_of(ten_steps, tmp_path / "run")
    complete = toy.run(where, steps=10)
    train(complete, Listener())  # the copy's own place is written down once
    before = contents(where)
    listener = Listener()
    assert train(complete, listener) == Result(10, None)
    assert contents(where) == before
    assert any("complete at step 10" in note and "train.steps" in note for note in listener.notes)
    # Killed after its last checkpoint and before its picture, it still gets that.
    (where / "loss.png").unlink()
    train(complete, Listener())
    assert contents(where) == before
    assert spy.compiled == 0


def test_new_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path, toy: Toy, ten_steps: RunConfig) -> None:
    where = copy_of(ten_steps, tmp_path / "run")
    train(toy.run(where, steps=11, checkpoint_every=4), Listener())
    assert (where / "changes.jsonl").exists()
    stranger = where / "notes" / "mine.txt"
    stranger.parent.mkdir()
    stranger.write_text("keep me")
    (where / "metrics.csv").write_text("keep me too")
    again = toy.run(where, steps=2, seed=3)
    assert train(again, Listener(), new=True) == Result(2, None)
    assert checkpoints(again) == ["2"]
    assert trained_steps(again) == [1, 2]
    assert stranger.read_text() == "keep me" and (where / "metrics.csv").read_text() == "keep me too"
    kept = {path.name for path in where.iterdir()}
    ours = {".lock", "checkpoints", "config.toml", "loss.png", "metrics.jsonl", "tensorboard"}
    assert kept == ours | {"metrics.csv", "notes"}
    assert len(list((where / "tensorboard").iterdir())) == 1  # that of the new run


def test_new_needs_usable_data_first(tmp_path: Path, toy: Toy, ten_steps: RunConfig) -> None:
    where = copy_of(ten_steps, tmp_path / "run")
    before = contents(where)
    with pytest.raises(Exception, match="does not exist"):
        train(toy.run(where, data={"train": str(tmp_path / "absent.index")}), Listener(), new=True)
    assert contents(where) == before


HOLDER = """
import sys
from mesh_transformer.checkpoint.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_a_living_process_uses_is_refused_by_its_number(
    tmp_path: Path, toy: Toy, ten_steps: RunConfig
) -> None:
    where = copy_of(ten_steps, tmp_path / "run")
    before = contents(where)
    held = [sys.executable, "-c", HOLDER, str(where)]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        for new in (False, True):
            with pytest.raises(CheckpointError, match=f"in use by process {holder.pid} on "):
                train(toy.run(where, steps=12), Listener(), new=new)
        assert contents(where) == before
        holder.communicate()
    assert train(toy.run(where, steps=12), Listener()) == Result(12, None)


def test_lines_beyond_the_checkpoint_and_a_torn_one_are_cut(
    tmp_path: Path, toy: Toy, ten_steps: RunConfig, whole: RunConfig
) -> None:
    where = copy_of(ten_steps, tmp_path / "run")
    shutil.rmtree(where / "checkpoints" / "10")
    with (where / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 2.')
    run = toy.run(where, steps=12)
    seen: list[list[int]] = []
    train(run, Listener(on_note=lambda text: seen.append(trained_steps(run)) if text == "compiling" else None))
    assert seen == [[1, 2, 3, 4, 5]]
    # Ten steps ended with a validation of their own, which the twelve have not.
    assert timeless(run) == timeless(whole)
    assert state_of(run, 12) == state_of(whole, 12)
    assert TRAIN.checkpoint_every == 5
