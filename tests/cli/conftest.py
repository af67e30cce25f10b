"""The command, in this process and in one of its own, and a tiny run made with it."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quickly
from mesh_transformer import compat
from mesh_transformer.cli.main import main

CONFIG = """
[model]
preset = "gpt-j-tiny"
[data]
train = "data/tiny.index"
validation = { held_out = "data/tiny.val.index" }
sequence_length = 32
[train]
steps = 4
batch_size = 4
learning_rate = 1e-2
validate_every = 2
checkpoint_every = 2
[mesh]
data = 1
[log]
directory = "runs"
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


class Command:
    """`mesh-transformer ARGUMENTS`, called here (fast) or started (real)."""

    def __init__(self, cache: Path) -> None:
        ours = {"JAX_PLATFORMS": "cpu", "MESH_TRANSFORMER_CACHE": str(cache)}
        self.environment = {**os.environ, **ours, **quickly.variables()}

    def call(self, *arguments: object) -> Ended:
        """In this process."""
        patch, out, err = pytest.MonkeyPatch(), io.StringIO(), io.StringIO()
        try:
            patch.setattr(sys, "argv", ["mesh-transformer", *map(str, arguments)])
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            # Settings of a whole process are not for the one that runs the tests.
            patch.setattr(compat, "prepare_process", lambda: None)
            patch.setattr(compat, "use_compile_cache", lambda: None)
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            patch.undo()
        return Ended(int(ended.value.code or 0), out.getvalue(), err.getvalue())

    def start(self, *arguments: object, **options: Any) -> Ended:
        """In a process of its own, whose standard input is empty."""
        line = [sys.executable, "-m", "mesh_transformer", *map(str, arguments)]
        options = {"stdin": subprocess.DEVNULL, "env": self.environment, "timeout": 300, **options}
        done = subprocess.run(line, capture_output=True, text=True, check=False, **options)
        return Ended(done.returncode, done.stdout, done.stderr)


@dataclasses.dataclass(frozen=True)
class Place:
    """A directory with text, data, configuration and run of a tiny model, and how its making ended."""

    path: Path
    prepared: Ended
    trained: Ended

    @property
    def config(self) -> Path:
        return self.path / "tiny.toml"

    @property
    def index(self) -> Path:
        return self.path / "data" / "tiny.index"

    @property
    def run(self) -> Path:
        return self.path / "runs" / "tiny"


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    """Everything under a path, but for the lock and the kept offsets, which may be made at any time."""

    def take(path: Path) -> dict[str, bytes | None]:
        found = (p for p in path.rglob("*") if p.name != ".lock" and p.suffix != ".offsets")
        return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in found}

    return take


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """See `Command`."""
    return Command(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Place:
    """prepare and train at the size of a test: 4 steps, checkpoints 2 and 4. To be read only."""
    path = tmp_path_factory.mktemp("tiny")
    words = random.Random(0)
    lines = (" ".join(words.choices(["the", "cat", "sat", "on", "a", "mat", "and", "dogs"], k=9)) for _ in range(300))
    (path / "text.txt").write_text("<|endoftext|>".join(lines), encoding="utf-8")
    prepared = command.call(
        "prepare", path / "text.txt", "--out", path / "data" / "tiny", "--tokenizer", "bytes",
        "--sequence-length", 32, "--validation-fraction", 0.1,
    )  # fmt: skip
    assert prepared.status == 0, prepared.err
    (path / "tiny.toml").write_text(CONFIG, encoding="utf-8")
    # A relative path, a process of its own: as a user does it.
    trained = command.start("train", "tiny.toml", cwd=path)
    assert trained.status == 0, trained.err
    return Place(path, prepared, trained)
