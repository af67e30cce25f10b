"""Causal attention on CPU with its own backward pass, in blocks of queries that leave out the keys behind them.

The plain form computes the masked half of all scores. Here a block of queries is multiplied with the keys up to its
own last position and no further; within the last of them the mask still decides. The backward pass keeps the weights
rounded to the products' dtype, and not the scores.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.shapes import Array

# A sequence is cut in so many blocks of queries at most, each of so many positions at least. The more blocks, the less
# of the masked half is computed, and the smaller the products.
_BLOCKS = 4
_POSITIONS = 64


def plain_attention(q: Array, k: Array, v: Array, bias: Array, scale: float, dtype: str) -> Array:
    """The reference: softmax(scale q k + bias) v; factors of products rounded to `dtype`, all else float32.

    q, k, v: [batch, seq, heads, head_dim]; bias: [#batch, #heads, seq, seq], which hides what comes later.
    """
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = scale * dot("bqhd,bkhd->bhqk", q.astype(dtype), k.astype(dtype))
    weights = jax.nn.softmax(scores + bias, axis=-1)
    return dot("bhqk,bkhd->bqhd", weights.astype(dtype), v.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def causal_attention(q: Array, k: Array, v: Array, bias: Array, scale: float, dtype: str) -> Array:
    """As `plain_attention`, where `bias` hides every key after its query. The bias gets no gradient: it is a mask."""
    return _forward(q, k, v, bias, scale, dtype)[0]


def _forward(q: Array, k: Array, v: Array, bias: Array, scale: float, dtype: str) -> tuple[Array, Any]:
    # Heads before positions, once: the products over one head's positions are then plain matrix products.
    q, k, v = (jnp.swapaxes(a.astype(dtype), 1, 2) for a in (q, k, v))
    parts, kept = [], []
    for begin, end in _blocks(q.shape[2]):
        scores = scale * _dot("bhqd,bhkd->bhqk", q[:, :, begin:end], k[:, :, :end])
        weights = jax.nn.softmax(scores + bias[:, :, begin:end, :end], axis=-1).astype(dtype)
        parts.append(_dot("bhqk,bhkd->bhqd", weights, v[:, :, :end]))
        kept.append(weights)
    mixed = jnp.swapaxes(jnp.concatenate(parts, axis=2), 1, 2)
    return mixed, (q, k, v, mixed, kept, bias)


def _backward(scale: float, dtype: str, saved: Any, g: Array) -> tuple[Array, Array, Array, Array]:
    q, k, v, mixed, kept, bias = saved
    # The sum over keys of weight times its gradient, which the softmax' gradient needs, by the weighted values.
    balance = jnp.swapaxes(jnp.sum(g * mixed, axis=-1), 1, 2)[..., None]
    g = jnp.swapaxes(g.astype(dtype), 1, 2)
    seq = q.shape[2]
    parts: list[Array] = []
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for (begin, end), weights in zip(_blocks(seq), kept, strict=True):
        here = slice(begin, end)
        rest = [(0, 0), (0, 0), (0, seq - end), (0, 0)]
        dv += jnp.pad(_dot("bhqk,bhqd->bhkd", weights, g[:, :, here]), rest)
        d_weights = _dot("bhqd,bhkd->bhqk", g[:, :, here], v[:, :, :end])
        d_scores = (scale * weights.astype(jnp.float32) * (d_weights - balance[:, :, here])).astype(dtype)
        parts.append(_dot("bhqk,bhkd->bhqd", d_scores, k[:, :, :end]))
        dk += jnp.pad(_dot("bhqk,bhqd->bhkd", d_scores, q[:, :, here]), rest)
    dq, dk, dv = (jnp.swapaxes(a, 1, 2) for a in (jnp.concatenate(parts, axis=2), dk, dv))
    return dq, dk, dv, jnp.zeros_like(bias)


causal_attention.defvjp(_forward, _backward)


def _blocks(seq: int) -> list[tuple[int, int]]:
    """Begin and end of every block of queries."""
    size = max(-(-seq // _BLOCKS), _POSITIONS)
    return [(begin, min(begin + size, seq)) for begin in range(0, seq, size)]


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
