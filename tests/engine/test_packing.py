"""Rows as trees: every path in them is a text, no token stands twice, and every width and count is one of few."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mesh_transformer.engine.packing import Pack, Pair, batches, pack, padded_width


def paths(row: Pack) -> dict[int, list[int]]:
    """Of every node, the tokens from the root to it, by the definition of `ends`."""
    return {i: [row.tokens[j] for j in range(i + 1) if i < row.ends[j]] for i in range(len(row.tokens))}


def read_back(pairs: list[Pair], rows: list[Pack]) -> list[list[tuple[list[int], int]]]:
    """Of every text: what stands before each scored token, and the token, in order."""
    found: list[list[tuple[list[int], int]]] = [[] for _ in pairs]
    for row in rows:
        before = paths(row)
        assert row.positions == [len(before[i]) - 1 for i in range(len(row.tokens))]
        for pick in row.picks:
            found[pick.text].append((before[pick.node], pick.target))
    return found


def texts(seed: int, n: int, letters: int) -> list[Pair]:
    """Random pairs of few letters, so that many begin alike and some are prefixes of others."""
    chosen = random.Random(seed)
    made = [[chosen.randrange(letters) for _ in range(chosen.randint(2, 14))] for _ in range(n)]
    return [Pair(ids[:cut], ids[cut:]) for ids in made for cut in [chosen.randint(max(1, len(ids) - 8), len(ids) - 1)]]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("seed", "letters"), [(0, 1), (1, 2), (2, 3), (3, 9)])
def test_every_text_stands_in_a_row(seed: int, letters: int, shared: bool) -> None:
    pairs, n_ctx = texts(seed, 80, letters), 8
    rows = pack(pairs, n_ctx, shared=shared)
    for pair, found in zip(pairs, read_back(pairs, rows), strict=True):
        whole = [*pair.context, *pair.continuation][-(n_ctx + 1) :]
        n = len(pair.continuation)
        assert found == [(whole[: len(whole) - n + i], whole[len(whole) - n + i]) for i in range(n)]
    assert [len(row.tokens) for row in rows] == sorted((len(row.tokens) for row in rows), reverse=True)
    assert max(len(row.tokens) for row in rows) <= n_ctx
    assert (len(rows) == len(pairs)) is not shared


def test_what_is_shared_stands_once() -> None:
    context = list(range(10, 20))
    pairs = [Pair(context, [1]), Pair(context, [2, 3]), Pair(context, [2, 4]), Pair(context, [5]), Pair([7, 8], [9])]
    shared, alone = pack(pairs, 32)
    assert shared.tokens == [*context, 2] and len(shared.picks) == 6
    assert alone.tokens == [7, 8]
    # Three of the four answers begin after the same token, two have the same second one.
    assert sorted((pick.node, pick.target) for pick in shared.picks) == [
        (9, 1),
        (9, 2),
        (9, 2),
        (9, 5),
        (10, 3),
        (10, 4),
    ]


def test_little_in_common_is_not_shared() -> None:
    a, b = [1, *range(10, 20)], [1, *range(20, 30)]
    assert len(pack([Pair(a, [2]), Pair(b, [2])], 64)) == 2
    assert len(pack([Pair([*a[:3], 5], [2]), Pair([*a[:3], 6], [2])], 64)) == 1


def test_a_row_of_several_texts_is_no_longer_than_the_context() -> None:
    pairs = [Pair([1, 2, 3, 4, 5, 6, n], [0]) for n in range(7, 20)]
    rows = pack(pairs, 10)
    assert max(len(row.tokens) for row in rows) == 10
    assert len(rows) == 4  # six in common and four of their own


def test_widths_are_few() -> None:
    widths = [padded_width(n, 2000) for n in range(1, 2001)]
    assert all(width >= n for n, width in enumerate(widths, 1))
    assert sorted(set(widths)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2000]


def test_batches_hold_every_row_and_padding_that_sees_itself() -> None:
    pairs = [Pair([n, *range(40, 40 + n % 30)], [1]) for n in range(30)]
    rows = pack(pairs, 64, shared=False)
    seen = 0
    shapes = set()
    for values, those in batches(rows, 128, 2, 64):
        assert values.shape[0] % 2 == 0 and values.shape[0] >= len(those)
        assert values.shape[0] * values.shape[2] <= 128 or values.shape[0] == 2
        shapes.add(values.shape)
        for row, each in zip(values, those, strict=False):
            n = len(each.tokens)
            np.testing.assert_array_equal(row[:, :n], [each.tokens, each.positions, each.ends])
            np.testing.assert_array_equal(row[2, n:], np.arange(n, values.shape[2]) + 1)
        seen += len(those)
    assert seen == len(rows) and len(shapes) <= 4
    assert max(len(values) for values, _ in batches(rows, 128, 2, 64, most_rows=1)) == 2
