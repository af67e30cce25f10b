"""What a run directory says of its run, read without opening a model."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.checkpoint.opening import complete_steps, read_metadata, step_directories
from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.config.errors import CheckpointError, UserError
from mesh_transformer.config.load import load_run_config
from mesh_transformer.config.run import RunConfig
from mesh_transformer.train.metrics import Curves, curves_of, read_metrics
from mesh_transformer.train.record import CHANGES_FILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """A run as its directory has it.

    config_text: config.toml. changes: the lines of changes.jsonl. steps: of its complete checkpoints, ascending.
    metadata: checkpoint.json of the newest; empty where there is none.
    """

    path: Path
    run: RunConfig
    config_text: str
    curves: Curves
    changes: list[dict[str, Any]]
    steps: list[int]
    metadata: Mapping[str, Any]

    @property
    def began_from(self) -> Mapping[str, Any] | None:
        """The model that the run began from, as its checkpoints record it; None for random parameters."""
        found = self.metadata.get("init_from")
        return found if isinstance(found, Mapping) else None

    @property
    def position(self) -> int:
        """Sequences that the newest checkpoint has been trained on."""
        return int(self.metadata.get("position", 0))

    @property
    def command(self) -> str:
        """What repeats the run, in a run directory of its own."""
        words = ["mesh-transformer", "train", str(self.path / "config.toml"), "--set", f"name={self.run.name}-again"]
        if self.began_from is not None:
            words += ["--init-from", str(self.began_from.get("path"))]
        return shlex.join(words)


def read_facts(path: str | Path) -> Facts:
    """Reads a run directory.

    Raises:
        UserError: it is none.
        ConfigError: its config.toml is damaged.
    """
    directory = RunDirectory(Path(path).absolute())
    if not directory.config.is_file():
        raise UserError(
            f"{path}: not a run directory, it has no config.toml\ngive the directory that `mesh-transformer train` "
            "wrote: <log.directory>/<name>"
        )
    run, _ = load_run_config(directory.config)
    steps = complete_steps(directory.checkpoints)
    changes = directory.path / CHANGES_FILE
    return Facts(
        path=directory.path,
        run=run,
        config_text=directory.config.read_text(encoding="utf-8"),
        curves=curves_of(read_metrics(directory.metrics)),
        changes=[json.loads(line) for line in changes.read_text().splitlines()] if changes.exists() else [],
        steps=steps,
        metadata=_metadata(directory, steps),
    )


def _metadata(directory: RunDirectory, steps: list[int]) -> Mapping[str, Any]:
    if not steps:
        return {}
    try:
        return read_metadata(step_directories(directory.checkpoints)[steps[-1]])
    except CheckpointError:
        return {}  # opening the model, which comes later, says what is wrong with it


@dataclasses.dataclass(frozen=True)
class Base:
    """What the run is compared with: a model and its step, or why there is none. `name` is for the reader."""

    name: str
    path: str | None = None
    step: int | None = None


def choose_base(facts: Facts, given: str | None) -> Base:
    """The model given, else the one that the run began from, else its earliest checkpoint that is kept."""
    if given is not None:
        return Base(given, given)
    began = facts.began_from
    if began is not None:
        path, step = str(began.get("path")), began.get("step")
        return Base(f"{path}, which the run began from", path, _step_to_open(Path(path), step))
    if len(facts.steps) > 1:
        first = facts.steps[0]
        return Base(f"checkpoint {first}, the earliest that the run has kept", str(facts.path), first)
    return Base("the run began from random parameters and has kept no earlier checkpoint; give --base MODEL")


def _step_to_open(path: Path, step: Any) -> int | None:
    """None where the recorded path is the checkpoint or the model itself, which no step chooses from."""
    return step if isinstance(step, int) and (path / "checkpoints").is_dir() else None
