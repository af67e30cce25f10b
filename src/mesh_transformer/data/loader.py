"""Batches of sequences: shuffled and resumable for training, one ordered pass for validation."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from mesh_transformer.config.errors import ConfigError, DataError
from mesh_transformer.data.source import RecordSource

_READ_THREADS = 2
_BATCHES_AHEAD = 4


class TrainLoader:
    """An endless, shuffled stream of sequences that can be entered anywhere in constant time.

    Element i of the stream depends on i, the seed and the data list alone, never on the batch size or on who reads
    which rows: it lies in epoch i // len(source), and every epoch has a permutation of its own. Batches run on over the
    end of an epoch, so nothing is dropped.

    Args:
        source: the data set.
        seed: any integer; another seed is another order.
        batch_size: sequences in a batch, over all processes.
        rows: which rows of every batch this process reads, ascending numbers in 0..batch_size-1; None: all. Nothing
            else is read. Several processes may read the same rows.

    Raises:
        DataError: the data set has fewer sequences than one batch.
        ConfigError: the batch size is below 1.
        ValueError: `rows` are not as described.
    """

    def __init__(self, source: RecordSource, *, seed: int, batch_size: int, rows: Sequence[int] | None = None) -> None:
        _check_batch(source, batch_size)
        self.source = source
        self.batch_size = batch_size
        self._rows = _checked_rows(rows, batch_size)
        self._seed = _shuffle_seed(seed)

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
        import grain

        stream = grain.MapDataset.source(self.source).shuffle(seed=self._seed).repeat()
        return _iterate(_Rows(stream, position, sys.maxsize, self.batch_size, self._rows))


def validation_batches(
    source: RecordSource, batch_size: int, max_batches: int | None = None, *, rows: Sequence[int] | None = None
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
    return _iterate(_Rows(source, 0, n_batches * batch_size, batch_size, _checked_rows(rows, batch_size)))


class _Rows:
    """Random access, as Grain wants it, to some rows of every batch of a stream of sequences.

    Args:
        stream: sequences by number.
        start, stop: the numbers of which the batches are made, whole ones only.
        rows: those of each batch.
    """

    def __init__(self, stream: Any, start: int, stop: int, batch_size: int, rows: Sequence[int]) -> None:
        self.rows = rows
        self._stream, self._start, self._batch_size = stream, start, batch_size
        self._length = (stop - start) // batch_size * len(rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        batch, row = divmod(index, len(self.rows))
        return self._stream[self._start + batch * self._batch_size + self.rows[row]]


def _iterate(source: _Rows) -> Generator[np.ndarray]:
    import grain

    # drop_remainder, though there is none: the other way, Grain rounds an endless stream's length up through a float,
    # which gives 2**63, more than Python's len() can say.
    batches = grain.MapDataset.source(source).batch(len(source.rows), drop_remainder=True, batch_fn=np.stack)
    options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
    iterator: Any = iter(batches.to_iter_dataset(options))
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


def _check_batch(source: RecordSource, batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size} must be at least 1")
    if len(source) < batch_size:
        raise DataError(
            f"the data set has {len(source)} sequences, less than one batch of {batch_size} ({source.files[0]}); "
            "use a smaller batch or more data"
        )


def _shuffle_seed(seed: int) -> int:
    # Grain shuffles epoch e with seed + e: unhashed, seed 1 would repeat seed 0 from its second epoch on.
    return int.from_bytes(hashlib.sha256(f"data order {seed}".encode()).digest()[:4], "little")
