"""Reading checkpoints: find them, check them, restore from them. Nothing here writes or deletes.

One checkpoint is a directory, usually `RUN/checkpoints/STEP/`, that is complete in itself:

    state/            the arrays (Orbax, OCDBT), a nested dict; "params" is the parameter table's tree
    checkpoint.json   format, version, project_version, jax_version, step, model (every field of the architecture),
                      arrays (name -> shape and dtype), and what the writer added: data position, tokenizer record
    ...               the tokenizer's files
    manifest.json     sha256 and size of all of these; written last, so that its presence means complete
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.checkpoint import arrays
from mesh_transformer.checkpoint.manifest import MANIFEST, verify
from mesh_transformer.config.checks import shown
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.model import ModelConfig, differing_fields
from mesh_transformer.shapes import Params

CHECKPOINT_FILE = "checkpoint.json"
STATE = "state"
CHECKPOINTS = "checkpoints"
FORMAT = "mesh-transformer checkpoint"
VERSION = 1

_STEP = re.compile(r"0|[1-9][0-9]*")
# The step's former directory while a new one is put in its place; whole, and the step itself if that is not there yet.
_REPLACED = re.compile(r"\.(0|[1-9][0-9]*)\.old-[0-9]+")
_MOST_NAMED = 3  # names that a message lists

_log = logging.getLogger(__name__)


def step_directories(checkpoints: Path) -> dict[int, Path]:
    """Step -> directory, ascending, of everything that is named as a step, complete or not."""
    found: dict[int, Path] = {}
    replaced: dict[int, Path] = {}
    for entry in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []:
        if _STEP.fullmatch(entry.name) and entry.is_dir():
            found[int(entry.name)] = entry
        elif match := _REPLACED.fullmatch(entry.name):
            replaced[int(match[1])] = entry
    return dict(sorted((replaced | found).items()))


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps that have a manifest, ascending; their files are not checked."""
    return [step for step, path in step_directories(checkpoints).items() if (path / MANIFEST).is_file()]


def newest_intact(checkpoints: Path, report: Callable[[str], None]) -> int | None:
    """The newest step whose files all are as its manifest says; None if there is none.

    Every newer one is passed over, with one call of `report` that names the file and what is wrong with it.
    """
    for step, path in reversed(step_directories(checkpoints).items()):
        try:
            verify(path)
        except CheckpointError as error:
            report(f"{error}; checkpoint {step} is passed over")
        else:
            return step
    return None


def looks_native(path: str | os.PathLike[str]) -> bool:
    """Whether `open_native` should be asked: a run directory, its checkpoints directory or one checkpoint."""
    path = Path(path)
    return _is_step(path) or bool(step_directories(_checkpoints_of(path)))


def open_native(
    path: str | os.PathLike[str], step: int | None = None, report: Callable[[str], None] = _log.warning
) -> tuple[Path, dict[str, Any]]:
    """Finds and verifies one checkpoint; returns its directory and its metadata.

    Args:
        path: a run directory, its checkpoints directory, or the directory of one checkpoint.
        step: the step wanted; None for the newest that is intact.
        report: called with one line for each newer checkpoint that is damaged and passed over.

    Raises:
        CheckpointError: no such path, no such step, nothing intact, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or directory")
    if _is_step(path):
        verify(path)
        metadata = read_metadata(path)
        if step is not None and metadata["step"] != step:
            raise CheckpointError(f"{path}: holds step {metadata['step']}, not {step}; give its run directory instead")
        return path, metadata
    checkpoints = _checkpoints_of(path)
    directories = step_directories(checkpoints)
    if step is not None:
        if step not in directories:
            there = ", ".join(map(str, complete_steps(checkpoints))) or "none"
            raise CheckpointError(f"{checkpoints}: there is no step {step}; steps there: {there}")
        verify(directories[step])
        return directories[step], read_metadata(directories[step])
    newest = newest_intact(checkpoints, report)
    if newest is None:
        what = f"none of its {len(directories)} checkpoints is intact" if directories else "it holds no checkpoint"
        raise CheckpointError(
            f"{path}: {what}; expected a run directory, its {CHECKPOINTS} directory or one checkpoint "
            f"(a directory with {CHECKPOINT_FILE})"
        )
    return directories[newest], read_metadata(directories[newest])


def read_metadata(step_directory: Path) -> dict[str, Any]:
    """The contents of `checkpoint.json`.

    Raises:
        CheckpointError: it is missing, damaged, or of a format that this version does not read.
    """
    path = step_directory / CHECKPOINT_FILE
    try:
        metadata = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, it is not JSON ({error})") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(f'{path}: not a checkpoint of this project; expected "format": "{FORMAT}"')
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: format version {shown(metadata.get('version'))}, written by mesh-transformer "
            f"{shown(metadata.get('project_version'))}; this one reads version {VERSION}: install that one"
        )
    if not _is_step_count(metadata.get("step")) or not _describes_arrays(metadata.get("arrays")):
        raise CheckpointError(f"{path}: damaged, its step or its arrays are not as a checkpoint describes them")
    return metadata


def _is_step_count(step: Any) -> bool:
    return type(step) is int and step >= 0


def _describes_arrays(arrays: Any) -> bool:
    """Whether it is {name: {"shape": [n, ...], "dtype": name}}."""
    return isinstance(arrays, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and isinstance(entry.get("shape"), list)
        and all(type(n) is int for n in entry["shape"])
        for entry in arrays.values()
    )


def stored_model(metadata: Mapping[str, Any], where: Path) -> ModelConfig:
    """The architecture that `metadata` records; `where` is for the message.

    Raises:
        CheckpointError: the record cannot be understood.
    """
    try:
        return ModelConfig(**metadata["model"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{where / CHECKPOINT_FILE}: its model cannot be understood ({error}); "
            f"it was written by mesh-transformer {shown(metadata.get('project_version'))}"
        ) from error


def check_model(metadata: Mapping[str, Any], model: ModelConfig, where: Path, ignore: tuple[str, ...] = ()) -> None:
    """Returns if the checkpoint is of architecture `model`, fields in `ignore` aside.

    Raises:
        CheckpointError: it is not; the message lists the fields that differ, with both values.
    """
    differing = differing_fields(stored_model(metadata, where), model, ignore)
    if differing:
        fields = "; ".join(f"{name} is {there!r} there, {here!r} here" for name, (there, here) in differing.items())
        raise CheckpointError(
            f"{where}: the checkpoint is of another architecture: {fields}\n"
            "Put the checkpoint's values under [model], or begin a run of its own with another name."
        )


def restore_state(step_directory: Path, abstract_state: Any, *, model: ModelConfig | None = None) -> Any:
    """The whole state: arrays in the structure, dtypes and shardings of `abstract_state`.

    Args:
        abstract_state: a pytree of jax.ShapeDtypeStruct; a leaf without a sharding goes to the first local device.
        model: if given, the architecture that the checkpoint must have.

    Raises:
        CheckpointError: another architecture, other arrays than asked for, or unreadable.
    """
    return _restore(step_directory, abstract_state, model, whole=True)


def restore_params(step_directory: Path, abstract_params: Params, *, model: ModelConfig | None = None) -> Params:
    """The parameters alone, or the part of them that `abstract_params` names; nothing else is read.

    Args, Raises: as `restore_state`.
    """
    return _restore(step_directory, {"params": abstract_params}, model, whole=False)["params"]


def stored_params(metadata: Mapping[str, Any]) -> Params:
    """Shapes and dtypes of the parameters as they are stored: what `restore_params` reads without a conversion."""
    params: Params = {}
    for name, entry in metadata["arrays"].items():
        first, *keys = name.split("/")
        if first == "params":
            node = params
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            node[keys[-1]] = jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))
    return params


def _restore(step_directory: Path, abstract: Any, model: ModelConfig | None, whole: bool) -> Any:
    metadata = read_metadata(step_directory)
    if model is not None:
        check_model(metadata, model, step_directory)
    wanted, there = arrays.describe(abstract), metadata["arrays"]
    faults = {
        "lacks": [name for name in wanted if name not in there],
        "has beside them": [name for name in there if name not in wanted] if whole else [],
        "has in another shape": [
            f"{name} {tuple(there[name]['shape'])} instead of {tuple(entry['shape'])}"
            for name, entry in wanted.items()
            if name in there and there[name]["shape"] != entry["shape"]
        ],
    }
    if any(faults.values()):
        text = "; ".join(f"it {what} {_some(names)}" for what, names in faults.items() if names)
        raise CheckpointError(f"{step_directory}: not the arrays that were asked for: {text}")
    return arrays.read(step_directory / STATE, abstract)


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _is_step(path: Path) -> bool:
    return (path / CHECKPOINT_FILE).is_file() or (path / MANIFEST).is_file()


def _checkpoints_of(path: Path) -> Path:
    inner = path / CHECKPOINTS
    return inner if inner.is_dir() else path
