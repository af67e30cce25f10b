"""What the shapes in a v1 checkpoint say of its architecture, and where a configuration contradicts them.

Nothing in a checkpoint names its leaves. The number of shards, layers, widths, the kind of position and of norm follow
from counts and shapes; the number of heads, the rotary dimensions and the context do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mesh_transformer.checkpoint.legacy.layout import param_leaves
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.model import ModelConfig

Shape = tuple[int, ...]

# Norms that have leaves of the same shapes are told apart by nothing; the first of each group is assumed.
_NORMS = (
    ("layernorm", "layernorm-nobias", "rmsnorm-bias"),
    ("layernorm-desync",),
    ("rmsnorm",),
    ("scalenorm-bias",),
    ("scalenorm",),
)
_POSITIONS = ("rotary", "fixed", "t5")
# GPT-J-6B, for whose shapes nothing needs to be asked.
_GPT_J_SHAPES = {"layers": 28, "d_model": 4096, "n_vocab": 50400, "pe": "rotary", "norm": "layernorm"}
_GPT_J_REST = {"n_heads": 16, "pe_rotary_dims": 64, "seq": 2048}


@dataclasses.dataclass(frozen=True)
class Found:
    """What the shapes say.

    `keys` are the original's configuration keys with the value that the shapes give; `norms` all norms that have such
    leaves; `n_shards` how many shards there should be.
    """

    keys: Mapping[str, Any]
    norms: tuple[str, ...]
    n_shards: int
    with_optimizer: bool


def infer(shapes: Sequence[Shape], is_counter: bool, where: str) -> Found:
    """The architecture that leaves of these shapes, in a shard's order, have.

    Args:
        is_counter: whether the first leaf is an integer, as in a checkpoint with optimizer state.

    Raises:
        CheckpointError: no architecture of the original has such leaves.
    """
    n = len(shapes)
    with_optimizer = is_counter and n % 3 == 0 and n > 3
    n_params = (n - 3) // 3 if with_optimizer else n - 1
    params = list(shapes[n - 1 - n_params : n - 1])
    for position in _POSITIONS:
        for norms in _NORMS:
            found = _try(params, position, norms)
            if found is not None:
                return Found(*found, with_optimizer)
    raise CheckpointError(
        f"{where}: {n} arrays to a shard, the first of shape {shapes[0] if shapes else None}: no architecture of the "
        "original has such; files are missing or mixed up, or it is no v1 checkpoint"
    )


def _try(
    params: list[Shape], position: str, norms: tuple[str, ...]
) -> tuple[dict[str, Any], tuple[str, ...], int] | None:
    per_norm = 1 if norms[0] in ("rmsnorm", "scalenorm") else 2
    beside = 4 + per_norm + (position != "rotary")  # in embedding and head
    n_layers, rest = divmod(len(params) - beside, 8 + per_norm)
    if rest or n_layers < 1:
        return None
    first = 1 if position == "fixed" else 0
    if len(params[first]) != 1 or len(params[first + 1]) != 2:
        return None
    (d_model,), (rows, width) = params[first], params[first + 1]
    # The first matrix after the embedding is q, unless each shard's own norm comes first.
    q = params[first + 2 + (2 if norms[0] == "layernorm-desync" else 0)]
    if width != d_model or len(q) != 2 or q[0] != d_model or not q[1] or d_model % q[1]:
        return None
    n_shards = d_model // q[1]
    keys: dict[str, Any] = {"layers": n_layers, "d_model": d_model, "n_vocab": rows * n_shards, "pe": position}
    heads = n_shards
    if position == "fixed":
        keys["seq"] = params[0][0] if len(params[0]) == 2 else 0
    if position == "t5":
        heads = keys["n_heads"] = (params[-1][0] if params[-1] else 0) * n_shards
    try:
        cfg = ModelConfig(
            n_layers=n_layers,
            d_model=d_model,
            n_heads=heads,
            d_head=max(2, d_model // max(1, heads)),
            n_vocab=rows * n_shards,
            n_ctx=keys.get("seq", 1),
            norm=norms[0],  # type: ignore[arg-type]
            position=position,  # type: ignore[arg-type]
            d_rotary=2 if position == "rotary" else 0,
        )
    except ConfigError:
        return None
    if d_model % heads or [leaf.shard_shape(n_shards) for leaf in param_leaves(cfg)] != params:
        return None
    return keys, norms, n_shards


def complete(
    found: Found, given: Mapping[str, Any], source: str | None, where: str
) -> tuple[dict[str, Any], list[str]]:
    """The original's configuration: what is `given`, checked against the shapes and filled in from them.

    Args:
        given: keys of a configuration file, perhaps not all; `source` is its name, None if there is none.

    Returns:
        The configuration, and a line for the user if anything was assumed.

    Raises:
        CheckpointError: a key disagrees with the shapes, or one is missing that they do not tell.
    """
    for key, value in found.keys.items():
        if key in given and given[key] != value:
            raise CheckpointError(f"{source}: {key} = {given[key]!r:.80}, but the shapes in {where} say {value!r}")
    if "norm" in given and given["norm"] not in found.norms:
        raise CheckpointError(
            f"{source}: norm = {given['norm']!r:.80}, but the arrays in {where} are those of {' or '.join(found.norms)}"
        )
    merged: dict[str, Any] = {"norm": found.norms[0], **found.keys, **given}
    assumed = {}
    if {key: merged.get(key) for key in _GPT_J_SHAPES} == _GPT_J_SHAPES:
        assumed = {key: value for key, value in _GPT_J_REST.items() if key not in merged}
        if "pe_rotary_dims" in assumed and "n_heads" in given:  # a whole configuration without it means d_head
            del assumed["pe_rotary_dims"]
    elif "n_heads" in merged and "seq" not in merged:
        assumed = {"seq": _GPT_J_REST["seq"]}
    merged |= assumed
    if "n_heads" not in merged:
        known = ", ".join(f"{key} = {value}" for key, value in found.keys.items())
        raise CheckpointError(
            f"{where}: the shapes say {known}, but not n_heads and pe_rotary_dims\n"
            "give them with --config FILE: the original's JSON, or only what is missing, such as "
            '{"n_heads": 16, "pe_rotary_dims": 64, "norm": "layernorm", "seq": 2048}'
        )
    if "norm" not in given and len(found.norms) > 1:
        assumed["norm"] = merged["norm"]
    what = "GPT-J-6B's shapes" if "n_heads" in assumed else "not told by the shapes"
    text = ", ".join(f"{key} = {value}" for key, value in assumed.items())
    return merged, [f"{where}: assumed {text} ({what}); --config FILE gives others"] if assumed else []
