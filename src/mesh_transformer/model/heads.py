"""Heads of keys and values that several query heads share (grouped-query attention).

Ainslie et al. 2023, arXiv 2305.13245. Query heads that share follow one another: with g of them, query head h has the
keys of head h // g. On a mesh the heads of both lie over one axis, so that each device has whole groups.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mesh_transformer.shapes import Array, Float


def repeated(
    kv: Float[Array, "batch keys kv_heads head_dim"], n_heads: int, split: PartitionSpec | None
) -> Float[Array, "batch keys heads head_dim"]:
    """Every head of keys or values once for each query head that shares it; split: how the result lies."""
    batch, keys, n_kv, width = kv.shape
    if n_kv == n_heads:
        return kv
    wide = jnp.broadcast_to(kv[:, :, :, None], (batch, keys, n_kv, n_heads // n_kv, width))
    return jnp.reshape(wide, (batch, keys, n_heads, width), out_sharding=split)


def folded(
    q: Float[Array, "batch seq heads head_dim"], n_kv: int, split: PartitionSpec | None
) -> Float[Array, "batch queries kv_heads head_dim"]:
    """Query heads that share keys as further queries of one head, after one another; `unfolded` is the inverse."""
    batch, seq, n_heads, width = q.shape
    if n_kv == n_heads:
        return q
    grouped = jnp.reshape(q, (batch, seq, n_kv, n_heads // n_kv, width), out_sharding=_with_group(split, 3))
    return jnp.reshape(jnp.swapaxes(grouped, 2, 3), (batch, -1, n_kv, width), out_sharding=split)


def unfolded(
    mixed: Float[Array, "batch queries kv_heads head_dim"], n_heads: int, split: PartitionSpec | None
) -> Float[Array, "batch seq heads head_dim"]:
    """What attention gives for `folded` queries, head by head."""
    batch, _, n_kv, width = mixed.shape
    if n_kv == n_heads:
        return mixed
    grouped = jnp.reshape(mixed, (batch, -1, n_heads // n_kv, n_kv, width), out_sharding=_with_group(split, 2))
    return jnp.reshape(jnp.swapaxes(grouped, 2, 3), (batch, -1, n_heads, width), out_sharding=split)


def _with_group(split: PartitionSpec | None, at: int) -> PartitionSpec | None:
    return None if split is None else PartitionSpec(*split[:at], None, *split[at:])
