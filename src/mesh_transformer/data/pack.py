"""Packing parts of ids into rows of one length, epoch after epoch: docs/formats.md, section 10, steps 5 to 8.

Only positions are moved about; the ids stay in the spool until a row is written.
"""

from __future__ import annotations

import dataclasses
import random
from array import array
from collections.abc import Callable, Iterator

import numpy as np

from mesh_transformer.data.spool import Spool

_ROWS_AT_ONCE = 256  # looked through for distinct ids


@dataclasses.dataclass
class Tally:
    """Counts of what packing made: rows of all epochs, those filtered out, and ids that the last epoch left over."""

    rows: int = 0
    filtered: int = 0
    trailing: int = 0


@dataclasses.dataclass(frozen=True)
class Stream:
    """Ranges of a spool, read as one sequence of ids: range i begins at `starts[i]` in the spool.

    It takes the places `bounds[i]` to `bounds[i + 1]` of the sequence; starts [n], bounds [n + 1], both int64.
    """

    spool: Spool
    starts: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of_ranges(cls, spool: Spool, starts: np.ndarray, lengths: np.ndarray) -> Stream:
        """The ranges one after the other."""
        return cls(spool, starts, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]))

    @classmethod
    def of_parts(cls, spool: Spool, order: array[int]) -> Stream:
        """The spool's parts in this order."""
        chosen = np.frombuffer(order, np.int64) if order else np.zeros(0, np.int64)
        starts = spool.starts()[chosen]
        return cls.of_ranges(spool, starts, spool.ends()[chosen] - starts)

    @property
    def size(self) -> int:
        """How many ids it has."""
        return int(self.bounds[-1])

    def ranges(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) in the spool of the places `begin` to `end`."""
        first = int(np.searchsorted(self.bounds, begin, "right")) - 1
        last = int(np.searchsorted(self.bounds, end, "left"))
        low = np.maximum(self.bounds[first:last], begin)
        high = np.minimum(self.bounds[first + 1 : last + 1], end)
        return self.starts[first:last] + low - self.bounds[first:last], high - low

    def read(self, begin: int, end: int) -> np.ndarray:
        """int32 [end - begin]."""
        return self.spool.read(*self.ranges(begin, end))

    def joined(self, places: list[tuple[int, int]]) -> Stream:
        """The places (begin, end), one after the other, as a stream of its own."""
        ranges = [self.ranges(begin, end) for begin, end in places]
        return Stream.of_ranges(
            self.spool, np.concatenate([starts for starts, _ in ranges]), np.concatenate([n for _, n in ranges])
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How rows are made.

    Args:
        width: ids in a row.
        min_unique: rows with fewer distinct ids are left out.
        n_epochs: one after the other, each packed anew.
        generator: of the shuffles; None keeps the order.
        pad: the last, incomplete row of an epoch is kept, filled up with this id; None drops it.
        dropped: called with each row that is left out for its few distinct ids.
    """

    width: int
    min_unique: int = 0
    n_epochs: int = 1
    generator: random.Random | None = None
    pad: int | None = None
    dropped: Callable[[np.ndarray], None] | None = None


def pack(spool: Spool, order: array[int], packing: Packing, tally: Tally) -> Iterator[np.ndarray]:
    """The rows of all epochs, int32 [width] each; `order` (the parts, already shuffled) is shuffled for the next ones.

    Where `pad` is given, the filling at the end of a row is `~pad`: it is not learned. `tally` is kept up.
    """
    generator, width = packing.generator, packing.width
    stream = Stream.of_parts(spool, order)
    for epoch in range(packing.n_epochs):
        is_last = epoch == packing.n_epochs - 1
        # The last 1 to `width` ids are left over, even when they would fill a row, as ever.
        count = max(0, -(-stream.size // width) - 1)
        kept = _kept_rows(stream, count, packing)
        tally.filtered += count - len(kept)
        shuffled = array("q", kept)
        if generator:
            generator.shuffle(shuffled)
        for row in shuffled:
            tally.rows += 1
            yield stream.read(row * width, (row + 1) * width)
        tally.trailing = stream.size - count * width
        # With the order kept, what is left over comes first in the next epoch.
        if packing.pad is not None and (generator or is_last) and tally.trailing > 1:
            tally.rows += 1
            yield padded(stream.read(count * width, stream.size), width, packing.pad)
            tally.trailing = 0
        if is_last:
            return
        if generator:
            generator.shuffle(order)
            stream = Stream.of_parts(spool, order)
        else:
            stream = stream.joined([(count * width, stream.size), *_runs(kept, width)])


def _kept_rows(stream: Stream, count: int, packing: Packing) -> np.ndarray | range:
    """The numbers of the rows with enough distinct ids, in order."""
    if packing.min_unique <= 0:
        return range(count)
    kept: list[np.ndarray] = [np.zeros(0, np.int64)]
    for first in range(0, count, _ROWS_AT_ONCE):
        n = min(_ROWS_AT_ONCE, count - first)
        rows = stream.read(first * packing.width, (first + n) * packing.width).reshape(n, packing.width)
        ordered = np.sort(rows, axis=1)
        enough = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1) >= packing.min_unique
        kept.append(first + np.flatnonzero(enough))
        if packing.dropped:
            for row in rows[~enough]:
                packing.dropped(row)
    return np.concatenate(kept)


def _runs(rows: np.ndarray | range, width: int) -> list[tuple[int, int]]:
    """The places of rows (in order), neighbours put together."""
    if isinstance(rows, range):
        return [(0, len(rows) * width)] if len(rows) else []
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(run[0]) * width, int(run[-1] + 1) * width) for run in np.split(rows, breaks) if run.size]


def padded(ids: np.ndarray, width: int, pad: int) -> np.ndarray:
    """int32 [width]: `ids` [at most width], then `~pad`, which the model reads as `pad` and does not learn."""
    return np.concatenate([ids, np.full(width - ids.size, ~pad, np.int32)]).astype(np.int32)


def one_each(spool: Spool, order: array[int], packing: Packing, tally: Tally) -> Iterator[np.ndarray]:
    """Each part a row of its own, int32 [width], filled up with `~pad`; the order is shuffled anew for later epochs."""
    assert packing.pad is not None
    starts, ends = spool.starts(), spool.ends()
    for epoch in range(packing.n_epochs):
        if epoch and packing.generator:
            packing.generator.shuffle(order)
        for part in order:
            tally.rows += 1
            start = starts[part : part + 1]
            yield padded(spool.read(start, ends[part : part + 1] - start), packing.width, packing.pad)
