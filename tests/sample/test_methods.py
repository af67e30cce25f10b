"""Sampling against brute force over a small vocabulary, and the way from tokens to text."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.data.tokenizer import Tokenizer, load_tokenizer
from mesh_transformer.sample.methods import RowOptions, candidate_filter, legacy_filter, next_tokens
from mesh_transformer.sample.text import TextStream

N_DRAWS = 20_000
LOGITS = np.asarray([0.3, -1.2, 2.0, 1.1, -0.4, 1.7, 0.0, -2.5, 0.9, 1.4], np.float32)


def row_options(n: int, seed: int = 0, **given: Any) -> RowOptions:
    """The same options for n rows unless an array is given; every row has a key of its own."""
    fields = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "legacy": False} | given
    return RowOptions(
        temperature=jnp.broadcast_to(jnp.asarray(fields["temperature"], jnp.float32), n),
        top_k=jnp.broadcast_to(jnp.asarray(fields["top_k"], jnp.int32), n),
        top_p=jnp.broadcast_to(jnp.asarray(fields["top_p"], jnp.float32), n),
        min_p=jnp.broadcast_to(jnp.asarray(fields["min_p"], jnp.float32), n),
        keys=jax.random.key_data(jax.random.split(jax.random.key(seed), n)),
        legacy=jnp.broadcast_to(jnp.asarray(fields["legacy"]), n),
    )


pick = jax.jit(next_tokens)


def draw(logits: np.ndarray, position: int = 0, **given: Any) -> np.ndarray:
    """One token for each of many keys; the vocabulary is filled up with ids that are never likely."""
    full = np.full(len(LOGITS), -60, np.float32)
    full[: len(logits)] = logits
    rows = jnp.broadcast_to(jnp.asarray(full), (N_DRAWS, len(full)))
    positions = jnp.full(N_DRAWS, position, jnp.int32)
    return np.asarray(pick(rows, positions, row_options(N_DRAWS, **given)))


def softmax(x: Sequence[float]) -> list[float]:
    top = max(x)
    e = [math.exp(v - top) for v in x]
    return [v / sum(e) for v in e]


def default_distribution(
    logits: Sequence[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """Temperature, top-k, top-p, min-p, each acting on what is left; of equals the lower id ranks first."""
    scaled = [float(x) / temperature for x in logits]
    kept = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if top_k:
        kept = kept[:top_k]
    if top_p < 1:
        mass, enough = 0.0, []
        for i, p in zip(kept, softmax([scaled[i] for i in kept]), strict=True):
            if not enough or mass < top_p:
                enough.append(i)
            mass += p
        kept = enough
    shares = softmax([scaled[i] for i in kept])
    kept = [i for i, p in zip(kept, shares, strict=True) if p >= min_p * shares[0]]
    return on_vocabulary(kept, scaled)


def legacy_distribution(
    logits: Sequence[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> list[float]:
    """Top-k and top-p, both by the raw logits' probabilities, then temperature; of equals the higher id is first."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], -i))
    probability = softmax(logits)
    kept, mass = [], 0.0
    for rank, i in enumerate(order):
        if (not top_k or rank < top_k) and (rank == 0 or mass <= top_p):
            kept.append(i)
        mass += probability[i]
    return on_vocabulary(kept, [float(x) / temperature for x in logits])


def on_vocabulary(kept: list[int], scaled: Sequence[float]) -> list[float]:
    shares = dict(zip(kept, softmax([scaled[i] for i in kept]), strict=True))
    return [shares.get(i, 0.0) for i in range(len(scaled))]


def assert_drawn_from(tokens: np.ndarray, expected: Sequence[float]) -> None:
    """Nothing impossible, everything possible, and shares within four and a half standard errors."""
    p = np.asarray(expected)
    shares = np.bincount(tokens, minlength=len(p)) / len(tokens)
    assert (shares[p == 0] == 0).all(), shares
    assert (np.abs(shares - p) <= 4.5 * np.sqrt(p * (1 - p) / len(tokens)) + 1e-12).all(), (shares, p)


# ------------------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_k": 1},
        {"top_k": 50},
        {"top_p": 0.6},
        {"top_p": 0.05},
        {"top_p": 0.0},
        {"min_p": 0.3},
        {"min_p": 1.0},
        # In another order each of these would keep other candidates.
        {"temperature": 2.0, "top_p": 0.6},
        {"top_k": 4, "top_p": 0.75},
        {"temperature": 0.6, "min_p": 0.4},
        {"temperature": 1.5, "top_k": 7, "top_p": 0.8, "min_p": 0.35},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(given: dict[str, Any]) -> None:
    assert_drawn_from(draw(LOGITS, **given), default_distribution(LOGITS.tolist(), **given))


def test_the_order_of_filters_shows_in_these_options() -> None:
    """That the cases above would notice: what another order keeps is something else."""
    logits = LOGITS.tolist()
    assert default_distribution(logits, temperature=2.0, top_p=0.6) != legacy_distribution(logits, 2.0, top_p=0.6)
    both = default_distribution(logits, top_k=4, top_p=0.75)
    assert sum(p > 0 for p in both) < min(4, sum(p > 0 for p in default_distribution(logits, top_p=0.75)))
    hot, cold = (default_distribution(logits, temperature=t, min_p=0.4) for t in (1.0, 0.6))
    assert sum(p > 0 for p in hot) != sum(p > 0 for p in cold)


@pytest.mark.parametrize(
    "given",
    [
        {"top_p": 0.6},
        {"top_p": 0.6, "temperature": 2.0},
        {"top_k": 4, "top_p": 0.75},
        {"top_k": 4, "temperature": 0.5},
        {"top_p": 0.0},
    ],
    ids=str,
)
def test_legacy_draws_follow_the_legacy_distribution(given: dict[str, Any]) -> None:
    assert_drawn_from(draw(LOGITS, legacy=True, **given), legacy_distribution(LOGITS.tolist(), **given))


def test_legacy_top_p_counts_what_top_k_removed() -> None:
    """0.3, 0.25, 0.25, 0.2: after top-k 3 the first two hold 0.6875 of what is left, but 0.55 of the whole."""
    logits = np.log(np.asarray([0.3, 0.26, 0.24, 0.2], np.float32))
    given = {"top_k": 3, "top_p": 0.6}
    assert set(draw(logits, legacy=True, **given).tolist()) == {0, 1, 2}
    assert set(draw(logits, **given).tolist()) == {0, 1}


def test_legacy_top_k_removes_token_zero() -> None:
    logits = np.asarray([1.0, 1.1, 1.2, 1.3], np.float32)
    assert set(draw(logits, legacy=True, top_k=2).tolist()) == {2, 3}


def test_of_equal_logits_the_lower_id_ranks_first_and_in_legacy_the_higher() -> None:
    logits = np.asarray([0.0, 1.0, 1.0, 1.0, 0.0], np.float32)
    assert set(draw(logits, top_k=2).tolist()) == {1, 2}
    assert set(draw(logits, legacy=True, top_k=2).tolist()) == {2, 3}
    assert set(draw(logits, top_p=0.1).tolist()) == {1}
    assert set(draw(logits, legacy=True, top_p=0.1).tolist()) == {3}


def test_greedy_takes_the_lower_of_equals() -> None:
    logits = np.asarray([0.0, 2.0, -1.0, 2.0], np.float32)
    for legacy in (False, True):
        for given in ({}, {"top_k": 3, "top_p": 0.5}):
            assert set(draw(logits, legacy=legacy, temperature=0.0, **given).tolist()) == {1}


@pytest.mark.parametrize("sampler", ["default", "legacy"])
def test_a_filter_against_brute_force_on_random_rows(sampler: str) -> None:
    rng = np.random.default_rng(6)
    n = 400
    logits = (2 * rng.standard_normal((n, 9))).astype(np.float32)
    top_k, top_p = rng.integers(0, 12, n), rng.choice([0.2, 0.5, 0.8, 0.95, 1.0], n)
    min_p = rng.choice([0.0, 0.05, 0.3], n) if sampler == "default" else np.zeros(n)
    options = row_options(n, top_k=top_k, top_p=top_p, min_p=min_p)
    keep = candidate_filter if sampler == "default" else legacy_filter
    kept = np.asarray(jax.jit(keep)(jnp.asarray(logits), options))
    for row in range(n):
        x, k, p = logits[row].tolist(), int(top_k[row]), float(top_p[row])
        if sampler == "default":
            expected = default_distribution(x, 1.0, k, p, float(min_p[row]))
        else:
            expected = legacy_distribution(x, 1.0, k, p)
        assert kept[row].tolist() == [share > 0 for share in expected], row


@pytest.mark.parametrize("keep", [candidate_filter, legacy_filter])
def test_filters_that_are_off_keep_everything(keep: Any) -> None:
    """Even where rounding makes the mass of the likelier candidates a whole one, or more."""
    peaked = np.linspace(0, -80, 300, dtype=np.float32)
    flat = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    for logits in (peaked, flat):
        assert bool(keep(jnp.asarray(logits[None]), row_options(1)).all())


# ------------------------------------------------------------------------------------------ rows and streams


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(2)
    n = 64
    logits = jnp.asarray(rng.standard_normal((n, 10)), jnp.float32)
    positions = jnp.arange(n, dtype=jnp.int32)
    options = row_options(
        n,
        temperature=rng.choice([0.0, 0.5, 1.0, 2.0], n),
        top_k=rng.integers(0, 6, n),
        top_p=rng.choice([0.5, 0.9, 1.0], n),
        min_p=rng.choice([0.0, 0.2], n),
        legacy=rng.choice([False, True], n),
    )
    together = np.asarray(pick(logits, positions, options))
    order = rng.permutation(n)
    shuffled = jax.tree.map(lambda a: a[order], options)
    other = np.asarray(pick(logits[order], positions[order], shuffled))
    np.testing.assert_array_equal(other, together[order])
    one = jax.tree.map(lambda a: a[5:6], options)
    assert int(pick(logits[5:6], positions[5:6], one)[0]) == together[5]


def test_rows_have_their_own_options() -> None:
    rows = jnp.broadcast_to(jnp.asarray(LOGITS), (N_DRAWS, len(LOGITS)))
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 2},
        {"top_p": 0.5, "temperature": 0.7},
        {"min_p": 0.5},
        {"legacy": True, "top_p": 0.5, "temperature": 0.7},
    ]
    of_row = [kinds[i % 5] for i in range(N_DRAWS)]
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "legacy": False}
    options = row_options(N_DRAWS, **{k: np.asarray([o.get(k, v) for o in of_row]) for k, v in defaults.items()})
    tokens = np.asarray(pick(rows, jnp.zeros(N_DRAWS, jnp.int32), options))
    assert set(tokens[0::5].tolist()) == {int(LOGITS.argmax())}
    for i in (1, 2, 3):
        assert_drawn_from(tokens[i::5], default_distribution(LOGITS.tolist(), **kinds[i]))
    assert_drawn_from(tokens[4::5], legacy_distribution(LOGITS.tolist(), 0.7, top_p=0.5))


def test_seed_and_position_decide_the_draw() -> None:
    again = functools.partial(draw, LOGITS, top_k=8)
    first = again(seed=1)
    np.testing.assert_array_equal(first, again(seed=1))
    chance = sum(p * p for p in default_distribution(LOGITS.tolist(), top_k=8))
    # Other draws agree as often as two independent ones do.
    for other in (again(seed=2), again(seed=1, position=1), np.roll(first, 1)):
        assert (first == other).mean() == pytest.approx(chance, abs=0.02)


@pytest.mark.parametrize("legacy", [False, True])
def test_filters_that_are_off_change_nothing_beside_rows_that_filter(legacy: bool) -> None:
    """The filters are computed for all rows or for none."""
    alone = draw(LOGITS, legacy=legacy, temperature=0.8)
    top_k = np.arange(N_DRAWS) % 2
    beside = draw(LOGITS, legacy=legacy, temperature=0.8, top_k=top_k)
    np.testing.assert_array_equal(beside[top_k == 0], alone[top_k == 0])
    assert set(beside[top_k == 1].tolist()) == {int(LOGITS.argmax())}


def test_a_logit_of_minus_infinity_is_never_drawn() -> None:
    logits = LOGITS.copy()
    logits[2] = -np.inf
    for given in ({}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 9}, {"legacy": True, "top_p": 0.9}):
        assert 2 not in draw(logits, temperature=5.0, **given)
    assert set(draw(logits, temperature=0.0).tolist()) == {5}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    for legacy in (False, True):
        for top_p in (0.999, 1.0):
            tokens = draw(100 * LOGITS + 50, legacy=legacy, temperature=temperature, top_p=top_p)
            assert set(tokens.tolist()) == {int(LOGITS.argmax())}


# ------------------------------------------------------------------------------------------ text


BYTES = load_tokenizer("bytes")


class Pieces(Tokenizer):
    """Token ids are places in a list of byte strings."""

    sha256 = ""

    def __init__(self, *pieces: bytes) -> None:
        super().__init__(name="pieces", n_vocab=len(pieces), end_of_text=None)
        object.__setattr__(self, "pieces", pieces)

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]

    def _encode_batch(self, texts: list[str], allow_special: bool) -> list[list[int]]:
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        raise NotImplementedError


def run(stream: TextStream, ids: Sequence[int]) -> list[str]:
    """What every token gave, then what the end gave."""
    given = []
    for token in ids:
        given.append(stream.push(token))
        if stream.stopped:
            break
    return [*given, stream.flush()]


def test_text_comes_as_its_tokens_do() -> None:
    stream = TextStream(BYTES)
    assert run(stream, b"abc") == ["a", "b", "c", ""]
    assert stream.text == "abc"
    assert not stream.stopped


def test_a_character_comes_whole() -> None:
    stream = TextStream(BYTES)
    assert run(stream, "é€🙂".encode()) == ["", "é", "", "", "€", "", "", "", "🙂", ""]
    assert stream.text == "é€🙂"


def test_an_unfinished_character_comes_at_the_end() -> None:
    stream = TextStream(BYTES)
    assert run(stream, b"a\xe2\x82") == ["a", "", "", "\ufffd"]
    assert stream.text == "a\ufffd"


def test_a_stop_string_across_tokens_is_cut_off() -> None:
    stream = TextStream(Pieces(b"one\n", b"\ntwo", b"x"), stop=("\n\n",))
    assert run(stream, [2, 0, 1, 2]) == ["x", "one", "", ""]
    assert stream.stopped
    assert stream.text == "xone"
    assert stream.push(2) == ""
    assert stream.text == "xone"


def test_text_that_did_not_become_a_stop_string_is_handed_out() -> None:
    stream = TextStream(Pieces(b"a", b"EN", b"D", b"T"), stop=("END",))
    assert run(stream, [0, 1, 3, 1]) == ["a", "", "ENT", "", "EN"]
    assert (stream.text, stream.stopped) == ("aENTEN", False)


def test_the_first_of_several_stop_strings_counts() -> None:
    stream = TextStream(Pieces(b"say BYE and END now"), stop=("END", "BYE"))
    assert run(stream, [0]) == ["say ", ""]
    assert stream.stopped


def test_a_stop_string_that_overlaps_itself() -> None:
    stream = TextStream(BYTES, stop=("aab",))
    assert "".join(run(stream, b"aaab")) == stream.text == "a"
    assert stream.stopped


def test_a_stop_string_of_several_bytes_a_character() -> None:
    stream = TextStream(BYTES, stop=("🙂!",))
    assert "".join(run(stream, "é🙂🙂!x".encode())) == stream.text == "é🙂"


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, stop=("a",))
    assert run(stream, [1, 2, 3]) == ["", "", "", ""]
    assert stream.text == ""


def test_random_text_in_random_tokens_with_random_stop_strings() -> None:
    rng = random.Random(0)
    for _ in range(400):
        text = "".join(rng.choice("ab€🙂") for _ in range(rng.randrange(30)))
        raw = text.encode()
        cuts = sorted(rng.sample(range(len(raw) + 1), min(len(raw), rng.randrange(12))))
        pieces = [raw[i:j] for i, j in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        stops = tuple("".join(rng.choice("ab€") for _ in range(rng.randint(1, 4))) for _ in range(rng.randrange(3)))
        stream = TextStream(Pieces(*pieces), stop=stops)
        given = run(stream, range(len(pieces)))
        ends = [at for s in stops if (at := text.find(s)) >= 0]
        assert "".join(given) == stream.text == text[: min(ends, default=len(text))]
        assert stream.stopped == bool(ends)


def test_stray_bytes_do_not_break_the_character_after_them() -> None:
    for raw in (b"\xff\xf0\x9f\x99\x82", b"\x80\xe2\x82\xac", b"\xc3\xc3\xa9", b"\xff\xff\xff\xf0\x9f\x99\x82x"):
        stream = TextStream(BYTES)
        assert "".join(run(stream, raw)) == raw.decode("utf-8", errors="replace")
