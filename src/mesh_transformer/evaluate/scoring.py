"""Log-likelihoods of given text."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.loss import TokenScores, score_tokens
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.shapes import Params
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout

_SMALLEST_WIDTH = 16


@functools.lru_cache(maxsize=8)
def _program(cfg: ModelConfig, policy: ComputePolicy, layout: Layout):  # type: ignore[no-untyped-def]
    return jax.jit(functools.partial(score_tokens, cfg=cfg, policy=policy, rules=layout.rules))


def log_likelihood(
    params: Params,
    cfg: ModelConfig,
    policy: ComputePolicy,
    context: Sequence[int],
    continuation: Sequence[int],
    layout: Layout = ONE_DEVICE_LAYOUT,
) -> tuple[float, bool]:
    """Sum over the continuation's tokens of log p(token | all before it), in nats, and whether each was the likeliest.

    Of a text longer than the context plus one, the newest tokens are used.

    Raises:
        UserError: the continuation is empty or longer than the context, or nothing stands before it.
    """
    n = len(continuation)
    if not n or not len(context):
        raise UserError("a log-likelihood needs at least one token of context and one of continuation")
    if n > cfg.n_ctx:
        raise UserError(f"the continuation has {n} tokens but the model's context holds {cfg.n_ctx}; split it")
    text = np.asarray([*context, *continuation][-(cfg.n_ctx + 1) :], np.int32)
    width = min(max(_SMALLEST_WIDTH, 1 << (len(text) - 2).bit_length()), cfg.n_ctx)
    # Padding on the right is never seen by what stands before it, nor one row by another.
    rows = np.zeros((layout.padded_rows(1), width + 1), np.int32)
    rows[0, : len(text)] = text
    with layout.using():
        placed = layout.place_rows(rows[:, :-1]), layout.place_rows(rows[:, 1:])
        scores: TokenScores = _program(cfg, policy, layout)(params, *placed)
    asked = slice(len(text) - 1 - n, len(text) - 1)
    losses = np.asarray(scores.loss, np.float64)[0, asked]
    return -float(losses.sum()), bool(np.asarray(scores.correct)[0, asked].all())
