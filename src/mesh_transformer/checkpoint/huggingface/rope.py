"""Rotary fields of config.json: rope_theta and rope_scaling of transformers 4, rope_parameters of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.rope import READ_BY, RopeScaling

_ORIGINAL = "original_max_position_embeddings"
_BESIDE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL)


def read_rope(given: Mapping[str, Any], theta: Any, n_ctx: Any) -> dict[str, Any]:
    """Our fields `rope_theta` and `rope_scaling` for the rope_parameters or rope_scaling of a config.json.

    theta: of the configuration, where `given` has none; n_ctx: the context, to which dynamic scaling refers.

    Raises:
        ConfigError: a law or one of its numbers is not known.
    """
    kind = given.get("rope_type", given.get("type", "default"))
    fields: dict[str, Any] = {"rope_theta": given.get("rope_theta", theta)}
    if kind == "default":
        return fields
    if kind not in READ_BY:
        raise ConfigError(f"rope_type is {kind!r:.80}; expected default, {', '.join(READ_BY)}")
    numbers = ("factor", *READ_BY[kind])  # fields of `RopeScaling`, which has their names
    known = {*numbers, *_BESIDE, *(("mscale", "mscale_all_dim") if kind == "yarn" else ())}
    for key, value in given.items():
        if key not in known and value is not None:
            raise ConfigError(f"{key} of rope_type {kind!r} is not known; it may change the angles")
        if value is not None and key not in ("rope_type", "type") and not isinstance(value, int | float):
            raise ConfigError(f"{key} of rope_type {kind!r} is {value!r:.80}; expected a number")
    scaling = {name: given[name] for name in numbers if given.get(name) is not None}
    scaling["kind"] = kind
    if kind == "yarn" and given.get("factor") is None and given.get(_ORIGINAL) and n_ctx:
        scaling["factor"] = n_ctx / given[_ORIGINAL]
    if "factor" not in scaling:
        raise ConfigError(f"rope_type {kind!r} lacks factor")
    if kind == "dynamic":
        scaling["original_ctx"] = n_ctx
    elif kind != "linear":
        scaling["original_ctx"] = given.get(_ORIGINAL) or n_ctx
    if kind == "yarn" and "attention_factor" not in scaling and given.get("mscale") and given.get("mscale_all_dim"):
        over, under = (_mscale(scaling["factor"], given[name]) for name in ("mscale", "mscale_all_dim"))
        scaling["attention_factor"] = over / under
    return fields | {"rope_scaling": scaling}


def _mscale(factor: float, share: float) -> float:
    return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(cfg: ModelConfig, *, partial: float | None = None) -> dict[str, Any]:
    """rope_theta, rope_scaling and rope_parameters of a configuration.

    partial: the share of a head that is turned, where the family has it among its rotary numbers.

    Raises:
        ConfigError: the scaling is one that config.json cannot say.
    """
    scaling = cfg.rope_scaling
    own = {} if scaling is None else _scaling_document(scaling, cfg)
    share = {} if partial is None else {"partial_rotary_factor": partial}
    return {
        "rope_theta": cfg.rope_theta,
        "rope_scaling": own or None,
        "rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default", **share, **own},
    }


def _scaling_document(scaling: RopeScaling, cfg: ModelConfig) -> dict[str, Any]:
    if scaling.kind == "dynamic" and scaling.original_ctx != cfg.n_ctx:
        raise ConfigError(
            f"model.rope_scaling.original_ctx = {scaling.original_ctx} is not model.n_ctx = {cfg.n_ctx}: config.json "
            "has no word for dynamic scaling to a fixed length; keep this model in the native format"
        )
    numbers = {name: getattr(scaling, name) for name in ("factor", *READ_BY[scaling.kind])}
    if scaling.kind == "yarn" and not scaling.attention_factor:
        del numbers["attention_factor"]
    if scaling.kind in ("llama3", "yarn"):
        numbers[_ORIGINAL] = scaling.original_ctx
    return {"rope_type": scaling.kind, **numbers}
