"""200 training steps of the demo's model in the fast forms and in the plain ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import TrainConfig
from mesh_transformer.model.policy import CPU_FORMS, default_policy
from mesh_transformer.train.state import initial_state
from mesh_transformer.train.step import make_train_step

MODEL, STEPS = preset("gpt-j-demo"), 200


def losses(forms: frozenset[Any], dtype: str, seed: int) -> np.ndarray:
    """Of every step, float64 [STEPS]; `seed` is that of the initial parameters, the rows are the same for all."""
    train = TrainConfig(steps=STEPS, learning_rate=1e-3, batch_size=8, compute_dtype=dtype)
    policy = dataclasses.replace(default_policy(dtype), forms=forms)
    step = jax.jit(make_train_step(MODEL, train, policy), donate_argnums=0)
    state, found = jax.jit(lambda: initial_state(MODEL, train, seed))(), []
    for i in range(STEPS):
        state, report = step(state, rows(i))
        found.append(float(report.loss))
    return np.array(found)


def rows(i: int) -> jax.Array:
    """Ids that go up by a step of each row's own, which can be learned: int32 [1, 8, n_ctx + 1]."""
    random = np.random.default_rng(i)
    begin, by = random.integers(0, MODEL.n_vocab, 8), random.integers(1, 8, 8)
    ids = (begin[:, None] + by[:, None] * np.arange(MODEL.n_ctx + 1)) % MODEL.n_vocab
    return jnp.asarray(ids[None].astype(np.int32))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_stay_within_the_noise_of_another_seed(dtype: str) -> None:
    """The means over the last 50 steps lie closer than those of another initialisation, or within 0.002 nats."""
    plain = losses(frozenset(), dtype, 0)
    fast, other = losses(CPU_FORMS, dtype, 0), losses(frozenset(), dtype, 1)
    assert plain[-50:].mean() < 0.9 * plain[0]
    apart, noise = abs(fast[-50:].mean() - plain[-50:].mean()), abs(other[-50:].mean() - plain[-50:].mean())
    print(f"{dtype}: plain {plain[-50:].mean():.4f}, fast apart by {apart:.1e}, another seed by {noise:.1e}")
    assert apart < max(0.002, noise)
    np.testing.assert_allclose(fast[:20], plain[:20], rtol=1e-5 if dtype == "float32" else 2e-3)
