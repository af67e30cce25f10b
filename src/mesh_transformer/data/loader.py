"""Batches of sequences: shuffled and resumable for training, one ordered pass for validation."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from mesh_transformer.config.errors import ConfigError, DataError
from mesh_transformer.data.mixture import Mixture, Sequences

# (threads, batches ahead): over a network it is the waiting that takes the time, so that more are asked for at once.
_LOCAL, _REMOTE = (2, 4), (8, 8)


class TrainLoader:
    """An endless stream of sequences that can be entered anywhere in constant time.

    Element i of the stream depends on i, the seed and the data alone, never on the batch size or on who reads which
    rows. One data set: i lies in epoch i // len(source), and every epoch has a permutation of its own. A mixture: the
    weights say which set has the i-th turn, and each set goes through epochs and permutations of its own. Batches run
    on over the end of an epoch, so nothing is dropped.

    Args:
        source: the data set or mixture.
        seed: any integer; another seed is another order.
        batch_size: sequences in a batch, over all processes.
        rows: which rows of every batch this process reads, ascending numbers in 0..batch_size-1; None: all. Nothing
            else is read. Several processes may read the same rows.
        shuffle: False: every epoch, of each set, is in file order.

    Raises:
        DataError: the data set has fewer sequences than one batch.
        ConfigError: the batch size is below 1.
        ValueError: `rows` are not as described.
    """

    def __init__(
        self,
        source: Sequences,
        *,
        seed: int,
        batch_size: int,
        rows: Sequence[int] | None = None,
        shuffle: bool = True,
    ) -> None:
        _check_batch(source, batch_size)
        self.source = source
        self.batch_size = batch_size
        self._rows = _checked_rows(rows, batch_size)
        self._order = _order(source, seed, shuffle)

    def batches(self, position: int = 0) -> Generator[np.ndarray]:
        """Batches from `position` on, the number of sequences already consumed by all processes together.

        Closing the iterator stops its reading threads.

        Returns:
            An endless iterator of int32 [rows, T + 1].

        Raises:
            DataError: from the iterator, when a record cannot be used.
        """
        if not 0 <= position < sys.maxsize:
            raise ConfigError(f"data position {position} must be at least 0")
        n_batches = (sys.maxsize - position) // self.batch_size
        return _iterate(_Batches(self.source, self._order, position, n_batches, self.batch_size, self._rows))


def stream_fingerprint(source: Sequences, shuffle: bool) -> str:
    """Hex sha256 of all that the order of the stream depends on beside the seed: what must stay for a run to go on."""
    if shuffle:
        return source.fingerprint
    return hashlib.sha256(f"in file order\n{source.fingerprint}".encode()).hexdigest()


def validation_batches(
    source: Sequences, batch_size: int, max_batches: int | None = None, *, rows: Sequence[int] | None = None
) -> Generator[np.ndarray]:
    """One pass in file order over at most `max_batches` whole batches (None: all); the rest of the data is left out.

    Args:
        rows: as for `TrainLoader`.

    Returns:
        An iterator of int32 [rows, T + 1]; closing it stops its reading threads.

    Raises:
        DataError: the data set has fewer sequences than one batch; from the iterator, when a record cannot be used.
        ConfigError: the batch size is below 1.
        ValueError: `rows` are not as described.
    """
    _check_batch(source, batch_size)
    n_batches = len(source) // batch_size
    if max_batches is not None:
        n_batches = min(n_batches, max_batches)
    return _iterate(_Batches(source, int, 0, n_batches, batch_size, _checked_rows(rows, batch_size)))


# ---------------------------------------------------------------------------------------------------------- the order

# From a position in the stream to the number of a sequence in the source.
_Order = Callable[[int], int]


def _order(source: Sequences, seed: int, shuffle: bool) -> _Order:
    if not isinstance(source, Mixture):
        return _epochs(len(source), f"data order {seed}", shuffle)
    orders = [
        _epochs(len(each), f"data order {seed} of {name}", shuffle)
        for name, each in zip(source.names, source.sources, strict=True)
    ]

    def order(position: int) -> int:
        which, turn = source.turn(position)
        return source.number(which, orders[which](turn))

    return order


def _epochs(length: int, seed: str, shuffle: bool) -> _Order:
    """The numbers 0..length-1 over and over, in another order each time or in their own."""
    if not shuffle:
        return lambda position: position % length
    import grain

    # Grain shuffles epoch e with seed + e: unhashed, seed 1 would repeat seed 0 from its second epoch on.
    hashed = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "little")
    permuted: Any = grain.MapDataset.range(length).shuffle(seed=hashed).repeat()
    return lambda position: int(permuted[position])


# -------------------------------------------------------------------------------------------------------- the batches


class _Batches:
    """Random access, as Grain wants it, to some rows of every batch.

    Args:
        start: position of the first row of the first batch.
        rows: those of each batch.
    """

    def __init__(
        self, source: Sequences, order: _Order, start: int, n_batches: int, batch_size: int, rows: Sequence[int]
    ) -> None:
        self.source = source
        self._order, self._start, self._n_batches = order, start, n_batches
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return self._n_batches

    def __getitem__(self, batch: int) -> np.ndarray:
        first = self._start + batch * self._batch_size
        return np.stack(self.source.read_many([self._order(first + row) for row in self._rows]))


def _iterate(batches: _Batches) -> Generator[np.ndarray]:
    import grain

    threads, ahead = _REMOTE if batches.source.remote else _LOCAL
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    iterator: Any = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def _checked_rows(rows: Sequence[int] | None, batch_size: int) -> Sequence[int]:
    if rows is None:
        return range(batch_size)
    numbers = tuple(int(row) for row in rows)
    ascends = all(before < after for before, after in itertools.pairwise(numbers))
    if not numbers or not ascends or numbers[0] < 0 or numbers[-1] >= batch_size:
        raise ValueError(f"rows = {numbers} must be ascending numbers in 0..{batch_size - 1}")
    return numbers


def _check_batch(source: Sequences, batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size} must be at least 1")
    if len(source) < batch_size:
        raise DataError(
            f"the data set has {len(source)} sequences, less than one batch of {batch_size} ({source.files[0]}); "
            "use a smaller batch or more data"
        )
