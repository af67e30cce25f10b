"""The golden comparison must be able to fail: each mistake below, made in the package, is caught by it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import gptj
from mesh_transformer.model import decoder, layers, rope

Patch = pytest.MonkeyPatch


def swap_k_and_v(patch: Patch) -> None:
    original = decoder.self_attention
    patch.setattr(decoder, "self_attention", lambda h, p, *rest: original(h, p | {"k": p["v"], "v": p["k"]}, *rest))


def rotate_halves(patch: Patch) -> None:
    def rotate(x, sin, cos, layout):
        half = sin.shape[-1]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        sin, cos = sin[:, :, None, :], cos[:, :, None, :]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    patch.setattr(rope, "rotate", rotate)


def rotate_the_other_way(patch: Patch) -> None:
    # Scores still depend on differences of positions only, but with the sign of the difference turned round.
    original = rope.rotate
    patch.setattr(rope, "rotate", lambda x, sin, cos, layout: original(x, -sin, cos, layout))


def exact_gelu(patch: Patch) -> None:
    patch.setattr(jax.nn, "gelu", functools.partial(lambda f, x, approximate: f(x, approximate=False), jax.nn.gelu))


def other_epsilon(patch: Patch) -> None:
    original = layers.norm
    patch.setattr(layers, "norm", lambda x, p, cfg: original(x, p, dataclasses.replace(cfg, norm_eps=1e-6)))


def sample_variance(patch: Patch) -> None:
    original = layers.norm

    def norm(x, p, cfg):
        n = x.shape[-1]
        shrunk = p | {"scale": p["scale"] * ((n - 1) / n) ** 0.5}
        return original(x, shrunk, cfg)

    patch.setattr(layers, "norm", norm)


def no_embedding_bias(patch: Patch) -> None:
    drop_a_bias(patch, within="tokens", name="bias")


def no_head_bias(patch: Patch) -> None:
    drop_a_bias(patch, within="w", name="b")


def drop_a_bias(patch: Patch, within: str, name: str) -> None:
    original = decoder.gather

    def gather(params, specs, rules):
        gathered = original(params, specs, rules)
        return gathered | {name: jnp.zeros_like(gathered[name])} if within in gathered else gathered

    patch.setattr(decoder, "gather", gather)


def scores_not_scaled(patch: Patch) -> None:
    original = layers.attention
    patch.setattr(layers, "attention", lambda q, *rest: original(q * 8**0.5, *rest))


def sees_one_token_ahead(patch: Patch) -> None:
    original = layers.sliding_mask
    patch.setattr(layers, "sliding_mask", lambda query, key, window: original(query + 1, key, window + 1))


MISTAKES = [
    swap_k_and_v,
    rotate_halves,
    rotate_the_other_way,
    exact_gelu,
    other_epsilon,
    sample_variance,
    no_embedding_bias,
    no_head_bias,
    scores_not_scaled,
    sees_one_token_ahead,
]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(gptj.FILE) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def params():
    return gptj.our_params(gptj.weights(gptj.GOLDEN, gptj.GOLDEN_SEED), gptj.GOLDEN, gptj.GOLDEN_SEED)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_the_golden_comparison_catches(mistake: Callable[[Patch], None], golden, params, monkeypatch) -> None:
    mistake(monkeypatch)
    ours = gptj.logits_of(params, golden["tokens"], gptj.GOLDEN)
    assert np.isfinite(ours).all()
    with pytest.raises(AssertionError, match="logits differ"):
        gptj.check_logits(ours, golden["logits"])
