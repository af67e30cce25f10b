"""GPT-J live against PyTorch's transformers: logits, gradients, greedy generation and the order of logit filters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import gptj_model, gradients_of

from golden import gptj
from mesh_transformer.engine.generator import Generator
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sample.methods import RowOptions, candidate_filter
from mesh_transformer.sample.options import SamplingOptions

# Deprecations inside torch and transformers are theirs to mend.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

SIZES = gptj.Sizes(n_layers=4, d_model=192, n_heads=6, d_rotary=16, n_vocab=640, n_ctx=96)
SEED = 77


@pytest.fixture(scope="module")
def theirs() -> Any:
    return gptj_model(gptj.weights(SIZES, SEED), SIZES)


@pytest.fixture(scope="module")
def ours() -> Any:
    return gptj.our_params(gptj.weights(SIZES, SEED), SIZES, SEED)


def test_logits_loss_and_gradients(ours, theirs, record_property) -> None:
    ids = gptj.tokens(SIZES, SEED, batch=2, length=SIZES.n_ctx)
    logits, loss, gradients = gradients_of(theirs, ids)
    record_property("logits", gptj.check_logits(gptj.logits_of(ours, ids, SIZES), logits))
    value, our_gradients = gptj.loss_and_gradients(ours, ids, SIZES)
    assert value == pytest.approx(loss, abs=1e-5)
    record_property("gradients", gptj.check_gradients(our_gradients, gptj.our_gradients(gradients, SIZES)))


def test_the_stored_numbers_are_what_is_computed_now() -> None:
    model = gptj_model(gptj.weights(gptj.GOLDEN, gptj.GOLDEN_SEED), gptj.GOLDEN)
    ids = gptj.tokens(gptj.GOLDEN, gptj.GOLDEN_SEED, batch=2, length=gptj.GOLDEN.n_ctx)
    logits, loss, gradients = gradients_of(model, ids)
    with np.load(gptj.FILE) as stored:
        np.testing.assert_array_equal(stored["tokens"], ids)
        np.testing.assert_allclose(stored["logits"], logits, rtol=0, atol=5e-5)
        assert float(stored["loss"]) == pytest.approx(loss, abs=1e-5)
        for name, value in gradients.items():
            np.testing.assert_allclose(stored[f"gradient/{name}"], value, rtol=0, atol=1e-5 * np.abs(value).max())


def test_greedy_generation_with_a_cache(ours, theirs) -> None:
    import torch

    prompts = gptj.tokens(SIZES, SEED + 1, batch=3, length=20)
    given = torch.from_numpy(prompts.astype(np.int64))
    made = theirs.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, use_cache=True, max_new_tokens=60, pad_token_id=0
    )[:, 20:]
    assert made.shape == (3, 60)
    generator = Generator(gptj.config(SIZES), ours, ComputePolicy(dtype="float32"), None)
    done = generator.generate(prompts.tolist(), [SamplingOptions(max_tokens=60, temperature=0.0)] * 3)
    assert [c.tokens for c in done] == made.tolist()
    assert min(len(set(c.tokens)) for c in done) > 5


def test_filters_keep_what_theirs_keep() -> None:
    """Temperature, top-k, top-p, min-p in that order, over random logits and options; equal logits do not occur."""
    import torch
    from transformers.generation import logits_process as hf

    random = np.random.default_rng(9)
    n_rows, n_vocab = 300, 400
    logits = (3 * random.standard_normal((n_rows, n_vocab))).astype(np.float32)
    temperature = random.choice([0.3, 0.7, 1.0, 1.6], n_rows).astype(np.float32)
    top_k = random.choice([0, 1, 2, 10, 100], n_rows).astype(np.int32)
    top_p = random.choice([0.1, 0.5, 0.9, 0.99, 1.0], n_rows).astype(np.float32)
    min_p = random.choice([0.0, 0.01, 0.1, 0.5], n_rows).astype(np.float32)
    options = RowOptions(
        temperature=jnp.asarray(temperature),
        top_k=jnp.asarray(top_k),
        top_p=jnp.asarray(top_p),
        min_p=jnp.asarray(min_p),
        keys=jnp.zeros((n_rows, 2), jnp.uint32),
        legacy=jnp.zeros(n_rows, bool),
    )
    kept = np.asarray(jax.jit(candidate_filter)(jnp.asarray(logits / temperature[:, None]), options))
    for row in range(n_rows):
        # As `generate` makes them: a filter that would keep everything is left out.
        warpers = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(float(temperature[row]))])
        if top_k[row]:
            warpers.append(hf.TopKLogitsWarper(int(top_k[row])))
        if top_p[row] < 1:
            warpers.append(hf.TopPLogitsWarper(float(top_p[row])))
        if min_p[row]:
            warpers.append(hf.MinPLogitsWarper(float(min_p[row])))
        out = warpers(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits[row : row + 1]))
        np.testing.assert_array_equal(kept[row], np.isfinite(out[0].numpy()), err_msg=str(row))
    counts = kept.sum(axis=1)
    assert counts.min() == 1 and counts.max() == n_vocab and len(set(counts.tolist())) > 15
