"""The head's product and the cross-entropy of its logits, with the gradient computed while the logits are at hand.

The plain form computes a chunk's logits, forgets them, and computes them again in the backward pass: a fourth product
of the size of the head, beside the three that are needed. Here a chunk's part of the gradient is computed as soon as
its logits are, for a gradient of the total of 1; the backward pass multiplies it with the one that it is given. That
serves gradients of the total alone, which training asks for; those of the scores are computed by the plain form.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mesh_transformer.kernels.products import gradients, plain_product, row_sums
from mesh_transformer.shapes import Array


class Scores(NamedTuple):
    """Of every target; each [rows] float32, but `correct`, bool.

    loss: cross-entropy in nats. log_sum: log sum exp of the logits less their maximum. log_partition: log sum exp.
    correct: the target's logit equals the maximum.
    """

    loss: Array
    log_sum: Array
    log_partition: Array
    correct: Array


class How(NamedTuple):
    """dtype: of the products' factors. z_loss: coefficient of the square of a log-sum in the total. whole: whether that
    is log_partition, not log_sum. chunk: rows whose logits exist at one time.
    """

    dtype: str
    z_loss: float
    whole: bool
    chunk: int


def plain_head_loss(x: Array, w: Array, b: Array, targets: Array, weights: Array, how: How) -> tuple[Array, Scores]:
    """The reference. The maximum of a row's logits carries no gradient.

    Args:
        x: what the head is applied to, float32 [rows, embed].
        w, b: the head, [embed, vocab] and [vocab].
        targets: int [rows].
        weights: what each row's loss counts in the total, float32 [rows].

    Returns:
        (sum over rows of weight * (loss + z_loss * log-sum squared), the scores of every row).
    """
    one = jax.checkpoint(functools.partial(_scores, w=w, b=b, dtype=how.dtype))
    parts = [one(x[part], targets=targets[part])[0] for part in _parts(x.shape[0], how.chunk)]
    scores = Scores(*(jnp.concatenate(of_chunks) for of_chunks in zip(*parts, strict=True)))
    return _total(scores, weights, how), scores


def _scores(x: Array, targets: Array, *, w: Array, b: Array, dtype: str) -> tuple[Scores, Array]:
    """The scores of some rows, and exp of their logits less their maximum."""
    logits = plain_product(x, w, dtype) + b.astype(jnp.float32)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    # A target outside the vocabulary counts as the likeliest one, with no gradient of its own.
    there = (targets >= 0) & (targets < logits.shape[1])
    at_target = jnp.take_along_axis(logits, jnp.where(there, targets, 0)[:, None], axis=-1)[:, 0]
    at_target = jnp.where(there, at_target - top, 0.0)
    exps = jnp.exp(logits - top[:, None])
    log_sum = jnp.log(jnp.sum(exps, axis=-1))
    return Scores(log_sum - at_target, log_sum, log_sum + top, at_target == 0), exps


def _total(scores: Scores, weights: Array, how: How) -> Array:
    return jnp.sum(weights * scores.loss) + how.z_loss * jnp.sum(weights * jnp.square(_log_sum(scores, how)))


def _log_sum(scores: Scores, how: How) -> Array:
    return scores.log_partition if how.whole else scores.log_sum


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def head_loss(x: Array, w: Array, b: Array, targets: Array, weights: Array, how: How) -> tuple[Array, Scores]:
    """As `plain_head_loss`, with the gradients of the total by x, w and b computed beside it."""
    return plain_head_loss(x, w, b, targets, weights, how)


def _forward(x: Any, w: Any, b: Any, targets: Any, weights: Any, how: How) -> tuple[tuple[Array, Scores], Any]:
    inputs = tuple(primal.value for primal in (x, w, b, targets, weights))
    x, w, b, targets, weights = inputs
    narrow = w.astype(how.dtype)
    parts: list[Scores] = []
    dx: list[Array] = []
    dw = jnp.zeros(w.shape, jnp.float32)
    # The gradient of b is summed in float32, of probabilities and targets apart: together they exist in `dtype` only.
    db = jnp.zeros(b.shape, jnp.float32).at[jnp.where(targets < 0, b.size, targets)].add(-weights, mode="drop")
    for part in _parts(x.shape[0], how.chunk):
        scores, exps = _scores(x[part], targets[part], w=narrow, b=b, dtype=how.dtype)
        # d total / d logit = weight * ((1 + 2 z log-sum) probability - [is target])
        share = weights[part] * (1 + 2 * how.z_loss * _log_sum(scores, how)) * jnp.exp(-scores.log_sum)
        is_target = jax.lax.broadcasted_iota(targets.dtype, exps.shape, 1) == targets[part][:, None]
        d_logits = exps * share[:, None] - jnp.where(is_target, weights[part][:, None], 0.0)
        of_x, of_w = gradients(x[part], narrow, d_logits.astype(how.dtype), how.dtype)
        parts, dx, dw, db = [*parts, scores], [*dx, of_x], dw + of_w, db + row_sums(exps, share)
    scores = Scores(*(jnp.concatenate(of_chunks) for of_chunks in zip(*parts, strict=True)))
    return (_total(scores, weights, how), scores), (inputs, (jnp.concatenate(dx), dw, db))


def _backward(how: How, saved: Any, given: tuple[Any, Any]) -> tuple[Any, ...]:
    inputs, (dx, dw, db) = saved
    x, w, b, targets, weights = inputs
    g, of_scores = given
    if all(isinstance(part, SymbolicZero) for part in of_scores[:3]) and not isinstance(g, SymbolicZero):
        own = ((g * d).astype(a.dtype) for d, a in ((dx, x), (dw, w), (db, b)))
        return (*own, None, None)
    _, pull = jax.vjp(lambda x, w, b: plain_head_loss(x, w, b, targets, weights, how), x, w, b)
    whole = jax.tree.map(_instance, (g, of_scores), is_leaf=lambda a: isinstance(a, SymbolicZero))
    return (*pull(whole), None, None)


def _instance(a: Any) -> Any:
    """A gradient of zero as an array."""
    return jnp.zeros(a.shape, a.dtype) if isinstance(a, SymbolicZero) else a


head_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _parts(rows: int, chunk: int) -> list[slice]:
    return [slice(begin, min(begin + chunk, rows)) for begin in range(0, rows, chunk)]
