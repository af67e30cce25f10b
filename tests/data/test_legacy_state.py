"""The original's loader, told over again from docs/formats.md 9.3 and 9.4, beside our position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesh_transformer.config.errors import DataError
from mesh_transformer.data.legacy_state import position_of_loader_state
from mesh_transformer.data.loader import TrainLoader
from mesh_transformer.data.source import RecordSource
from mesh_transformer.data.tfrecord import write_records

COUNTS = [7, 2, 12, 8]  # with batches of 4: 1, 0, 3 and 2 of them
BATCH = 4
T = 2


@pytest.fixture
def source(tmp_path: Path) -> RecordSource:
    """Sequence n holds the id n."""
    ends = list(itertools.accumulate(COUNTS))
    for i, (end, count) in enumerate(zip(ends, COUNTS, strict=True)):
        write_records(tmp_path / f"{i}.tfrecords", np.repeat(np.arange(end - count, end)[:, None], T + 1, axis=1))
    files = [str(tmp_path / f"{i}.tfrecords") for i in range(len(COUNTS))]
    return RecordSource(files, sequence_length=T, n_vocab=100)


def original() -> Iterator[tuple[list[int], dict[str, Any]]]:
    """(numbers of the sequences of a batch, the loader's state after it), for ever."""
    names = [f"gs://bucket/pile/{i}.tfrecords" for i in range(len(COUNTS))]
    while True:
        used: list[str] = []
        first = 0
        for name, count in zip(names, COUNTS, strict=True):
            for batch in range(count // BATCH):
                yield (
                    list(range(first + batch * BATCH, first + (batch + 1) * BATCH)),
                    {
                        "used": list(used),
                        "file_idx": batch,
                    },
                )
            used.append(name)
            first += count


def test_the_next_batch_is_the_one_that_the_original_would_have_made(source: RecordSource) -> None:
    told = list(itertools.islice(original(), 13))
    for (_, state), (expected, _) in itertools.pairwise(told):
        position = position_of_loader_state(state, source, BATCH)
        # At the end of a file too small for a batch the original goes on to the next; ours reads the small one too.
        if state["used"] == [] and state["file_idx"] == 0:
            assert position == 7
            continue
        batches = TrainLoader(source, seed=0, batch_size=BATCH, shuffle=False).batches(position)
        assert next(batches)[:, 0].tolist() == expected
        batches.close()


@pytest.mark.parametrize(
    ("used", "last", "position"),
    [
        ([], 0, 7),  # the only batch of file 0, or nothing: the original cannot tell them apart
        (["0", "1"], 0, 9 + 4),
        (["0", "1"], 1, 9 + 8),
        (["0", "1"], 2, 21),  # the last of its file; the first of the next is not lost
        (["0", "1", "2"], 1, 29),
        (["0", "1", "2", "3"], 0, 29),
    ],
)
def test_positions(source: RecordSource, used: list[str], last: int, position: int) -> None:
    state = {"used": [f"gs://elsewhere/{name}.tfrecords" for name in used], "file_idx": last}
    assert position_of_loader_state(state, source, BATCH) == position


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "loader state is {}"),
        ({"used": "a", "file_idx": 0}, "expected"),
        ({"used": [1], "file_idx": 0}, "expected"),
        ({"used": [], "file_idx": -1}, "expected"),
        ({"used": [], "file_idx": True}, "expected"),
        ({"used": ["gs://b/1.tfrecords"], "file_idx": 0}, r"'gs://b/1\.tfrecords' as file 1, and here it is .*0\.tf"),
        ({"used": [f"{i}.tfrecords" for i in range(5)], "file_idx": 0}, "as file 5, and here are 4 files"),
        ({"used": [], "file_idx": 1}, r"batch 1 of .*0\.tfrecords', which has 1 batches of 4; .*train\.batch_size"),
        ({"used": ["0.tfrecords"], "file_idx": 1}, r"batch 1 of .*1\.tfrecords', which has 0 batches of 4"),
    ],
)
def test_states_of_other_data(source: RecordSource, state: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        position_of_loader_state(state, source, BATCH)
