"""The filters of candidates against plain ones that sort, over random rows, ties and edges."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.sample.methods import RowOptions, candidate_filter, legacy_filter

FILTERS = {"default": jax.jit(candidate_filter), "legacy": jax.jit(legacy_filter)}
# Two ways to add up float32 probabilities may differ by so much.
ROUNDING = 1e-6


def options_of(n: int, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0) -> RowOptions:
    row = lambda value, dtype: jnp.asarray(np.broadcast_to(np.asarray(value, dtype), n))  # noqa: E731
    return RowOptions(
        temperature=row(1, np.float32),
        top_k=row(top_k, np.int32),
        top_p=row(top_p, np.float32),
        min_p=row(min_p, np.float32),
        keys=jnp.zeros((n, 2), jnp.uint32),
        legacy=row(False, bool),
    )


def kept_by(sampler: str, logits: np.ndarray, **given: Any) -> np.ndarray:
    return np.asarray(FILTERS[sampler](jnp.asarray(logits, jnp.float32), options_of(len(logits), **given)))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def plain(
    sampler: str, logits: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What stays, [rows, vocab], found by sorting in float64; and rows where rounding decides, [rows]."""
    logits = logits.astype(np.float64)
    n_vocab = logits.shape[1]
    if sampler == "default":
        order = np.argsort(-logits, axis=-1, kind="stable")
    else:
        order = n_vocab - 1 - np.argsort(-logits[:, ::-1], axis=-1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=-1)
    rank = np.arange(n_vocab)[None, :]
    in_top_k = rank < np.where(top_k > 0, top_k, n_vocab)[:, None]
    share = softmax(np.where(in_top_k, ranked, -np.inf) if sampler == "default" else ranked)
    before = np.cumsum(share, axis=-1) - share
    limit = top_p.astype(np.float64)[:, None]
    below = before < limit if sampler == "default" else before <= limit
    kept = in_top_k & (below | (limit >= 1))
    share = np.where(kept, np.exp(ranked - ranked[:, :1]), 0)
    lowest = min_p.astype(np.float64)[:, None]
    kept &= share >= lowest
    doubtful = (np.abs(before - limit) <= ROUNDING) & in_top_k & (limit < 1) & (rank > 0)
    doubtful |= (np.abs(share - lowest) <= ROUNDING * lowest) & (lowest > 0) & (share < 1)
    out = np.zeros_like(kept)
    np.put_along_axis(out, order, kept | (rank == 0), axis=-1)
    return out, doubtful.any(axis=-1)


def random_options(random: np.random.Generator, n: int, n_vocab: int, sampler: str) -> dict[str, np.ndarray]:
    """Every filter on and off in every combination."""
    wide = np.exp(random.uniform(0, np.log(1.5 * n_vocab), n)).astype(np.int32)
    return {
        "top_k": np.where(random.random(n) < 0.5, wide, 0).astype(np.int32),
        "top_p": np.where(random.random(n) < 0.7, random.uniform(0, 1, n) ** 0.5, 1).astype(np.float32),
        "min_p": np.where(random.random(n) < 0.4, random.uniform(0, 1, n) ** 4, 0).astype(np.float32)
        * (sampler == "default"),
    }


def random_logits(random: np.random.Generator, kind: str, n: int, n_vocab: int) -> np.ndarray:
    x = random.choice([0.1, 1.0, 3.0, 10.0], (n, 1)) * random.standard_normal((n, n_vocab))
    if kind == "steps":
        x = np.round(x * 4) / 4
    elif kind == "few values":
        x = random.integers(-2, 2, (n, n_vocab)).astype(float)
    elif kind == "held off":
        x[random.random(x.shape) < 0.3] = -np.inf
        x[:, 0] = 0.0  # at least one is possible
    elif kind == "both zeros":
        x = np.where(random.random(x.shape) < 0.5, 0.0, -0.0) - (random.random(x.shape) < 0.5)
    return x.astype(np.float32)


def exact_cut(random: np.random.Generator, logits: np.ndarray) -> float:
    """The mass before some candidate, below 1."""
    share = np.sort(softmax(logits.astype(np.float64)))[::-1]
    before = np.cumsum(share) - share
    return float(random.choice(before[before < 0.999]))


# ------------------------------------------------------------------------------------------ against sorting


@pytest.mark.parametrize("sampler", FILTERS)
@pytest.mark.parametrize("kind", ["plain", "steps", "few values", "held off", "both zeros"])
def test_what_stays_is_what_sorting_keeps(kind: str, sampler: str) -> None:
    random = np.random.default_rng(0)
    n_sure = 0
    for n, n_vocab in ((1000, 9), (400, 200), (100, 3000)):
        logits = random_logits(random, kind, n, n_vocab)
        given = random_options(random, n, n_vocab, sampler)
        expected, doubtful = plain(sampler, logits, **given)
        kept = kept_by(sampler, logits, **given)
        wrong = (kept != expected).any(axis=-1) & ~doubtful
        assert not wrong.any(), (n_vocab, np.flatnonzero(wrong), {k: v[wrong] for k, v in given.items()})
        n_sure += int((~doubtful).sum())
        assert len(set(kept.sum(axis=-1).tolist())) >= min(n_vocab, 40)
    assert n_sure > 1000


@pytest.mark.parametrize("sampler", FILTERS)
@pytest.mark.parametrize("kind", ["plain", "steps"])
def test_what_stays_of_a_whole_vocabulary(kind: str, sampler: str) -> None:
    random = np.random.default_rng(1)
    logits = random_logits(random, kind, 16, 50_400)
    given = random_options(random, 16, 50_400, sampler)
    expected, doubtful = plain(sampler, logits, **given)
    assert (~doubtful).sum() >= 8
    np.testing.assert_array_equal(kept_by(sampler, logits, **given)[~doubtful], expected[~doubtful])


@pytest.mark.parametrize("sampler", FILTERS)
def test_a_cut_is_as_near_as_rounding_allows(sampler: str) -> None:
    """Where rounding decides, a cut falls one candidate earlier or later, never further."""
    random = np.random.default_rng(2)
    logits = random_logits(random, "steps", 100, 3000)
    given = random_options(random, 100, 3000, sampler) | {"min_p": np.zeros(100, np.float32)}
    # Cuts that are met exactly, or as nearly as float32 can say.
    given["top_p"] = np.asarray([exact_cut(random, row) for row in logits], np.float32)
    expected, _ = plain(sampler, logits, **given)
    assert (kept_by(sampler, logits, **given) != expected).sum(axis=-1).max() <= 1


# ------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("sampler", FILTERS)
def test_of_equal_logits_the_first_stay(sampler: str) -> None:
    """Legacy counts from the other end. 8 of 32 is a top_p that is met exactly: legacy keeps the next one too."""
    flat = np.full((1, 32), 1.5)
    first = (lambda m: list(range(m))) if sampler == "default" else (lambda m: list(range(32 - m, 32)))
    keep = lambda **given: np.flatnonzero(kept_by(sampler, flat, **given)[0]).tolist()  # noqa: E731
    for m in (1, 2, 31, 32):
        assert keep(top_k=m) == first(m)
    assert keep(top_k=33) == keep(top_k=2**31 - 1) == keep() == first(32)
    assert keep(top_p=0.0) == first(1)
    assert keep(top_p=0.25) == first(8 if sampler == "default" else 9)
    assert keep(top_p=0.24) == first(8)
    assert keep(top_p=0.99) == first(32)
    assert keep(top_k=8, top_p=0.5) == first(4 if sampler == "default" else 8)


@pytest.mark.parametrize("sampler", FILTERS)
@pytest.mark.parametrize("given", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-38}, {"top_p": 1e-9}], ids=str)
def test_the_likeliest_always_stays(given: dict[str, Any], sampler: str) -> None:
    random = np.random.default_rng(3)
    logits = random_logits(random, "plain", 100, 3000)
    kept = kept_by(sampler, logits, **given)
    np.testing.assert_array_equal(kept.sum(axis=-1), 1)
    np.testing.assert_array_equal(kept.argmax(axis=-1), logits.argmax(axis=-1))


def test_min_p_of_one_keeps_the_equals_of_the_likeliest() -> None:
    logits = np.asarray([[0.0, 3.0, 2.999, 3.0, -np.inf]])
    assert kept_by("default", logits, min_p=1.0).tolist() == [[False, True, False, True, False]]
    assert kept_by("default", logits, min_p=1.0, top_k=1).tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize("sampler", FILTERS)
def test_huge_and_tiny_spreads(sampler: str) -> None:
    """Weights that underflow to nothing are ranked all the same, by their logits."""
    logits = np.asarray([[0.0, -3e38, -200.0, -np.inf, -1000.0, -201.0], [1e-30, 0.0, 2e-30, -1e-30, 3e38, 3e38]])
    kept = kept_by(sampler, logits, top_k=4)
    assert kept[0].tolist() == [True, False, True, False, True, True]
    assert kept[1].tolist() == [True, False, True, False, True, True]
    kept = kept_by(sampler, logits, top_p=0.9)
    assert kept.tolist() == [[True] + 5 * [False], 4 * [False] + [True, True]]


@pytest.mark.parametrize("sampler", FILTERS)
def test_a_top_p_just_below_one_drops_only_what_has_no_mass(sampler: str) -> None:
    just_below = np.nextafter(np.float32(1), np.float32(0))
    logits = np.asarray([[0.0, 0.0, 0.0, -200.0, -np.inf]])
    assert kept_by(sampler, logits, top_p=just_below)[0, :3].all()
    random = np.random.default_rng(4)
    many = random_logits(random, "plain", 100, 3000)
    lost = np.where(kept_by(sampler, many, top_p=just_below), 0, softmax(many.astype(np.float64))).sum(axis=-1)
    assert lost.max() < 2 * ROUNDING


# ------------------------------------------------------------------------------------------ neighbours


@pytest.mark.parametrize("sampler", FILTERS)
def test_a_row_is_the_same_beside_any_others(sampler: str) -> None:
    """Also in batches of other sizes, and with neighbours whose ties, options or extremes send them other ways."""
    random = np.random.default_rng(5)
    n, n_vocab = 64, 1003
    logits = np.concatenate([random_logits(random, kind, 16, n_vocab) for kind in ("plain", "steps", "held off")])
    logits = np.concatenate([logits, np.zeros((16, n_vocab), np.float32)])
    given = random_options(random, n, n_vocab, sampler)
    # Half of the cuts hang on rounding.
    for row in range(0, n, 2):
        given["top_p"][row] = exact_cut(random, logits[row])
    together = kept_by(sampler, logits, **given)
    for size in (1, 2, 16):
        rows = random.permutation(n)[:size]
        of_rows = {name: values[rows] for name, values in given.items()}
        np.testing.assert_array_equal(kept_by(sampler, logits[rows], **of_rows), together[rows])
    shuffled = random.permutation(n)
    of_rows = {name: values[shuffled] for name, values in given.items()}
    np.testing.assert_array_equal(kept_by(sampler, logits[shuffled], **of_rows), together[shuffled])


@pytest.mark.parametrize("keep", [candidate_filter, legacy_filter])
def test_nothing_is_sorted(keep: Any) -> None:
    assert not re.search(r"\b(sort|top_k)\[", str(jax.make_jaxpr(keep)(jnp.zeros((4, 64)), options_of(4))))
