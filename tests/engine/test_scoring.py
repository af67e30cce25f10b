"""Log-likelihoods of token ids against logits, where the text meets the edges of widths and context."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.engine.scoring import log_likelihood
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.params import abstract_params
from mesh_transformer.model.policy import ComputePolicy

CFG = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=40, n_ctx=24, d_rotary=4)
POLICY = ComputePolicy()


@pytest.fixture(scope="module")
def params() -> dict:
    random = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.asarray(0.5 * random.normal(size=a.shape), jnp.float32), abstract_params(CFG))


@pytest.fixture(scope="module")
def logits_of(params: dict) -> jax.stages.Wrapped:
    return jax.jit(lambda tokens: forward(params, tokens, CFG, POLICY)[0])


@pytest.mark.parametrize(
    ("n_context", "n_continuation"),
    [(1, 1), (1, 15), (1, 16), (2, 16), (16, 1), (17, 1), (10, 10), (1, 24), (24, 1), (25, 1), (60, 5), (60, 24)],
)
def test_every_width(params: dict, logits_of: jax.stages.Wrapped, n_context: int, n_continuation: int) -> None:
    text = np.random.default_rng(n_context).integers(0, 40, n_context + n_continuation)
    found = log_likelihood(params, CFG, POLICY, text[:n_context].tolist(), text[n_context:].tolist())
    used = text[-25:]  # 24 inputs and one more target
    padded = np.zeros((1, 24), np.int32)
    padded[0, : len(used) - 1] = used[:-1]
    logits = np.asarray(logits_of(jnp.asarray(padded)), np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = range(len(used) - 1 - n_continuation, len(used) - 1)
    assert found[0] == pytest.approx(sum(scores[i, used[i + 1]] for i in places), abs=1e-4)
    assert found[1] == all(np.argmax(scores[i]) == used[i + 1] for i in places)


def test_the_likeliest_token_is_greedy(params: dict, logits_of: jax.stages.Wrapped) -> None:
    context = [5, 9, 2]
    padded = np.zeros((1, 24), np.int32)
    padded[0, :3] = context
    best, *_, worst = np.argsort(-np.asarray(logits_of(jnp.asarray(padded)))[2]).tolist()
    likely, unlikely = (log_likelihood(params, CFG, POLICY, context, [token]) for token in (best, worst))
    assert likely[1] and not unlikely[1] and likely[0] > unlikely[0]


def test_chunks_of_positions_change_nothing(params: dict) -> None:
    text = np.random.default_rng(0).integers(0, 40, 25).tolist()
    whole = log_likelihood(params, CFG, POLICY, text[:4], text[4:])
    pieces = log_likelihood(params, CFG, ComputePolicy(loss_chunk=5), text[:4], text[4:])
    assert pieces == (pytest.approx(whole[0], abs=1e-4), whole[1])


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ([], [1], "at least one token of context"),
        ([1], [], "one of continuation"),
        ([1], [2] * 25, "25 tokens .* holds 24"),
    ],
)
def test_nothing_to_score(params: dict, context: list[int], continuation: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        log_likelihood(params, CFG, POLICY, context, continuation)
