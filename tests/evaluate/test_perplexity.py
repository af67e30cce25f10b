"""The windows of a long text, and what is said of it, against sums made by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.engine.scoring import Scorer
from mesh_transformer.evaluate.perplexity import TextReport, evaluate_text, rolling_windows
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.params import abstract_params
from mesh_transformer.model.policy import ComputePolicy

CFG = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=264, n_ctx=16, d_rotary=4)
BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def params() -> dict:
    chosen = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.asarray(0.5 * chosen.normal(size=a.shape), jnp.float32), abstract_params(CFG))


def test_windows() -> None:
    assert list(rolling_windows([], 9, 4)) == []
    assert list(rolling_windows([0], 9, 4)) == [([9], [0])]
    assert list(rolling_windows([0, 1, 2, 3], 9, 4)) == [([9], [0, 1, 2, 3])]
    # The example in the harness' own documentation of `loglikelihood_rolling`, with ten tokens.
    assert list(rolling_windows([*range(10)], 99, 4)) == [
        ([99], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]


@pytest.mark.parametrize("n", [1, 16, 17, 40])
def test_a_text(params: dict, n: int) -> None:
    text = ("two wörds and more of them, to be read in windows")[:n]
    found = evaluate_text(Scorer(CFG, ComputePolicy()), params, BYTES, text)
    ids, total = BYTES.encode(text), 0.0
    for context, scored in rolling_windows(ids, 256, 16):
        inputs = [*context, *scored][:-1]
        logits = np.asarray(forward(params, jnp.asarray([inputs]), CFG, ComputePolicy())[0], np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total += sum(log_probs[len(context) - 1 + i, token] for i, token in enumerate(scored))
    assert found.log_likelihood == pytest.approx(total, abs=1e-4)
    assert (found.tokens, found.bytes, found.words) == (len(ids), len(text.encode()), len(text.split(" ")))


def test_the_figures() -> None:
    found = TextReport(log_likelihood=-math.log(2) * 48, tokens=16, bytes=24, words=4).to_dict()
    assert found["nats_per_token"] == pytest.approx(3 * math.log(2)) and found["token_perplexity"] == pytest.approx(8)
    assert found["bits_per_byte"] == pytest.approx(2) and found["byte_perplexity"] == pytest.approx(4)
    assert found["word_perplexity"] == pytest.approx(2**12)
    # A text without spaces is one word, whose perplexity is beyond what a float holds.
    assert TextReport(log_likelihood=-1e6, tokens=9, bytes=9, words=1).word_perplexity == math.inf


def test_white_space_is_no_text(params: dict) -> None:
    with pytest.raises(UserError, match="nothing but white space"):
        evaluate_text(Scorer(CFG, ComputePolicy()), params, BYTES, " \n")
