"""A tiny run: its data, its configuration, someone who listens to it, and what it leaves."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mesh_transformer import compat
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.cli.main import main
from mesh_transformer.config.load import to_toml
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import DataConfig, LogConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.data.tfrecord import write_records
from mesh_transformer.train.metrics import EvaluationMetrics, StepMetrics, ValidationMetrics, read_metrics
from mesh_transformer.train.state import abstract_state

MODEL = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_ff=32, n_vocab=64, n_ctx=16, d_rotary=4)
T = 16
MESH = MeshConfig(data=1)  # one of the devices; what many do: tests/sharding
TIMES = {"tokens_per_second", "step_time"}  # fields of metrics.jsonl that no two runs share
# The schedule is of fixed length, so that runs of different length share their program.
TRAIN = TrainConfig(
    steps=12,
    batch_size=4,
    learning_rate=1e-2,
    end_learning_rate=1e-3,
    warmup_steps=2,
    anneal_steps=30,
    validate_every=4,
    validation_batches=2,
    checkpoint_every=5,
)


class Listener:
    """An observer that keeps everything and calls `on_step[n]` when step n is reported, `on_note` for every note."""

    def __init__(
        self, on_step: dict[int, Callable[[], object]] | None = None, on_note: Callable[[str], object] | None = None
    ) -> None:
        self.notes: list[str] = []
        self.steps: list[StepMetrics] = []
        self.validations: list[ValidationMetrics] = []
        self.evaluations: list[EvaluationMetrics] = []
        self._on_step, self._on_note = on_step or {}, on_note

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self._on_note is not None:
            self._on_note(text)

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)
        self._on_step.get(metrics.step, lambda: None)()

    def validation(self, metrics: ValidationMetrics) -> None:
        self.validations.append(metrics)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        self.evaluations.append(metrics)


class Toy:
    """A data set in two files and two validation sets, and runs on them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.write("train_1.tfrecords", sequences(25, seed=1))
        self.write("train_2.tfrecords", sequences(15, seed=2))
        self.write("near.tfrecords", sequences(10, seed=3))
        self.write("far.tfrecords", np.random.default_rng(4).integers(0, 64, (7, T + 1)))
        self.text("train.index", "train_1.tfrecords\ntrain_2.tfrecords\n")

    def write(self, name: str, rows: np.ndarray) -> Path:
        write_records(self.directory / name, rows)
        return self.directory / name

    def text(self, name: str, text: str) -> Path:
        (self.directory / name).write_text(text)
        return self.directory / name

    def run(
        self, where: Path, *, model: ModelConfig = MODEL, seed: int = 0, data: Any = None, **changes: Any
    ) -> RunConfig:
        """The run in directory `where`; `changes` are of [train], `data` of [data]."""
        sets = {"near": str(self.directory / "near.tfrecords"), "far": str(self.directory / "far.tfrecords")}
        usual = {"train": str(self.directory / "train.index"), "validation": sets, "sequence_length": T}
        return RunConfig(
            name=where.name,
            seed=seed,
            model=model,
            data=DataConfig(**(usual | (data or {}))),
            train=dataclasses.replace(TRAIN, **changes),
            mesh=MESH,
            log=LogConfig(directory=str(where.parent)),
        )


def sequences(n: int, seed: int) -> np.ndarray:
    """int [n, T + 1] that can be learned: every id is the one before it plus 5, of 64."""
    starts = np.random.default_rng(seed).integers(0, 64, (n, 1))
    return (starts + 5 * np.arange(T + 1)) % 64


def state_of(run: RunConfig, step: int) -> dict[str, tuple[str, bytes]]:
    """Name -> dtype and bytes of every array of checkpoint `step`, read without opening the run for writing."""
    store = CheckpointStore(run.run_directory / "checkpoints", keep_last=1, keep_every=0)
    state = store.restore(step, abstract_state(run), model=run.model)
    leaves = jax.tree_util.tree_leaves_with_path(vars(state))
    return {jax.tree_util.keystr(path): (str(leaf.dtype), np.asarray(leaf).tobytes()) for path, leaf in leaves}


def checkpoints(run: RunConfig) -> list[str]:
    """Everything under checkpoints/, steps first in their order."""
    names = [entry.name for entry in (run.run_directory / "checkpoints").iterdir()]
    return sorted(names, key=lambda name: (not name.isdigit(), len(name), name))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file by its relative name; the lock, in which a process leaves its number, is left out."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".lock"}


def flip_bit(path: Path) -> None:
    """One bit in the middle of a file."""
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def copy_of(run: RunConfig, where: Path) -> Path:
    """A copy of the run's directory at `where`."""
    shutil.copytree(run.run_directory, where)
    return where


@dataclasses.dataclass
class Spy:
    """What happened to the compiled programs of runs: batches trained on, and what `replace_step` made of steps."""

    rows: list[list[int]] = dataclasses.field(default_factory=list)
    compiled: int = 0
    replace_step: Callable[..., Any] | None = None


def terminate() -> None:
    """SIGTERM to this process, as from `kill`."""
    os.kill(os.getpid(), 15)


def command(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """`mesh-transformer train CONFIG FLAGS` in this process; returns its exit status."""
    config = tmp_path / "config.toml"
    config.write_text(to_toml(run))
    # Settings of a whole process, which is here the one that runs the tests.
    monkeypatch.setattr(compat, "prepare_process", lambda: None)
    monkeypatch.setattr(compat, "use_compile_cache", lambda: None)
    monkeypatch.setattr(sys, "argv", ["mesh-transformer", "train", str(config), *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def lines(run: RunConfig) -> list[dict[str, Any]]:
    return read_metrics(run.run_directory / "metrics.jsonl")


def timeless(run: RunConfig) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(run)]


def trained_steps(run: RunConfig) -> list[int]:
    return [line["step"] for line in lines(run) if "validation" not in line]
