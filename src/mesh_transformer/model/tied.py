"""A head that is the token table, as a matrix of its own for inference.

A lookup reads a row of the table, and the head contracts along those rows. What multiplies few rows with weights as
they are stored takes the contracted axis first (`model.narrow`), and XLA on CPU widens the whole of a 16-bit table for
every token. So the table is held once more, turned, where weights are narrow: in 16 bits as it is, in 8 or 4 where the
model's matrices are, which leaves the rows that are looked up as stored. It costs that memory. In float32 XLA's
product with the table itself is as fast, and nothing is held twice.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import ParamSpec
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.model.quantize import Int4, Int8, Quantized, described, quantize
from mesh_transformer.shapes import Params

# The key of the matrix in a tree of parameters, beside those of the table; what is stored never has it.
TURNED = "turned_table"
# The matrix: what `head/w` is of other models.
SPEC = ParamSpec(("embed", "vocab"), inputs=("embed",))
# Tokens that are quantised at one time: in between they are float32.
_AT_ONCE = 1 << 13


def with_turned(params: Params, cfg: ModelConfig, policy: ComputePolicy, *, one_device: bool) -> Params:
    """`params`, with the token table turned where inference on one device is the faster for it.

    Raises:
        CheckpointError: the table holds what the quantisation of the matrices cannot.
    """
    kind = quantization(params)
    if not cfg.tied_head or not one_device or TURNED in params:
        return params
    table = params["embed"]["tokens"]
    if kind is None and (policy.few_rows == "plain" or table.dtype.itemsize == 4):
        return params
    held = np.asarray(table)
    if kind is None:
        return params | {TURNED: jnp.asarray(np.ascontiguousarray(held.T))}
    turned = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), described(kind, SPEC, held.shape[::-1]))
    for begin in range(0, held.shape[0], _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        try:
            rounded = quantize(np.ascontiguousarray(held[part].T), SPEC, kind)
        except ValueError as error:
            raise CheckpointError(
                f"embed/tokens, which is also the head, holds what {kind} cannot: {error}; the model is damaged or its "
                "training failed, and loading it without quantize= shows what it computes"
            ) from error
        turned.values[:, part], turned.scale[:, part] = rounded.values, rounded.scale
    return params | {TURNED: jax.tree.map(jnp.asarray, turned)}


def quantization(params: Params) -> str | None:
    """How the matrices of a tree are quantised, by the name that `quantize` knows; None: not at all."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    groups = [leaf.group for leaf in leaves if isinstance(leaf, Int4)]
    if groups:  # a matrix too narrow for groups of 128 has smaller ones
        return "int4-128" if max(groups) > 32 else "int4"
    return "int8" if any(isinstance(leaf, Int8) for leaf in leaves) else None


def turned_bytes(cfg: ModelConfig, quantized: str | None) -> int:
    """Bytes of the turned table of a model whose matrices are quantised so; 0 where there is none."""
    if not cfg.tied_head or quantized is None:
        return 0
    shape = tuple(cfg.axis_sizes[axis] for axis in SPEC.axes)
    leaves: Any = jax.tree.leaves(described(quantized, SPEC, shape))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
