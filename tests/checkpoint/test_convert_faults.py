"""Conversions that fail or are killed: what is told, and what is left."""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from v1_cases import TINY, refused, snapshot

from legacy.generator import Truth, write_model_directory
from mesh_transformer.checkpoint import convert as convert_module
from mesh_transformer.checkpoint.convert import TARGETS, Conversion, convert
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.config.errors import UserError

V1_TARGETS = [to for to in TARGETS if to != "legacy-v2"]
Made = tuple[Path, Truth]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A full model directory of the original's; never changed."""
    path = tmp_path_factory.mktemp("source") / "model"
    return path, write_model_directory(path, TINY, 4, [1201], config=True)[1201]


@pytest.fixture(scope="module")
def converted(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same in every format that can hold it; to be copied."""
    path = tmp_path_factory.mktemp("converted")
    for to in V1_TARGETS:
        convert(open_weights(made[0]), path / to, Conversion(to=to))
    convert(open_weights(made[0]), path / "step_1201", Conversion(to="legacy"))
    return {to: path / to for to in [*V1_TARGETS, "step_1201"]}


def entries(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


# ------------------------------------------------------------------------------------------------ full disks


def test_too_little_space_is_told_before_anything_is_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    refused(
        lambda: convert(open_weights(made[0]), tmp_path / "a" / "b", Conversion(to="native")), "are free in", "needs"
    )
    assert not entries(tmp_path)


def test_the_space_of_a_dead_conversion_counts_as_free(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = tmp_path / ".out.tmp-4194304999"
    dead.mkdir()
    (dead / "huge").write_bytes(b"0")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 0 if dead.exists() else 10**9))
    convert(open_weights(made[0]), tmp_path / "out", Conversion(to="native"))
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("tiny_disk", ["80k"], indirect=True)
@pytest.mark.parametrize("to", V1_TARGETS)
def test_a_disk_that_is_really_full(
    made: Made, tiny_disk: Path, to: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert_module, "_check_space", lambda *_: None)
    (tiny_disk / "mine").write_bytes(b"kept")
    conversion = Conversion(to=to, with_optimizer=to != "huggingface")
    refused(
        lambda: convert(open_weights(made[0]), tiny_disk / "out", conversion),
        *(str(tiny_disk / "out"), "no space left on the disk", "removed"),
    )
    assert entries(tiny_disk) == ["mine"]
    assert capfd.readouterr() == ("", "")


def test_a_place_that_cannot_be_written(made: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    weights = open_weights(made[0])
    refused(lambda: convert(weights, tmp_path / "file" / "out", Conversion(to="native")), str(tmp_path / "file"))


@pytest.mark.parametrize("to", V1_TARGETS)
def test_a_source_that_fails_midway(made: Made, tmp_path: Path, to: Any) -> None:
    source = Path(shutil.copytree(made[0], tmp_path / "source"))
    weights = open_weights(source)
    file = source / "step_1201" / "shard_3" / "11.npz"
    data = file.read_bytes()
    file.write_bytes(data[:200] + b"\0" * 200 + data[400:])
    before = snapshot(source)
    shutil.copytree(source, tmp_path / "out")
    kept = snapshot(tmp_path / "out")
    conversion = Conversion(to=to, with_optimizer=to != "huggingface")
    refused(lambda: convert(weights, tmp_path / "new", conversion), str(file), "copy it again")
    refused(lambda: convert(weights, tmp_path / "out", conversion, overwrite=True), str(file))
    assert entries(tmp_path) == ["out", "source"]
    assert snapshot(source) == before and snapshot(tmp_path / "out") == kept


def test_what_is_written_wrongly_is_found(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that forgets: one value is another when it is read back."""
    original = convert_module._write

    def forgetful(temporary: Path, *more: Any) -> Path:
        step = original(temporary, *more)
        file = step / "shard_1" / "3.npz"
        with np.load(file) as found:
            arrays = [found[f"arr_{i}"] for i in range(len(found.files))]
        arrays[0].reshape(-1)[0] += 1
        with file.open("wb") as out:
            np.savez(out, *arrays)
        return step

    monkeypatch.setattr(convert_module, "_write", forgetful)
    weights = open_weights(made[0])
    refused(lambda: convert(weights, tmp_path / "out", Conversion(to="legacy")), "read back", "disk or memory")
    assert not entries(tmp_path)


# ------------------------------------------------------------------------------------------------ kills

# One process imports once and then forks, before any thread exists, a child for each trial.
TRIALS = """
import json, os, signal, sys
from pathlib import Path
from mesh_transformer import files
from mesh_transformer.checkpoint import convert as module
from mesh_transformer.checkpoint.convert import Conversion, convert
from mesh_transformer.checkpoint.models import open_weights
import orbax.checkpoint, safetensors, tensorstore

source, trials = sys.argv[1], json.loads(sys.argv[2])

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def child(target, to, point):
    def progress(stage, done, total):
        if stage == point[0] and done >= point[1] * total:
            die()
    if point[0] == "certified":
        files.fsync_tree = die
    if point[0] == "renamed":
        rename = Path.rename
        Path.rename = lambda self, to: die() if ".tmp-" in self.name else rename(self, to)
    if point[0] == "replaced":
        files._remove = die
    convert(open_weights(source), Path(target), Conversion(to=to), overwrite=True, progress=progress)

for target, to, point in trials:
    pid = os.fork()
    if pid == 0:
        child(target, to, point)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (target, to, point, status)
"""
POINTS = [("writing", 0.01), ("writing", 0.6), ("hashing the source", 0.5), ("reading back", 0.9), ("certified", 0)]


def killed(source: Path, trials: list[tuple[str, str, tuple[str, float]]]) -> None:
    command = [sys.executable, "-c", TRIALS, str(source), json.dumps(trials)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | {"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr


def test_a_killed_conversion_leaves_no_model(made: Made, converted: dict[str, Path], tmp_path: Path) -> None:
    trials = [(str(tmp_path / f"{to}-{i}" / "out"), to, point) for to in V1_TARGETS for i, point in enumerate(POINTS)]
    over = [("renamed", 0.0), ("replaced", 0.0), ("reading back", 0.9)]
    for i in range(len(over)):
        shutil.copytree(converted["huggingface"], tmp_path / f"over-{i}" / "out")
    trials += [(str(tmp_path / f"over-{i}" / "out"), "native", point) for i, point in enumerate(over)]
    killed(made[0], trials)
    for name, to, point in trials:
        target = Path(name)
        left = entries(target.parent)
        if target.parent.name.startswith("over"):
            # What was there, or its successor, is whole: at its place, or beside it while the two change places.
            places = [entry for entry in target.parent.iterdir() if ".tmp-" not in entry.name]
            assert any(is_model(place) for place in places), left
        else:
            assert len(left) == 1 and left[0].startswith(".out.tmp-"), left
            refused(lambda: open_weights(target), str(target))  # noqa: B023
            refused(lambda: open_weights(target.parent), str(target.parent))  # noqa: B023
            refused(lambda: open_weights(target.parent / left[0]), left[0], "did not finish")  # noqa: B023
        conversion = Conversion(to=to)  # type: ignore[arg-type]
        facts = convert(open_weights(made[0]), target, conversion, overwrite=target.exists() or point[0] == "renamed")
        assert entries(target.parent) == ["out"] and facts["changed"] == []
        assert open_weights(target).format == to


def is_model(path: Path) -> bool:
    try:
        open_weights(path)
    except UserError:
        return False
    return True


def test_what_was_about_to_be_replaced_comes_back(made: Made, converted: dict[str, Path], tmp_path: Path) -> None:
    """Killed between two renames: the model is not at its place, and must not be taken for absent."""
    shutil.copytree(converted["huggingface"], tmp_path / ".out.old-4194304999")
    refused(lambda: convert(open_weights(made[0]), tmp_path / "out", Conversion(to="native")), "exists already")
    assert entries(tmp_path) == ["out"] and open_weights(tmp_path / "out").format == "huggingface"
