"""Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685): a matrix that rests, and two that learn.

A target matrix W becomes W + scale A B with A [inputs, rank] and B [rank, outputs]. W is a constant of the program: it
has no gradient, no moments and no update. A begins random and B zero, so that training begins from W itself.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import ParamSpec, Table, is_multiplied, map_table, named_specs
from mesh_transformer.model.quantize import Quantized, map_arrays
from mesh_transformer.shapes import Array, Params

RANK = "rank"  # the logical axis between A and B; it is never divided over a mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """base + scale a b; stands in a parameter tree where the matrix `base` stood.

    base: the matrix as stored, or a `Quantized`. a: float32 [layers *inputs rank], b: float32 [layers rank *outputs],
    with the matrix's own axes; all keep the leading `layers` axis that the matrix has, so that a slice over layers
    slices all.
    """

    base: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})


def adaptable(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Path -> spec of every matrix that tokens are multiplied with: what may be a target."""
    return {path: spec for path, spec in named_specs(cfg).items() if is_multiplied(spec)}


def adapter_table(cfg: ModelConfig, paths: Sequence[str]) -> Table:
    """The specs of an adapter: for each target {"a": spec, "b": spec} where the parameter table has the matrix."""
    table: Table = {}
    for path in paths:
        *parents, last = path.split("/")
        node = table
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = factor_specs(adaptable(cfg)[path])
    return table


def factor_specs(spec: ParamSpec) -> dict[str, ParamSpec]:
    """A has the matrix's leading and contracted axes, B its leading and other ones; `rank` lies between them."""
    leading = [axis for axis in spec.axes if axis == "layers"]
    outputs = [axis for axis in spec.axes if axis not in ("layers", *spec.inputs)]
    return {
        "a": ParamSpec((*leading, *spec.inputs, RANK), std=spec.std, inputs=spec.inputs),
        "b": ParamSpec((*leading, RANK, *outputs), std=spec.std, inputs=(RANK,)),
    }


def map_specs(f: Callable[..., Any], table: Table, *trees: Any) -> Any:
    """`f(spec, *leaves)` for every spec of `table`, in its structure: that of an adapter, or of all parameters."""
    return jax.tree.map(f, table, *trees, is_leaf=lambda s: isinstance(s, ParamSpec))


def factor_shape(spec: ParamSpec, cfg: ModelConfig, rank: int) -> tuple[int, ...]:
    """Shape of a whole A or B."""
    sizes = {**cfg.axis_sizes, RANK: rank}
    return tuple(sizes[axis] for axis in spec.axes)


def init_adapter(cfg: ModelConfig, paths: Sequence[str], rank: int, key: Array) -> Params:
    """A and B of every target, float32; each A depends on `key` and the matrix's name only, never on a mesh.

    A is uniform between -1 / sqrt(n) and 1 / sqrt(n), n being the number of inputs: what the peft library begins with
    (Kaiming's uniform law with a negative slope of sqrt(5)). B is zero.
    """

    def one(path: tuple[Any, ...], spec: ParamSpec) -> Array:
        dimensions = factor_shape(spec, cfg, rank)
        if path[-1].key == "b":
            return jnp.zeros(dimensions, jnp.float32)
        name = "/".join(str(entry.key) for entry in path)
        bound = 1 / math.sqrt(math.prod(cfg.axis_sizes[axis] for axis in spec.inputs))
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.uniform(own, dimensions, jnp.float32, -bound, bound)

    return jax.tree_util.tree_map_with_path(
        one, adapter_table(cfg, paths), is_leaf=lambda leaf: isinstance(leaf, ParamSpec)
    )


def adapt(params: Params, adapter: Params, scale: float) -> Params:
    """`params` with a `LowRank` where `adapter` has an A and a B."""
    joined: Params = {}
    for name, leaf in params.items():
        factors = adapter.get(name)
        if factors is None:
            joined[name] = leaf
        elif isinstance(leaf, Mapping):
            joined[name] = adapt(dict(leaf), factors, scale)
        else:
            joined[name] = LowRank(leaf, factors["a"], factors["b"], scale)
    return joined


def is_adapted(params: Params) -> bool:
    """Whether any parameter is a `LowRank`."""
    return any(isinstance(leaf, LowRank) for leaf in jax.tree.leaves(params, is_leaf=_is_low_rank))


def trained(params: Params) -> Params:
    """What of the parameters learns: the A and B of every `LowRank`, as {"a", "b"} in its place; without one, all."""
    if not is_adapted(params):
        return params
    found: Params = {}
    for name, leaf in params.items():
        if isinstance(leaf, LowRank):
            found[name] = {"a": leaf.a, "b": leaf.b}
        elif isinstance(leaf, Mapping) and is_adapted(dict(leaf)):
            found[name] = trained(dict(leaf))
    return found


def with_trained(params: Params, learned: Params) -> Params:
    """`params` with what `trained` gives replaced by `learned`."""
    if not is_adapted(params):
        return learned

    def one(leaf: Any, factors: Any) -> Any:
        if isinstance(leaf, LowRank):
            return dataclasses.replace(leaf, **factors)
        if isinstance(leaf, Mapping):
            return {name: one(inner, factors.get(name, {})) for name, inner in leaf.items()}
        return leaf

    return one(params, learned)


def map_parts(f: Callable[[Any, tuple[str | None, ...]], Any], spec: ParamSpec, leaf: Any) -> Any:
    """`f(array, axes)` for every array that a parameter consists of; `axes` are the array's logical axes.

    A leaf may lack its leading `layers` axis.
    """
    if not isinstance(leaf, LowRank):
        return map_arrays(f, spec, leaf)
    factors = {name: f(getattr(leaf, name), _last(s, getattr(leaf, name))) for name, s in factor_specs(spec).items()}
    return dataclasses.replace(leaf, base=map_arrays(f, spec, leaf.base), **factors)


def merged(params: Params, cfg: ModelConfig) -> Params:
    """Every `LowRank` as the one matrix that it means: computed in float32, rounded once to the dtype of its base.

    Raises:
        TypeError: a base is in 8 or 4 bits, which have no room for what was learned.
    """

    def one(spec: ParamSpec, leaf: Any) -> Any:
        if not isinstance(leaf, LowRank):
            return leaf
        if isinstance(leaf.base, Quantized):
            raise TypeError("an adapter cannot be merged into a matrix in 8 or 4 bits")
        letters = {axis: chr(ord("a") + i) for i, axis in enumerate((*spec.axes, RANK))}
        a, b = ("".join(letters[axis] for axis in s.axes) for s in factor_specs(spec).values())
        whole = "".join(letters[axis] for axis in spec.axes)
        change = jnp.einsum(f"{a},{b}->{whole}", leaf.a, leaf.b, precision="highest")
        return (leaf.base.astype(jnp.float32) + leaf.scale * change).astype(leaf.base.dtype)

    return map_table(one, cfg, params)


def _is_low_rank(leaf: Any) -> bool:
    return isinstance(leaf, LowRank)


def _last(spec: ParamSpec, w: Any) -> tuple[str, ...]:
    return spec.axes[len(spec.axes) - w.ndim :]
