"""Finding the original's checkpoints: step directories, model directories, archives, and their configuration."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.checkpoint.certificate import CERTIFICATE
from mesh_transformer.checkpoint.legacy import v2
from mesh_transformer.checkpoint.legacy.archive import ArchiveFiles, looks_archive
from mesh_transformer.checkpoint.legacy.files import DirectoryFiles, has_shards
from mesh_transformer.checkpoint.legacy.v1 import LegacyWeights
from mesh_transformer.checkpoint.legacy.v1_writer import config_document
from mesh_transformer.checkpoint.weights import Weights
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.load import model_config_from_dict, read_config_file

META = "meta.json"
CONFIG = "config.json"
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
# What tells the original's configuration from other JSON.
_CONFIG_KEYS = {"layers", "d_model"}


def looks_legacy(path: Path) -> bool:
    """Whether the path is a step directory, a directory of those, or an archive."""
    return looks_archive(path) or _is_step(path) or bool(_steps(path)) or _is_model_meta(path)


def open_legacy(path: Path, step: int | None = None, config: str | None = None) -> Weights:
    """Opens one checkpoint of the original's, v1 or v2.

    Args:
        path: a step directory; a model directory, of which the last step in meta.json is taken, or `step`; an archive.
        config: the original's JSON (some keys of it are enough for v1), or a TOML with [model]; by default what lies
            beside or above the shards.

    Raises:
        CheckpointError: something is missing, damaged or contradictory; the file is named.
        ConfigError: `config` cannot be read.
    """
    extras: Mapping[str, Any] = {}
    if looks_archive(path):
        given, source = _configuration([path.parent], config)
        return _of_step(LegacyWeights(path, ArchiveFiles(path), given, source), step)
    if not _is_step(path):
        path, extras = _choose(path, step)
    given, source = _configuration([path, path.parent], config)
    if (path / META).is_file() and not has_shards(path):
        if source is None:
            raise CheckpointError(
                f"{path}: a v2 checkpoint does not hold its configuration, and none lies beside or above it; "
                "give the original's JSON with --config FILE"
            )
        return _of_step(v2.LegacyV2Weights(path, given, source, extras), step)
    return _of_step(LegacyWeights(path, DirectoryFiles(path), given, source, extras), step)


def _of_step(weights: Weights, step: int | None) -> Weights:
    if step is not None and weights.step != step:
        raise CheckpointError(f"{weights.where}: holds step {weights.step}, not {step}; give its model directory")
    return weights


def _is_step(path: Path) -> bool:
    return has_shards(path) or ((path / "params").is_dir() and (path / META).is_file())


def _steps(path: Path) -> dict[int, Path]:
    """Step -> directory, ascending."""
    if not path.is_dir():
        return {}
    found = {int(match[1]): entry for entry in path.iterdir() if (match := _STEP.fullmatch(entry.name))}
    return {step: entry for step, entry in sorted(found.items()) if entry.is_dir()}


def _is_model_meta(path: Path) -> bool:
    try:
        return "checkpoints" in json.loads((path / META).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _choose(path: Path, step: int | None) -> tuple[Path, Mapping[str, Any]]:
    """The directory of `step`, or of the last, and what meta.json records with it."""
    there = _steps(path)
    meta = _read_meta(path / META) if (path / META).is_file() else None
    listed = list(there) if meta is None else meta["checkpoints"]
    if step is None:
        if not listed:
            raise CheckpointError(f"{path / META}: lists no checkpoint")
        step = listed[-1]
    if step not in there:
        names = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"{path / f'step_{step}'}: missing; steps there: {names}")
    aux = {} if meta is None else meta.get("aux", {})
    extras = aux.get(str(step), {}) if isinstance(aux, dict) else {}
    return there[step], extras if isinstance(extras, dict) else {}


def _read_meta(file: Path) -> dict[str, Any]:
    try:
        meta = json.loads(file.read_bytes())
        if not all(type(step) is int for step in meta["checkpoints"]):
            raise TypeError("a step is no whole number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f'{file}: damaged, expected {{"step", "checkpoints", "aux"}}; give the step directory itself instead'
        ) from error
    return dict(meta)


def _configuration(directories: list[Path], config: str | None) -> tuple[dict[str, Any], str | None]:
    """The original's configuration keys, and the file that they are from; the nearest directory that has some."""
    if config is not None:
        return _read_given(config), os.fspath(config)
    for directory in directories:
        found: dict[Path, dict[str, Any]] = {}
        for file in sorted(directory.glob("*.json")):
            if file.name not in (META, CERTIFICATE):
                raw = _read_json(file)
                if raw is not None and raw.keys() >= _CONFIG_KEYS:
                    found[file] = raw
        if directory / CONFIG in found:
            return found[directory / CONFIG], str(directory / CONFIG)
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(f"{directory}: holds several configurations ({names}); choose one with --config FILE")
        for file, raw in found.items():
            return raw, str(file)
    return {}, None


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if file.name == CONFIG:
            raise CheckpointError(f"{file}: damaged, not JSON ({error}); copy it again, or --config FILE") from error
        return None
    return raw if isinstance(raw, dict) else None


def _read_given(config: str) -> dict[str, Any]:
    raw, is_json = read_config_file(os.fspath(config))
    if is_json:
        return raw
    try:
        if not isinstance(raw.get("model"), dict):
            raise ConfigError("has no [model]")
        cfg = model_config_from_dict(raw["model"])
        return v2.config_document(cfg) if cfg.architecture == "v2" else config_document(cfg, None)
    except ConfigError as error:
        raise ConfigError(f"{config}: {error}") from error
