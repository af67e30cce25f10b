"""Texts to be scored as rows of tokens in which what several texts begin with stands once.

A row is a tree in depth-first order: a text is the path from the root to one of its nodes. Node j stands before node
i of the same text exactly if j <= i < ends[j], where ends[j] is the first place after everything that follows j; so a
mask needs one whole number a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mesh_transformer.config.errors import UserError

_SMALLEST_WIDTH = 16
# A text joins those before it where it shares this part of its tokens with them.
_LEAST_SHARED = 0.25


class Pair(NamedTuple):
    """Token ids of a context and of the continuation that is scored after it; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Pick(NamedTuple):
    """One scored token: it is the `target` after node `node`, and belongs to text number `text`."""

    node: int
    target: int
    text: int


@dataclasses.dataclass
class Pack:
    """One row: ids, their positions in their texts, and `ends` as above; and what is scored in it."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)
    picks: list[Pick] = dataclasses.field(default_factory=list)
    path: list[int] = dataclasses.field(default_factory=list)  # nodes of the text added last

    def add(self, inputs: Sequence[int], n_shared: int, scored: Sequence[int], text: int) -> None:
        """Adds a text whose first `n_shared` tokens are those of the text added last.

        scored: the tokens to score; the last of them follows the last of `inputs`.
        """
        for node in self.path[n_shared:]:
            self.ends[node] = len(self.tokens)
        del self.path[n_shared:]
        for position in range(n_shared, len(inputs)):
            self.path.append(len(self.tokens))
            self.tokens.append(inputs[position])
            self.positions.append(position)
            self.ends.append(0)
        first = len(inputs) - len(scored)
        self.picks += [Pick(self.path[first + i], target, text) for i, target in enumerate(scored)]

    def close(self) -> None:
        """Ends what is still open; called once, after the last text."""
        for node in self.path:
            self.ends[node] = len(self.tokens)
        self.path.clear()


def pack(pairs: Sequence[Pair], n_ctx: int, *, shared: bool = True) -> list[Pack]:
    """The rows for all pairs, the longest first. Of a text longer than the context plus one, the newest tokens count.

    Args:
        n_ctx: the longest text that a model reads at once; no row of several texts is longer.
        shared: whether texts share what they begin with; otherwise every text has a row of its own.

    Raises:
        UserError: a continuation is empty or longer than the context, or nothing stands before it.
    """
    inputs = [_inputs(pair, n_ctx) for pair in pairs]
    order = sorted(range(len(pairs)), key=inputs.__getitem__) if shared else list(range(len(pairs)))
    packs: list[Pack] = []
    before: tuple[int, ...] = ()
    for text in order:
        now = inputs[text]
        n_shared = _n_shared(before, now) if shared else 0
        grown = len(packs[-1].tokens) + len(now) - n_shared if packs else 0
        if not packs or n_shared < max(1.0, _LEAST_SHARED * len(now)) or (grown > n_ctx and n_shared < len(now)):
            packs.append(Pack())
            n_shared = 0
        packs[-1].add(now, n_shared, pairs[text].continuation, text)
        before = now
    for each in packs:
        each.close()
    return sorted(packs, key=lambda each: -len(each.tokens))


def _inputs(pair: Pair, n_ctx: int) -> tuple[int, ...]:
    """What the model reads: everything but the last token, and of it no more than the context holds."""
    n = len(pair.continuation)
    if not n or not len(pair.context):
        raise UserError("a log-likelihood needs at least one token of context and one of continuation")
    if n > n_ctx:
        raise UserError(f"the continuation has {n} tokens but the model's context holds {n_ctx}; split it")
    return (*pair.context, *pair.continuation)[-(n_ctx + 1) : -1]


def _n_shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n  # the first `low` agree, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low


def padded_width(n: int, most: int) -> int:
    """What a row of `n` tokens is padded to: one of few widths, so that few shapes are compiled."""
    power = 1 << max(0, n - 1).bit_length()
    three_quarters = power // 4 * 3
    return min(most, max(_SMALLEST_WIDTH, three_quarters if n <= three_quarters else power))


def batches(
    packs: Sequence[Pack], most_tokens: int, ways: int, most: int, most_rows: int | None = None
) -> Iterator[tuple[np.ndarray, list[Pack]]]:
    """Rows of about `most_tokens` tokens at a time: int32 [rows, 3, width] (ids, positions, ends) and their packs.

    Args:
        packs: the longest first.
        ways: the number of rows is a multiple of it.
        most: the widest row.
        most_rows: of each of the `ways`, if that is less.
    """
    at = 0
    while at < len(packs):
        width = padded_width(len(packs[at].tokens), most)
        n_rows = max(1, most_tokens // width // ways)
        n_rows = min(n_rows, most_rows or n_rows) * ways
        those = list(packs[at : at + n_rows])
        # What is left at the end computes no more rows than the next power of two.
        n_rows = min(n_rows, (1 << (-(-len(those) // ways) - 1).bit_length()) * ways)
        rows = np.zeros((n_rows, 3, width), np.int32)
        rows[:, 2] = np.arange(1, width + 1)  # padding sees itself alone
        for row, each in zip(rows, those, strict=False):
            n = len(each.tokens)
            row[0, :n], row[1, :n], row[2, :n] = each.tokens, each.positions, each.ends
        yield rows, those
        at += len(those)
