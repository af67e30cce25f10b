"""What a run directory holds of the run's configuration, and clearing away a whole earlier run."""

from __future__ import annotations

import json
import shutil
import tomllib
from typing import Any

from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.load import to_toml
from mesh_transformer.config.run import RunConfig
from mesh_transformer.files import write_atomically
from mesh_transformer.train.profile import PROFILE
from mesh_transformer.train.recorder import TENSORBOARD
from mesh_transformer.train.wandb import ID_FILE as WANDB_ID

CHANGES_FILE = "changes.jsonl"


def record_configuration(run: RunConfig, directory: RunDirectory, step: int) -> None:
    """Writes config.toml; what differs from the one that was there is kept in changes.jsonl, with the step."""
    text = to_toml(run)
    try:
        before = tomllib.loads(directory.config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        before = None
    except ValueError as error:  # not TOML, not UTF-8
        raise ConfigError(
            f"{directory.config}: the record of this run's configuration is damaged ({error})\n"
            "delete that file; it is written anew from the configuration that you give"
        ) from error
    if before is not None:
        old, new = _flat(before), _flat(tomllib.loads(text))
        changed = {k: [old.get(k), new.get(k)] for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}
        if changed and step:
            with (directory.path / CHANGES_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "changed": changed}) + "\n")
    write_atomically(directory.config, text.encode())


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def clear(directory: RunDirectory) -> None:
    """Removes what a run writes, and nothing else that may lie there."""
    for tree in (directory.checkpoints, directory.path / TENSORBOARD, directory.path / PROFILE):
        if tree.exists():
            shutil.rmtree(tree)
    for path in (
        directory.metrics,
        directory.config,
        directory.loss_plot,
        directory.samples,
        directory.path / CHANGES_FILE,
        directory.path / WANDB_ID,
    ):
        path.unlink(missing_ok=True)
