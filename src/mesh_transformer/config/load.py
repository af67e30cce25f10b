"""Read a run's configuration from a file, and write the resolved one back.

TOML, or the original's flat JSON as it stands. Relative paths in a file are relative to the file; the original's and
those given with `--set` are relative to the working directory.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mesh_transformer.config import checks
from mesh_transformer.config.emit import emit_toml
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.legacy import RENAMED, from_legacy, model_section
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.overrides import parse_override, set_value
from mesh_transformer.config.run import LogConfig, RunConfig
from mesh_transformer.config.schema import model_config_from_dict, run_config_from_dict

__all__ = [
    "load_run_config",
    "model_config_from_dict",
    "model_config_from_legacy",
    "read_config_file",
    "to_toml",
]

# No configuration is longer; a data file or checkpoint given by mistake is.
_MAX_BYTES = 4 * 2**20


def load_run_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, n_devices: Callable[[], int] = lambda: 1
) -> tuple[RunConfig, list[str]]:
    """The run that a TOML file, or the original's JSON file, describes, and notes of one line to print to the user.

    `path` is local or an fsspec URL. `overrides` are `key.sub=value` (values are TOML, a bare word is a string) under
    TOML's names whatever the file is. Paths in the result are absolute. `n_devices` is asked for the number of
    devices where the file is the original's JSON, whose mesh and batch depend on it.

    Raises:
        ConfigError: the file cannot be read or parsed, or a key or value is wrong; the message begins with the file.
    """
    source = _local(os.fspath(path))
    raw, is_legacy = read_config_file(source)
    extra = [parse_override(text) for text in overrides]
    overridden = _full_names(extra)
    notes: list[str] = []
    try:
        if is_legacy:
            raw, notes = from_legacy(raw, overridden=overridden, n_devices=n_devices())
        _resolve_paths(raw, os.getcwd() if is_legacy else _parent(source))
        for key, value in extra:
            alone: dict[str, Any] = {}
            set_value(alone, key, value)
            _resolve_paths(alone, os.getcwd())
            set_value(raw, key, _get(alone, key))
        log = raw.setdefault("log", {})
        if isinstance(log, dict):
            log.setdefault("directory", _absolute(LogConfig().directory, os.getcwd()))
        config = run_config_from_dict(raw, default_name=PurePath(source).stem)
    except ConfigError as error:
        raise ConfigError(_in_context(str(error), source, overridden, is_legacy)) from error
    return config, notes


def model_config_from_legacy(raw: Mapping[str, Any]) -> ModelConfig:
    """The architecture in the original's JSON; keys that are not about the architecture are not looked at.

    Raises:
        ConfigError: a key of the architecture is missing or unusable.
    """
    try:
        return model_config_from_dict(model_section(raw))
    except ConfigError as error:
        raise ConfigError(str(error) + _original_names(str(error), ())) from error


def to_toml(config: RunConfig) -> str:
    """The whole configuration as TOML, paths absolute; `load_run_config` reads an equal one back."""
    nested: dict[str, Any] = {
        "name": config.name,
        "seed": config.seed,
        "model": config.model.to_dict(),
        "data": dict(vars(config.data)),
        "train": dict(vars(config.train)),
        **({"lora": dict(vars(config.lora))} if config.lora else {}),
        "mesh": dict(vars(config.mesh)),
        "evaluate": dict(vars(config.evaluate)),
        "log": dict(vars(config.log)),
    }
    _resolve_paths(nested, os.getcwd())
    return emit_toml(nested)


def read_config_file(path: str) -> tuple[dict[str, Any], bool]:
    """What a TOML or JSON file holds, unchecked, and whether it is JSON (the original's form).

    Raises:
        ConfigError: the file is missing, unreadable, too long, not UTF-8 or malformed; the message gives the line.
    """
    content = _read(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: byte {error.start} is not UTF-8; expected a text file") from error
    is_json = path.endswith(".json") or text.lstrip().startswith("{")
    try:
        raw = json.loads(text, object_pairs_hook=_no_duplicates) if is_json else tomllib.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{path}, {where}: not valid JSON: {error.msg}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}{_toml_place(str(error), text)}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of brackets
        raise ConfigError(f"{path}: not a configuration: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f'{path}: holds no keys but one {checks.type_name(raw)}; expected {{"layers": 28, ...}}')
    return raw, is_json


def _toml_place(message: str, text: str) -> str:
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if not found:
        return f": not valid TOML: {message}"
    problem, line, column = found.groups()
    place = f"line {line}, column {column}" if line else f"line {text.count(chr(10)) + 1}, at the end"
    return f", {place}: not valid TOML: {problem}"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ConfigError(f"{checks.dotted(key)} stands twice; remove one")
        result[key] = value
    return result


def _read(path: str) -> bytes:
    try:
        if "://" in path:
            import fsspec  # only where needed: it is slow to import

            with fsspec.open(path, "rb") as file:
                content = file.read(_MAX_BYTES + 1)
        else:
            with open(path, "rb") as file:
                content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file; expected a configuration in TOML or JSON") from error
    except IsADirectoryError as error:
        inside = os.path.join(path, "config.toml")
        mend = f"did you mean {inside}?" if os.path.isfile(inside) else "expected a configuration in TOML or JSON"
        raise ConfigError(f"{path}: is a directory; {mend}") from error
    except Exception as error:  # each remote file system raises its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{checks.shown(path)}: cannot be read: {reason}") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path}: is longer than {_MAX_BYTES >> 20} MiB; expected a configuration in TOML or JSON")
    return content


def _local(path: str) -> str:
    return os.path.expanduser(path.removeprefix("file://"))


def _parent(source: str) -> str:
    return source.rpartition("/")[0] if "://" in source else os.path.dirname(os.path.abspath(source))


def _absolute(path: str, base: str) -> str:
    path = _local(path)
    if not path or "://" in path or os.path.isabs(path):
        return path
    return f"{base}/{path}" if "://" in base else os.path.abspath(os.path.join(base, path))


def _resolve_paths(nested: dict[str, Any], base: str) -> None:
    """Make the paths in `nested` absolute; what is no string is left for the schema to refuse."""
    data, log, evaluate = nested.get("data"), nested.get("log"), nested.get("evaluate")
    if isinstance(data, dict):
        for key in ("train", "tokenizer"):
            if isinstance(data.get(key), str) and not (key == "tokenizer" and data[key] in ("gpt2", "bytes")):
                data[key] = _absolute(data[key], base)
        for key in ("train", "validation"):
            if isinstance(sets := data.get(key), dict):
                data[key] = {k: _absolute(v, base) if isinstance(v, str) else v for k, v in sets.items()}
    if isinstance(evaluate, dict) and isinstance(evaluate.get("include_path"), str):
        evaluate["include_path"] = _absolute(evaluate["include_path"], base)
    if isinstance(log, dict) and isinstance(log.get("directory"), str):
        log["directory"] = _absolute(log["directory"], base)


def _get(nested: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        nested = nested[part]
    return nested


def _full_names(extra: Sequence[tuple[tuple[str, ...], Any]]) -> list[str]:
    """Every key that the overrides set; one that sets a whole section stands for each key in it."""
    names = []
    for path, value in extra:
        inner = value if len(path) == 1 and isinstance(value, dict) else None
        names += [checks.dotted(*path, key) for key in inner] if inner else [checks.dotted(*path)]
    return names


def _in_context(message: str, source: str, overridden: Sequence[str], is_legacy: bool) -> str:
    """`message` after the file's name, and where a key that it mentions is to be found."""
    if message.startswith("--set "):
        return message
    from_flags = [name for name in overridden if _mentions(message, name)]
    flags = f" ({', '.join(from_flags)} given with --set)" if from_flags else ""
    return f"{source}: {message}{flags}{_original_names(message, overridden) if is_legacy else ''}"


def _original_names(message: str, overridden: Sequence[str]) -> str:
    pairs = [f"{full} is {key} here" for key, full in RENAMED.items() if full != key and full not in overridden]
    mentioned = [pair for pair in pairs if _mentions(message, pair.split()[0])]
    return f" ({', '.join(mentioned)})" if mentioned else ""


def _mentions(message: str, key: str) -> bool:
    if "." not in key:  # "name" is also a word
        return message.startswith(f"{key} ")
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", message) is not None
