"""Products for inference with weights as they are stored, narrow or wide, one layer of a stack at a time.

On a CPU a token takes the time of reading the weights once. XLA there makes a float32 copy of a narrow matrix before it
multiplies, and a copy of every layer's slice of a stack. With few rows there are two ways around both
(`ComputePolicy.few_rows`):

* "native": the native kernels (`kernels.native`), which take the stack and the number of the layer;
* "blocked": loops of XLA's over blocks of inputs (`kernels.blocked`).

With many rows it is arithmetic that takes the time: the matrix is cut out and widened as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mesh_transformer.kernels import blocked, native
from mesh_transformer.model.int4 import ZERO
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.model.quantize import Int4, Int8, Quantized
from mesh_transformer.shapes import Array, Float, Int

# A chunk of a prompt has no more. Up to about twice as many rows, both ways are faster than widening all of a matrix.
MOST_FEW = 64
# XLA's loop reads and writes the sums of all outputs once a block; where they leave the cache it is no gain.
_MOST_SUMS = 1 << 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfLayer:
    """One layer of a stacked weight, which is not cut out of its stack before it must be.

    stacked: an array or a `Quantized` with a leading `layers` axis. layer: int32 scalar.
    """

    stacked: Any
    layer: Int[Array, ""]

    def cut(self) -> Any:
        """The layer alone."""
        return jax.tree.map(lambda w: from_bits(to_bits(w)[self.layer], w.dtype), self.stacked)


def to_bits(w: Array) -> Array:
    """A 16-bit weight as integers: XLA on CPU widens whatever is done to such floats, and leaves integers alone."""
    return jax.lax.bitcast_convert_type(w, jnp.uint16) if w.dtype.itemsize == 2 else w


def from_bits(w: Array, dtype: Any) -> Array:
    """The inverse of `to_bits`. Not differentiable."""
    return jax.lax.bitcast_convert_type(w, dtype) if w.dtype == jnp.uint16 else w


def stored_product(
    spec: str,
    x: Array,
    w: Array | Quantized | OfLayer,
    policy: ComputePolicy,
    out_sharding: PartitionSpec | None = None,
) -> Float[Array, ...]:
    """`layers.product` with a weight as stored: the same sums, and no gradient.

    The axes that are summed over are the last of x and the first of the weight, in one order.
    """
    factors, out = spec.split("->")
    x_axes, w_axes = factors.split(",")
    n_summed = sum(axis not in out for axis in w_axes)
    assert x_axes.endswith(w_axes[:n_summed]) and out.endswith(w_axes[n_summed:]), spec
    rows = x.shape[: x.ndim - n_summed]
    stack = w if isinstance(w, OfLayer) else OfLayer(jax.tree.map(lambda a: a[None], w), jnp.int32(0))
    if not _are_few(rows, _values(stack).shape[1 + n_summed :], policy):
        return _many_rows(spec, x, w, policy, out_sharding)
    rounded = x.reshape(math.prod(rows), -1).astype(policy.dtype).astype(jnp.float32)
    y = (_native if policy.few_rows == "native" else _blocked)(rounded, _flat(stack, n_summed))
    return y.reshape(*rows, *_values(stack).shape[1 + n_summed :])


def _are_few(rows: tuple[int, ...], outputs: tuple[int, ...], policy: ComputePolicy) -> bool:
    """Whether so many rows are multiplied with weights as they are stored."""
    if policy.few_rows == "native":
        # Its rows are alike however many there are. Where neighbours must not show in a text's rounding, the choice
        # between the two ways is the text's own.
        return (rows[-1] if policy.product_rows else math.prod(rows)) <= MOST_FEW or rows[-1] == 1
    if policy.few_rows == "plain":
        return False
    n = math.prod(rows)
    few = n <= MOST_FEW and n * math.prod(outputs) <= _MOST_SUMS
    return rows[-1] == 1 or (few and not policy.product_rows)


def _values(w: OfLayer) -> Array:
    return w.stacked.values if isinstance(w.stacked, Quantized) else w.stacked


def _flat(w: OfLayer, n_summed: int) -> OfLayer:
    """The stack as [layers inputs outputs], with as many inputs as its parts have."""

    def flat(a: Array) -> Array:
        return a.reshape(a.shape[0], math.prod(a.shape[1 : 1 + n_summed]), math.prod(a.shape[1 + n_summed :]))

    return dataclasses.replace(w, stacked=jax.tree.map(flat, w.stacked))


def _native(x: Float[Array, "rows inputs"], w: OfLayer) -> Float[Array, "rows outputs"]:
    if isinstance(w.stacked, Int8):
        return native.matmul(x, w.stacked.values, w.layer, w.stacked.scale[:, 0])
    if isinstance(w.stacked, Int4):
        return native.matmul(x, w.stacked.values, w.layer, w.stacked.scale)
    return native.matmul(x, w.stacked, w.layer)


def _blocked(x: Float[Array, "rows inputs"], w: OfLayer) -> Float[Array, "rows outputs"]:
    values = _values(w)
    if values.dtype.itemsize == 2:  # in a loop, XLA copies a whole stack of 16-bit floats before it begins
        return jnp.dot(x, w.cut().astype(jnp.float32), precision="highest")
    n_stored, n_outputs = values.shape[1:]
    in_group = w.stacked.group // 2 if isinstance(w.stacked, Int4) else 1
    n_rows = blocked.block_rows(n_stored, n_outputs, in_group)

    def cut(a: Array, i: Array) -> Array:
        """The part of `a` that belongs to the block, whatever number of stored rows an entry of it stands for."""
        n = n_rows * a.shape[1] // n_stored
        return from_bits(jax.lax.dynamic_slice(to_bits(a), (w.layer, i * n, 0), (1, n, n_outputs))[0], a.dtype)

    def nibbles(shift: int, i: Array) -> Array:
        """Of every pair of inputs that share bytes the first (shift 0) or the second (shift 4)."""
        numbers = ((cut(values, i) >> shift) & 15).astype(jnp.int8) - np.int8(ZERO)
        scale = cut(w.stacked.scale, i).astype(jnp.float32)[:, None]
        return (numbers.astype(jnp.float32).reshape(-1, in_group, n_outputs) * scale).reshape(n_rows, n_outputs)

    if isinstance(w.stacked, Int4):
        halves = ((x[:, shift // 4 :: 2], functools.partial(nibbles, shift)) for shift in (0, 4))
        return sum((blocked.matmul(half, block, n_rows, n_outputs) for half, block in halves), jnp.float32(0))
    y = blocked.matmul(x, lambda i: cut(values, i).astype(jnp.float32), n_rows, n_outputs)
    return y * w.stacked.scale[w.layer] if isinstance(w.stacked, Int8) else y


def _many_rows(
    spec: str, x: Array, w: Any, policy: ComputePolicy, out_sharding: PartitionSpec | None
) -> Float[Array, ...]:
    if isinstance(w, OfLayer):
        w = w.cut()
    dense = w.values if isinstance(w, Int8) else w.widen(policy.dtype) if isinstance(w, Quantized) else w
    y = jnp.einsum(
        spec,
        x.astype(policy.dtype),
        dense.astype(policy.dtype),
        preferred_element_type=jnp.float32,
        precision="highest" if policy.dtype == "float32" else None,
        out_sharding=out_sharding,
    )
    return y * _channel_scale(spec, w, out_sharding) if isinstance(w, Int8) else y


def _channel_scale(spec: str, w: Int8, out_sharding: PartitionSpec | None) -> Array:
    """What each output of a sum over whole numbers, which every dtype of a policy holds exactly, is multiplied with."""
    w_axes, out = spec.split(",")[1].split("->")
    scale = jnp.squeeze(w.scale, tuple(i for i, axis in enumerate(w_axes) if axis not in out))
    if out_sharding is not None and out_sharding.unreduced:  # a factor of parts of a sum must be the same for all
        held = jax.typeof(scale).sharding.spec.partitions
        scale = jax.sharding.reshard(scale, PartitionSpec(*held, reduced=out_sharding.unreduced))
    return scale
