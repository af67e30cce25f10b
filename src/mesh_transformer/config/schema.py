"""From a plain nested dict, as TOML or JSON give it, to the configuration dataclasses.

Everything that can be wrong with the dict itself is found here: keys that do not exist, keys that are missing, values
of the wrong type. Whether a value makes sense is each dataclass's own affair.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mesh_transformer.config import checks
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.legacy import RENAMED
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import DataConfig, LogConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.config.tuning import EvaluateConfig, LoraConfig

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "lora": LoraConfig,
    "mesh": MeshConfig,
    "evaluate": EvaluateConfig,
    "log": LogConfig,
}
# What a section may hold beside its dataclass's fields.
_MORE_KEYS: dict[str, dict[str, Any]] = {"model": {"preset": str}}
_EXAMPLES = {
    "data.train": '"data/pile.train.index"',
    "data.validation": '{ pile = "data/pile.val.index" }',
    "data.tokenizer": '"gpt2"',
    "data.weights": "{ pile = 0.7, code = 0.3 }",
    "train.steps": "1000",
    "lora.targets": '["q", "v"]',
    "model.biases": '["embed", "mlp", "head"]',
    "model.rope_scaling": '{ kind = "linear", factor = 2.0 }',
    "train.compute_dtype": '"bfloat16"',
    "train.remat": '"full"',
    "model.preset": '"gpt-j-6b"',
    "evaluate.tasks": '["lambada_openai"]',
    "log.directory": '"runs"',
    "name": '"my-run"',
}


def run_config_from_dict(raw: Mapping[str, Any], *, default_name: str | None = None) -> RunConfig:
    """The run that a nested dict of sections describes, defaults filled in.

    `default_name` is the run's name where `raw` gives none.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type, or a value is
            impossible.
    """
    _check_sections(raw)
    _check_known(raw)
    if default_name is not None:
        raw = {"name": default_name, **raw}
    _check_complete(raw)
    top = {name: _convert(name, raw[name], str if name == "name" else int) for name in ("name", "seed") if name in raw}
    sections = {name: _convert_section(name, raw.get(name, {})) for name in SECTIONS}
    model = _build_model(sections["model"])
    sections["data"].setdefault("sequence_length", model.n_ctx)
    return RunConfig(
        **top,
        model=model,
        data=DataConfig(**sections["data"]),
        train=TrainConfig(**sections["train"]),
        mesh=MeshConfig(**sections["mesh"]),
        lora=LoraConfig(**sections["lora"]) if "lora" in raw else None,
        evaluate=EvaluateConfig(**sections["evaluate"]),
        log=LogConfig(**sections["log"]),
    )


def model_config_from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a `[model]` section, or `ModelConfig.to_dict`, describes.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type, or a value is
            impossible.
    """
    nested = {"model": raw}
    _check_sections(nested)
    _check_known(nested)
    if missing := _missing_model_keys(raw):
        raise ConfigError(f"missing: {', '.join(missing)}")
    return _build_model(_convert_section("model", raw))


def _build_model(given: Mapping[str, Any]) -> ModelConfig:
    fields = {name: value for name, value in given.items() if name != "preset"}
    if fields.get("n_shards"):  # no other architecture has any
        fields.setdefault("architecture", "v2")
    if "preset" not in given:
        return ModelConfig(**fields)
    named = preset(given["preset"])
    base = {field.name: getattr(named, field.name) for field in dataclasses.fields(named)}
    # A preset's derived sizes follow the fields that they derive from, unless they are given as well.
    if fields.keys() & {"d_model", "n_heads"}:
        base |= {"d_head": 0, "n_kv_heads": 0}
        if named.d_rotary == named.d_head:  # whole heads are turned
            base["d_rotary"] = 0
    if "d_model" in fields:
        base["d_ff"] = 0
    if fields.get("architecture", base["architecture"]) != base["architecture"]:
        del base["feed_forward"], base["n_shards"]
    return ModelConfig(**{**base, **fields})


@functools.cache
def _hints(section: str) -> dict[str, Any]:
    """Type of every key of a section."""
    fields = get_type_hints(SECTIONS[section]) if section in SECTIONS else {}
    return {**_MORE_KEYS.get(section, {}), **fields}


def _known_keys() -> list[str]:
    sections = [*SECTIONS, *(name for name in _MORE_KEYS if name not in SECTIONS)]
    return ["name", "seed", *(f"{section}.{key}" for section in sections for key in _hints(section))]


def _check_sections(raw: Mapping[str, Any]) -> None:
    for section in [*SECTIONS, *_MORE_KEYS]:
        if section in raw and not isinstance(raw[section], Mapping):
            checks.check_type(section, raw[section], "table", f"a section [{section}] with keys of its own")


def _leaves(raw: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Path of every key, as far down as sections go."""
    known = {*SECTIONS, *_MORE_KEYS}
    return [path for name in raw for path in ([(name, key) for key in raw[name]] if name in known else [(name,)])]


def _check_known(raw: Mapping[str, Any]) -> None:
    known = _known_keys()
    unknown = [path for path in _leaves(raw) if checks.dotted(*path) not in known]
    if not unknown:
        return
    described = [f"{checks.dotted(*path)} ({_suggestion(path, known, raw)})" for path in unknown[:4]]
    more = f", and {len(unknown) - 4} more" if len(unknown) > 4 else ""
    raise ConfigError(f"unknown {'key' if len(unknown) == 1 else 'keys'} {', '.join(described)}{more}")


def _suggestion(path: tuple[str, ...], known: list[str], raw: Mapping[str, Any]) -> str:
    key = path[-1]
    by_last_part = {full.split(".")[-1]: full for full in known}
    if len(path) == 1 and isinstance(raw[key], Mapping):  # a section
        sections = sorted({full.split(".")[0] for full in known if "." in full})
        close = checks.nearest(key, sections)
        return f"did you mean [{close}]?" if close else f"the sections are {', '.join(sections)}"
    in_section = [full for full in known if len(path) == 2 and full.startswith(f"{path[0]}.")]
    close = checks.nearest(key, [full.split(".")[-1] for full in in_section])
    if close:
        return f"did you mean {path[0]}.{close}?"
    if len(path) == 2 and key in ("name", "seed"):
        return f"{key} stands above the first section"
    if key in RENAMED:
        return f"here it is {RENAMED[key]}"
    close = checks.nearest(key, by_last_part)
    if close:
        return f"did you mean {by_last_part[close]}?"
    keys = [full.split(".")[-1] for full in in_section] or ["name", "seed", *(f"[{name}]" for name in SECTIONS)]
    return f"known here: {', '.join(keys)}"


def _required(section: type) -> list[str]:
    no_default = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(section) if f.default is no_default and f.default_factory is no_default]


def _missing_model_keys(model: Mapping[str, Any]) -> list[str]:
    if "preset" in model:
        return []
    missing = [f"model.{name}" for name in _required(ModelConfig) if name not in model]
    if len(missing) == len(_required(ModelConfig)):
        return [f'model.preset (such as "gpt-j-6b"; or every one of {", ".join(missing)})']
    return missing


def _check_complete(raw: Mapping[str, Any]) -> None:
    missing = [] if "name" in raw else ["name"]
    missing += _missing_model_keys(raw.get("model", {}))
    for section in ("data", "train", *(["lora"] if "lora" in raw else [])):
        given = {"sequence_length", *raw.get(section, {})}  # the one default that comes from another section
        if section == "train" and not given & {"steps", "epochs"}:
            missing.append("train.steps (or train.epochs)")
        missing += [f"{section}.{name}" for name in _required(SECTIONS[section]) if name not in given]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}")


def _convert_section(section: str, given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _convert(f"{section}.{key}", value, _hints(section)[key]) for key, value in given.items()}


def _convert_table(key: str, given: Mapping[str, Any], table: Any) -> Any:
    """A table within a section as the dataclass that a field declares."""
    hints = get_type_hints(table)
    for name in given:
        if name not in hints:
            close = checks.nearest(name, list(hints))
            hint = f"did you mean {key}.{close}?" if close else f"known here: {', '.join(hints)}"
            raise ConfigError(f"unknown key {key}.{name} ({hint})")
    if missing := [name for name in _required(table) if name not in given]:
        raise ConfigError(f"missing: {', '.join(f'{key}.{name}' for name in missing)}")
    return table(**{name: _convert(f"{key}.{name}", value, hints[name]) for name, value in given.items()})


def _convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type that a field declares; an integer becomes a float where a float is declared."""
    if get_origin(hint) in (types.UnionType, Union):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        # Where a table may stand in place of a text, it is looked at as such.
        hint = arms[-1] if len(arms) > 1 and isinstance(value, Mapping) else arms[0]
    if get_origin(hint) is Literal:
        hint = type(get_args(hint)[0])
    example = _EXAMPLES.get(key, "")
    if hint is float:
        if type(value) is int and value.bit_length() <= 1000:
            return float(value)
        checks.check_type(key, value, "number", example)
    elif get_origin(hint) is Mapping:
        if key == "data.validation" and isinstance(value, str):
            example = f"{{ validation = {checks.shown(value)} }}"
        checks.check_type(key, value, "table", example)
        of_entry = get_args(hint)[1]
        if of_entry is float:
            return {name: _convert(checks.dotted(*key.split("."), name), entry, float) for name, entry in value.items()}
        for name, entry in value.items():
            checks.check_type(checks.dotted(*key.split("."), name), entry, "string", _EXAMPLES["data.train"])
    elif dataclasses.is_dataclass(hint):
        checks.check_type(key, value, "table", example)
        return _convert_table(key, value, hint)
    elif get_origin(hint) is tuple:
        return checks.check_texts(key, value, example)
    else:
        names = {int: "integer", str: "string", bool: "boolean"}
        checks.check_type(key, value, names[hint], example)
    return value
