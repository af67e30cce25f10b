"""Reading token by token with the cache equals reading all at once, and sliding equals a slow sliding window."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cached_reader import Reader

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.engine.generator import Generator
from mesh_transformer.model.cache import key_positions
from mesh_transformer.model.params import abstract_params
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sample.options import SamplingOptions

POLICY = ComputePolicy(dtype="float32")
TOLERANCE = 3e-5


def architecture(position: Any, n_ctx: int) -> ModelConfig:
    return ModelConfig(
        n_layers=3, d_model=16, n_heads=2, d_ff=20, n_vocab=29, n_ctx=n_ctx, position=position,
        d_rotary=4 if position == "rotary" else 0,
    )  # fmt: skip


def arithmetic(cfg: ModelConfig) -> reference.Arithmetic:
    return reference.Arithmetic(norm=cfg.norm, position=cfg.position, d_rotary=cfg.d_rotary)


def params_of(cfg: ModelConfig) -> Any:
    return jax.tree.map(jnp.asarray, reference.random_params(abstract_params(cfg), seed=4, weight=1.3))


@pytest.mark.parametrize("position", ["rotary", "fixed", "t5"])
def test_unequal_prompts_then_token_by_token(position: str) -> None:
    cfg, total = architecture(position, n_ctx=32), 24
    params = params_of(cfg)
    texts = np.random.default_rng(0).integers(0, 28, (3, total)).astype(np.int32)
    lengths = np.asarray([1, 9, 4], np.int32)
    whole = np.stack([reference.forward(params, text, arithmetic(cfg)) for text in texts])
    assert whole.std() >= 1
    # Fewer pages than the context: a ring is only as long as the longest text needs.
    reader = Reader(cfg, params, batch=3, n_slots=total, n_positions=total)
    rows = np.arange(3)
    logits = reader.read(texts, lengths)
    np.testing.assert_allclose(logits, whole[rows, lengths - 1], rtol=0, atol=TOLERANCE)
    at = lengths.copy()
    while (at < total).any():
        now = np.minimum(at, total - 1)  # a row that is over reads its last token again
        logits = reader.step(texts[rows, now], now)
        np.testing.assert_allclose(logits, whole[rows, now], rtol=0, atol=TOLERANCE)
        at += 1


@pytest.mark.parametrize("position", ["rotary", "t5"])
def test_sliding_to_three_times_the_context(position: str) -> None:
    """Every step against a window that drops its oldest key and value and rotates the others again."""
    cfg = architecture(position, n_ctx=20 if position == "t5" else 8)  # t5: beyond the exact buckets
    total = 3 * cfg.n_ctx
    params = params_of(cfg)
    texts = np.random.default_rng(1).integers(0, 28, (3, total)).astype(np.int32)
    lengths = np.asarray([3, cfg.n_ctx, 1], np.int32)
    truth = []
    for text in texts:
        slow = reference.SlidingCache(params, arithmetic(cfg), window=cfg.n_ctx)
        truth.append([slow.read(int(token)) for token in text])
    truth = np.asarray(truth)
    # Before anything is forgotten, the slow cache is the whole forward pass.
    start = reference.forward(params, texts[0, : cfg.n_ctx], arithmetic(cfg))
    np.testing.assert_allclose(truth[0, : cfg.n_ctx], start, atol=1e-9)
    # Afterwards it is not that of the visible tokens alone: old keys remember what they saw.
    fresh = reference.forward(params, texts[0, -cfg.n_ctx :], arithmetic(cfg))[-1]
    assert np.abs(fresh - truth[0, -1]).max() > 0.1

    rows = np.arange(3)
    reader = Reader(cfg, params, batch=3, n_slots=cfg.n_ctx, n_positions=total)
    logits = reader.read(texts, lengths)
    np.testing.assert_allclose(logits, truth[rows, lengths - 1], rtol=0, atol=TOLERANCE)
    at = lengths.copy()
    while (at < total).all():  # rows slide at different times
        logits = reader.step(texts[rows, at], at)
        np.testing.assert_allclose(logits, truth[rows, at], rtol=0, atol=TOLERANCE, err_msg=str(at))
        at += 1


def test_positions_in_the_ring() -> None:
    newest = jnp.asarray([0, 2, 3, 4, 9], jnp.int32)
    ring = [
        [0, -3, -2, -1],
        [0, 1, 2, -1],
        [0, 1, 2, 3],
        [4, 1, 2, 3],
        [8, 9, 6, 7],
    ]
    assert key_positions(newest, 4, 0, 4).tolist() == ring
    assert key_positions(newest, 4, 2, 2).tolist() == [row[2:] for row in ring]


# ------------------------------------------------------------------------------------------ greedy generation


def naive_greedy(params: Any, cfg: ModelConfig, prompt: list[int], n: int) -> list[int]:
    """One row, everything computed anew for every token."""
    made: list[int] = []
    how = arithmetic(cfg)
    window, slow = list(prompt), reference.SlidingCache(params, how, cfg.n_ctx) if cfg.position != "fixed" else None
    logits = [slow.read(t) for t in prompt][-1] if slow else reference.forward(params, np.asarray(window), how)[-1]
    for _ in range(n):
        first, second = np.sort(logits)[::-1][:2]
        assert first - second > 1e-3, "a choice too close to call: take another seed"
        made.append(int(logits.argmax()))
        if slow:
            logits = slow.read(made[-1])
            continue
        window.append(made[-1])
        if len(window) > cfg.n_ctx:
            window = window[-(cfg.n_ctx // 2) :]
        logits = reference.forward(params, np.asarray(window), how)[-1]
    return made


@pytest.mark.parametrize("position", ["rotary", "fixed", "t5"])
def test_greedy_generation_beyond_the_context(position: str) -> None:
    cfg = architecture(position, n_ctx=9)
    params = params_of(cfg)
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 3, 7]]
    counts = [30, 22, 27]
    expected = [naive_greedy(params, cfg, p, n) for p, n in zip(prompts, counts, strict=True)]
    assert all(len(set(tokens)) > 3 for tokens in expected)
    options = [SamplingOptions(max_tokens=n, temperature=0.0) for n in counts]
    done = Generator(cfg, params, POLICY, None).generate(prompts, options)
    assert [c.tokens for c in done] == expected
    assert [c.finish_reason for c in done] == ["length"] * 3


def test_a_row_is_the_same_alone_and_in_company() -> None:
    cfg = architecture("rotary", n_ctx=9)
    generator = Generator(cfg, params_of(cfg), POLICY, None)
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 3, 7]]
    options = [SamplingOptions(max_tokens=7, temperature=1.5, seed=i) for i in range(3)]
    together = generator.generate(prompts, options)
    alone = [generator.generate([p], [o])[0] for p, o in zip(prompts, options, strict=True)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    other = generator.generate(prompts[:1], [dataclasses.replace(options[0], seed=100)])[0]
    assert other.tokens != alone[0].tokens
