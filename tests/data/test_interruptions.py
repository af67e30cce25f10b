"""A run that is interrupted again and again, and goes on each time with another number of processes."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mesh_transformer.data.loader import TrainLoader
from mesh_transformer.data.mixture import Mixture, open_training
from mesh_transformer.data.source import RecordSource
from mesh_transformer.data.tfrecord import write_records

T = 3
SIZES = (41, 19)


def open_sets(directory: Path, mixed: bool) -> RecordSource | Mixture:
    """Two sets in three files; every sequence holds its own number."""
    rows = np.repeat(np.arange(sum(SIZES))[:, None], T + 1, axis=1)
    for name, part in (("a1", rows[:17]), ("a2", rows[17:41]), ("b", rows[41:])):
        write_records(directory / f"{name}.tfrecords", part)
    where = {"a": str(directory / "a?.tfrecords"), "b": str(directory / "b.tfrecords")}
    return open_training(where, {"a": 0.7, "b": 0.3} if mixed else {}, sequence_length=T, n_vocab=100)


def split(rng: random.Random, batch_size: int) -> list[list[int]]:
    """The rows of a batch dealt to some processes, each at least one."""
    n_processes = rng.randint(1, batch_size)
    owners = [*range(n_processes), *(rng.randrange(n_processes) for _ in range(batch_size - n_processes))]
    rng.shuffle(owners)
    return [[row for row, owner in enumerate(owners) if owner == process] for process in range(n_processes)]


def read_with_interruptions(
    source: RecordSource | Mixture, rng: random.Random, interruptions: int, **options: bool
) -> list[int]:
    """The numbers of the sequences in the order in which the run as a whole consumed them."""
    consumed: list[int] = []
    for _ in range(interruptions + 1):
        batch_size, n_batches = rng.randint(1, 6), rng.randint(1, 9)
        batches = np.full((n_batches, batch_size), -1)
        for rows in split(rng, batch_size):
            stream = TrainLoader(source, seed=9, batch_size=batch_size, rows=rows, **options).batches(len(consumed))
            for batch in batches:
                assert (batch[rows] == -1).all()  # no other process has read these
                batch[rows] = next(stream)[:, 0]
            stream.close()
        consumed += batches.ravel().tolist()
    return consumed


@pytest.mark.parametrize(
    "interruptions", [pytest.param(6, id="few"), pytest.param(200, id="many", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sequence_is_read_once_in_an_epoch(tmp_path: Path, interruptions: int, shuffle: bool) -> None:
    source = open_sets(tmp_path, mixed=False)
    consumed = read_with_interruptions(source, random.Random(interruptions), interruptions, shuffle=shuffle)
    assert len(consumed) > len(source)
    for first in range(0, len(consumed), len(source)):
        epoch = consumed[first : first + len(source)]
        assert len(set(epoch)) == len(epoch)  # and so each exactly once in a whole epoch
    assert {*consumed[: len(source)]} == {*range(len(source))}


@pytest.mark.parametrize(
    "interruptions", [pytest.param(6, id="few"), pytest.param(200, id="many", marks=pytest.mark.long)]
)
def test_every_sequence_of_a_mixture_is_read_once_in_its_sets_epoch(tmp_path: Path, interruptions: int) -> None:
    source = open_sets(tmp_path, mixed=True)
    consumed = read_with_interruptions(source, random.Random(100 + interruptions), interruptions)
    for first, size in ((0, SIZES[0]), (SIZES[0], SIZES[1])):
        mine = [n for n in consumed if first <= n < first + size]
        assert len(mine) > size
        for begin in range(0, len(mine), size):
            epoch = Counter(mine[begin : begin + size])
            assert max(epoch.values()) == 1
    uninterrupted = TrainLoader(source, seed=9, batch_size=1).batches()
    assert [int(next(uninterrupted)[0, 0]) for _ in consumed] == consumed
    uninterrupted.close()
