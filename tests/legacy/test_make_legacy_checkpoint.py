"""scripts/make_legacy_checkpoint.py at a tiny size, against the generator of the tests."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from legacy.generator import Arch, leaves, pieces
from legacy.npz import from_bfloat16_bits

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_legacy_checkpoint.py"
SIZES = ["--layers", "12", "--d-model", "64", "--heads", "8", "--vocab", "264", "--seq", "32", "--shards", "4"]
ARCH = Arch(layers=12, d_model=64, n_heads=8, n_vocab=264, seq=32, pe_rotary_dims=8)


def make(target: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, target, *SIZES, *more], capture_output=True, text=True, check=False)


def read_shard(directory: Path) -> list[np.ndarray]:
    found = []
    for p in range(16):
        with np.load(directory / f"{p}.npz") as file:
            found += [file[f"arr_{i}"] for i in range(len(file.files))]
    assert {a.dtype for a in found[:-1]} == {np.dtype("V2")}
    return [from_bfloat16_bits(a.view(np.uint16)) for a in found[:-1]] + found[-1:]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "model"
    done = make(path)
    assert done.returncode == 0, done.stderr
    assert "bytes in" in done.stdout and "MB/s" in done.stdout
    return path


def test_files_and_leaves_are_those_of_the_format(model: Path) -> None:
    assert sorted(p.name for p in model.iterdir()) == ["config.json", "meta.json", "step_383500"]
    assert json.loads((model / "meta.json").read_text())["checkpoints"] == [383500]
    config = json.loads((model / "config.json").read_text())
    assert config.keys() | {"wandb_project"} == ARCH.config(4).keys()
    for key in ("layers", "d_model", "n_heads", "n_vocab", "seq", "norm", "pe", "pe_rotary_dims", "cores_per_replica"):
        assert config[key] == ARCH.config(4)[key], key
    for s in range(4):
        found = read_shard(model / "step_383500" / f"shard_{s}")
        assert [a.shape for a in found] == [leaf.shard_shape(4) for leaf in leaves(ARCH)] + [()]
        assert found[-1] == 383500 and found[-1].dtype == np.int32
        for p, piece in enumerate(pieces(127)):
            with zipfile.ZipFile(model / "step_383500" / f"shard_{s}" / f"{p}.npz") as archive:
                assert archive.testzip() is None and len(archive.namelist()) == len(piece)
                assert b"'<V2'" in archive.read("arr_0.npy")[:128]


def test_values_are_sane_and_differ_as_the_originals_do(model: Path) -> None:
    shards = [read_shard(model / "step_383500" / f"shard_{s}") for s in range(4)]
    for i, leaf in enumerate(leaves(ARCH)):
        values = np.stack([shard[i] for shard in shards])
        if leaf.combine == "first":
            assert (values[1:] == leaf.initial).all() and (values[0] != leaf.initial).any()
        elif leaf.combine == "sum":
            assert len({tuple(row) for row in values.tolist()}) == 4
        if leaf.combine != "first":
            assert np.abs(values).min() >= 2**-7 and np.abs(values).max() < 2**-5
            assert abs(values.mean()) < 0.006 and 0.015 < values.std() < 0.023
        elif leaf.name == "scale":
            assert (values[0] >= 1).all() and (values[0] < 1.25).all()


def test_a_bare_step_directory_and_what_is_there_already(tmp_path: Path) -> None:
    done = make(tmp_path / "step_12", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "step_12"]
    assert read_shard(tmp_path / "step_12" / "shard_0")[-1] == 12
    again = make(tmp_path / "step_13")
    assert again.returncode == 1 and "config.json exists" in again.stderr and not (tmp_path / "step_13").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--shards", "3"], "--d-model 64 must be divisible by --shards 3"),
        (["--rotary", "10"], "must be even and in 2..8"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, more: list[str], message: str) -> None:
    done = make(tmp_path / "model", *more)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "model").exists()
