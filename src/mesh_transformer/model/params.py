"""The only place where a parameter is declared.

`param_table` gives every parameter its logical axes and its initialisation; shapes, shardings, the weight decay mask,
byte counts, checkpoint names and foreign layouts are all derived from it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.shapes import Array, Params


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape is `cfg.axis_sizes[axis]` for each of `axes`.

    `std` is the width of the truncated normal that it starts from; None means a constant, `fill`: biases and norm
    parameters. `inputs` names the axes that a product contracts, in order: it tells a matrix from a vector and which
    way round foreign formats store it.
    """

    axes: tuple[str, ...]
    std: float | None = None
    fill: float = 0.0
    inputs: tuple[str, ...] = ()


Table = dict[str, Any]  # a nested dict whose leaves are ParamSpec


def param_table(cfg: ModelConfig) -> Table:
    """Every parameter of the architecture, as a nested dict of `ParamSpec`.

    Standard deviations follow the original: embedding 1/sqrt(n_vocab), input projections and head 1/sqrt(d_model),
    both output projections (2 / n_layers) / sqrt(d_model), position tables 0.02 (docs/formats.md, section 6). v2 adds
    biases to q, k and v, and the gate of its feed-forward, of which `w_in` is the linear half. A token table that is
    also the head begins at 0.02, as GPT-2's.
    """
    per_input = 1 / math.sqrt(cfg.d_model)
    per_output = 2 / cfg.n_layers / math.sqrt(cfg.d_model)
    heads_in = ParamSpec(("layers", "embed", "heads", "head_dim"), std=per_input, inputs=("embed",))
    kv_heads_in = dataclasses.replace(heads_in, axes=("layers", "embed", "kv_heads", "head_dim"))
    table: Table = {
        "embed": {
            "tokens": ParamSpec(
                ("vocab", "embed"), std=0.02 if cfg.tied_head else 1 / math.sqrt(cfg.n_vocab), inputs=("vocab",)
            ),
        },
        "layers": {
            "ln_1": _norm(cfg, "layers"),
            "attn": {
                "q": heads_in,
                "k": kv_heads_in,
                "v": kv_heads_in,
                "o": ParamSpec(("layers", "heads", "head_dim", "embed"), std=per_output, inputs=("heads", "head_dim")),
            },
            "mlp": {
                "w_in": ParamSpec(("layers", "embed", "mlp"), std=per_input, inputs=("embed",)),
                "w_out": ParamSpec(("layers", "mlp", "embed"), std=per_output, inputs=("mlp",)),
            },
        },
        "head": {"ln": _norm(cfg)},
    }
    attn, mlp = table["layers"]["attn"], table["layers"]["mlp"]
    if cfg.residual != "parallel":
        table["layers"]["ln_2"] = _norm(cfg, "layers")
    if cfg.qk_norm:
        attn |= {name: {"scale": ParamSpec(("layers", "head_dim"), fill=1.0)} for name in ("q_norm", "k_norm")}
    if cfg.feed_forward.startswith("glu_"):
        mlp["w_gate"] = mlp["w_in"]
    if not cfg.tied_head:
        table["head"]["w"] = ParamSpec(("embed", "vocab"), std=per_input, inputs=("embed",))
    _add_biases(table, cfg)
    if cfg.position == "fixed":
        table["embed"]["positions"] = ParamSpec(("ctx", "embed"), std=0.02, inputs=("ctx",))
    if cfg.position == "t5":
        # One table shared by all layers.
        table["relative"] = {"bias": ParamSpec(("heads", "buckets"), std=0.02, inputs=("buckets",))}
    return table


def _add_biases(table: Table, cfg: ModelConfig) -> None:
    attn, mlp = table["layers"]["attn"], table["layers"]["mlp"]
    if "embed" in cfg.biases:
        table["embed"]["bias"] = ParamSpec(("embed",))
    if "qkv" in cfg.biases or cfg.architecture == "v2":
        kv_heads = ParamSpec(("layers", "kv_heads", "head_dim"))
        attn |= {"b_q": ParamSpec(("layers", "heads", "head_dim")), "b_k": kv_heads, "b_v": kv_heads}
    if "out" in cfg.biases:
        attn["b_o"] = ParamSpec(("layers", "embed"))
    if "mlp" in cfg.biases:
        wide = ParamSpec(("layers", "mlp"))
        mlp |= {"b_in": wide, "b_out": ParamSpec(("layers", "embed"))} | ({"b_gate": wide} if "w_gate" in mlp else {})
    if "head" in cfg.biases:
        table["head"]["b"] = ParamSpec(("vocab",))


def _norm(cfg: ModelConfig, *leading: str) -> Table:
    kind, _, suffix = cfg.norm.partition("-")
    width = () if kind == "scalenorm" else ("embed",)
    scale = 1.0 if kind in ("layernorm", "rms") else math.sqrt(cfg.d_model)
    table: Table = {"scale": ParamSpec((*leading, *width), fill=scale)}
    if suffix == "bias" or (kind == "layernorm" and suffix != "nobias"):
        table["bias"] = ParamSpec((*leading, *width))
    return table


def map_table(f: Callable[..., Any], cfg: ModelConfig, *trees: Any) -> Any:
    """`f(spec, *leaves)` for every parameter, in the structure of the table."""
    return jax.tree.map(f, param_table(cfg), *trees, is_leaf=lambda s: isinstance(s, ParamSpec))


@functools.lru_cache(maxsize=64)
def named_specs(cfg: ModelConfig) -> Mapping[str, ParamSpec]:
    """The table flat: "layers/attn/q" -> spec. Asked for with every array of a file, so it is made once."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(param_table(cfg), is_leaf=lambda s: isinstance(s, ParamSpec))
    return types.MappingProxyType({path_name(path): spec for path, spec in pairs})


def path_name(path: tuple[Any, ...]) -> str:
    """ "layers/attn/q" for the path of a leaf in a nested dict."""
    return "/".join(str(key.key) for key in path)


def shape(spec: ParamSpec, cfg: ModelConfig) -> tuple[int, ...]:
    """Shape of the whole parameter."""
    sizes = cfg.axis_sizes
    return tuple(sizes[axis] for axis in spec.axes)


def size(spec: ParamSpec, cfg: ModelConfig) -> int:
    """Number of values in the parameter."""
    return math.prod(shape(spec, cfg))


def abstract_params(cfg: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes and dtypes without arrays."""
    return map_table(lambda s: jax.ShapeDtypeStruct(shape(s, cfg), dtype), cfg)


def decay_mask(cfg: ModelConfig) -> Any:
    """True where weight decay acts: on matrices and tables, and on no bias or norm.

    In v2 all that is stacked over layers decays too: the original told matrices by having two axes, as its stacked
    biases and norms did (docs/formats.md, section 5.1).
    """
    return map_table(lambda s: s.std is not None or (cfg.architecture == "v2" and "layers" in s.axes), cfg)


def count_params(cfg: ModelConfig) -> int:
    """Unique parameters, the embedding bias included."""
    return sum(size(s, cfg) for s in named_specs(cfg).values())


def is_multiplied(spec: ParamSpec) -> bool:
    """Whether tokens are multiplied with the parameter: a matrix, and no table in which rows are looked up."""
    return bool(spec.inputs) and not set(spec.inputs) & {"vocab", "ctx", "buckets"}


def count_matmul_params(cfg: ModelConfig) -> int:
    """Parameters that a token is multiplied with: matrices, and a token table that is also the head."""
    specs = named_specs(cfg)
    tied = size(specs["embed/tokens"], cfg) if cfg.tied_head else 0
    return tied + sum(size(s, cfg) for s in specs.values() if is_multiplied(s))


def init_params(cfg: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters; each depends on `key` and its own name only, never on a mesh.

    The truncated normal is cut at two standard deviations and not rescaled, as in the original, so that the actual
    standard deviation is about 0.88 of the one in the table.
    """

    def one(path: tuple[Any, ...], spec: ParamSpec) -> Array:
        if spec.std is None:
            return jnp.full(shape(spec, cfg), spec.fill, dtype)
        own = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        return (spec.std * jax.random.truncated_normal(own, -2, 2, shape(spec, cfg), jnp.float32)).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, param_table(cfg), is_leaf=lambda s: isinstance(s, ParamSpec))
