from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mesh_transformer.config.errors import ConfigError, DataError
from mesh_transformer.data.loader import TrainLoader, validation_batches
from mesh_transformer.data.source import RecordSource
from mesh_transformer.data.tfrecord import write_records

N, T = 23, 4


@pytest.fixture
def source(tmp_path: Path) -> RecordSource:
    """Two files; sequence i holds the id i five times over."""
    data = np.repeat(np.arange(N)[:, None], T + 1, axis=1)
    write_records(tmp_path / "a.tfrecords", data[:9])
    write_records(tmp_path / "b.tfrecords", data[9:])
    files = [str(tmp_path / name) for name in ("a.tfrecords", "b.tfrecords")]
    return RecordSource(files, sequence_length=T, n_vocab=100)


def stream(source: RecordSource, count: int, *, position: int = 0, batch_size: int = 1, seed: int = 3) -> list[int]:
    """The first `count` sequences from `position`, each by its number."""
    batches = TrainLoader(source, seed=seed, batch_size=batch_size).batches(position)
    taken = np.concatenate(list(itertools.islice(batches, -(-count // batch_size))))
    batches.close()  # type: ignore[attr-defined]
    return taken[:count, 0].tolist()


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def test_batches_have_shape_and_dtype(source: RecordSource) -> None:
    batches = TrainLoader(source, seed=0, batch_size=6).batches()
    batch = next(batches)
    assert (batch.shape, batch.dtype) == ((6, T + 1), np.int32)
    assert (batch == batch[:, :1]).all()


def test_every_epoch_is_a_permutation_of_its_own(source: RecordSource) -> None:
    taken = np.array(stream(source, 5 * N, batch_size=4)).reshape(5, N)
    for epoch in taken:
        assert sorted(epoch) == list(range(N))
    assert len({tuple(epoch) for epoch in taken}) == 5
    assert list(range(N)) not in taken.tolist()


def test_seeds_give_unrelated_orders(source: RecordSource) -> None:
    orders = [tuple(stream(source, N, seed=seed, position=epoch * N)) for seed in range(6) for epoch in range(3)]
    # Grain's own seed of epoch e is seed + e; were it used as it is, seed 1 would begin with seed 0's second epoch.
    assert len(set(orders)) == len(orders)
    assert stream(source, N, seed=-1) != stream(source, N, seed=1)


def test_the_order_is_the_one_written_down(source: RecordSource) -> None:
    # A change here, of ours or of Grain's, breaks the resumption of every run begun before it.
    assert stream(source, 12, seed=0) == ORDER_SEED_0
    assert stream(source, 4, seed=0, position=N) == ORDER_SEED_0_EPOCH_1


ORDER_SEED_0 = [21, 15, 13, 10, 2, 22, 18, 8, 0, 3, 20, 14]
ORDER_SEED_0_EPOCH_1 = [14, 2, 3, 1]


@pytest.mark.parametrize("batch_size", [1, 3, 7, N])
def test_resuming_anywhere_continues_the_stream(source: RecordSource, batch_size: int) -> None:
    whole = stream(source, 4 * N)
    for position in [*range(0, 2 * N + 2, 3), N - 1, N, N + 1]:
        assert stream(source, N, position=position, batch_size=batch_size) == whole[position : position + N]


def test_entering_far_away_takes_no_longer(source: RecordSource) -> None:
    far = 10**12 * N + 5
    began = time.perf_counter()
    taken = stream(source, N - 5, position=far)
    assert time.perf_counter() - began < 5
    assert len(set(taken)) == N - 5  # the rest of one epoch


@pytest.mark.parametrize(
    "shares",
    [[range(6)], [range(3), range(3, 6)], [(0, 3), (1, 4), (2, 5)], [(i,) for i in range(6)], [(0, 1, 2, 5), (3, 4)]],
)
def test_processes_share_every_batch(source: RecordSource, shares: list[Sequence[int]]) -> None:
    whole = np.reshape(stream(source, 60, position=11), (10, 6))
    for rows in shares:
        batches = TrainLoader(source, seed=3, batch_size=6, rows=rows).batches(11)
        taken = np.stack([next(batches)[:, 0] for _ in range(10)])
        np.testing.assert_array_equal(taken, whole[:, list(rows)])
        batches.close()


def test_processes_may_read_the_same_rows(source: RecordSource) -> None:
    first, second = (TrainLoader(source, seed=3, batch_size=4, rows=np.array([1, 2])).batches(5) for _ in range(2))
    for _ in range(3):
        np.testing.assert_array_equal(next(first), next(second))


class Counting(RecordSource):
    """Notes which records are read once it is open."""

    read: list[int] | None = None

    def __getitem__(self, index: int) -> np.ndarray:
        if self.read is not None:
            self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("train", [True, False])
def test_only_the_rows_asked_for_are_read(source: RecordSource, train: bool) -> None:
    counting = Counting(source.files, sequence_length=T, n_vocab=100)
    counting.read = []
    rows = (1, 4)
    batches = (
        TrainLoader(counting, seed=3, batch_size=5, rows=rows).batches(7)
        if train
        else validation_batches(counting, 5, rows=rows)
    )
    taken = {int(i) for batch in itertools.islice(batches, 4) for i in batch[:, 0]}
    batches.close()
    order = stream(source, 400, position=7) if train else [*range(20)]
    mine = [i for n, i in enumerate(order) if n % 5 in rows]
    assert taken == set(mine[:8])
    # A few batches are read ahead: more than were taken, but nothing out of the others' rows.
    assert 8 <= len(counting.read) <= 8 + 2 * 10
    assert collections.Counter(counting.read) == collections.Counter(mine[: len(counting.read)])


@pytest.mark.parametrize("rows", [(), (1, 0), (0, 0), (-1, 2), (0, 6)])
def test_rows_that_are_none(source: RecordSource, rows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"ascending numbers in 0\.\.5"):
        TrainLoader(source, seed=0, batch_size=6, rows=rows)
    with pytest.raises(ValueError, match=r"ascending numbers in 0\.\.5"):
        validation_batches(source, 6, rows=rows)


def test_too_little_data_is_an_error_at_once(source: RecordSource) -> None:
    with pytest.raises(DataError, match=r"23 sequences, less than one batch of 24"):
        TrainLoader(source, seed=0, batch_size=24)
    with pytest.raises(DataError, match=r"23 sequences, less than one batch of 24"):
        validation_batches(source, 24)
    with pytest.raises(ConfigError, match="batch_size = 0 must be at least 1"):
        TrainLoader(source, seed=0, batch_size=0)
    with pytest.raises(ConfigError, match="at least 0"):
        next(TrainLoader(source, seed=0, batch_size=6).batches(-1))


def test_a_single_sequence_repeats(tmp_path: Path) -> None:
    write_records(tmp_path / "a.tfrecords", [np.zeros(T + 1, int)])
    source = RecordSource([str(tmp_path / "a.tfrecords")], sequence_length=T, n_vocab=1)
    assert stream(source, 3) == [0, 0, 0]


@pytest.mark.parametrize(("maximum", "expected"), [(None, 5), (2, 2), (9, 5), (0, 0)])
def test_validation_is_one_ordered_pass_of_whole_batches(
    source: RecordSource, maximum: int | None, expected: int
) -> None:
    batches = list(validation_batches(source, 4, maximum))
    assert len(batches) == expected
    assert [batch[:, 0].tolist() for batch in batches] == [
        [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(expected)
    ]
    halves = [list(validation_batches(source, 4, maximum, rows=range(2 * i, 2 * i + 2))) for i in range(2)]
    for whole, first, second in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate([first, second]))


@pytest.mark.parametrize("train", [True, False])
def test_an_error_in_a_reading_thread_reaches_the_consumer(source: RecordSource, train: bool) -> None:
    path = Path(source.files[1])
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # the last record
    path.write_bytes(content)
    batches = TrainLoader(source, seed=0, batch_size=1).batches() if train else validation_batches(source, 1)
    with pytest.raises(DataError, match=r"b\.tfrecords, record 13 at byte"):
        for _ in range(N):
            next(batches)
    assert wait_for_no_threads()


def test_closing_stops_the_reading_threads(source: RecordSource) -> None:
    batches = TrainLoader(source, seed=0, batch_size=2).batches()
    next(batches)
    assert reader_threads()
    batches.close()  # type: ignore[attr-defined]
    assert wait_for_no_threads()
    with pytest.raises(StopIteration):
        next(batches)
    list(validation_batches(source, 2))
    assert wait_for_no_threads()


def wait_for_no_threads() -> bool:
    deadline = time.monotonic() + 5
    while reader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not reader_threads()
