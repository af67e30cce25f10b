"""Records as a person reads them, for `prepare --inspect`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np

from mesh_transformer.data import places
from mesh_transformer.data.example import decode_example
from mesh_transformer.data.expand import plain_file
from mesh_transformer.data.finding import resolve_data
from mesh_transformer.data.tfrecord import FOOTER_BYTES, checked_payload, scan_headers
from mesh_transformer.data.tokenizer import Tokenizer


@dataclasses.dataclass
class RecordCounts:
    """Of all records of a data set: `learned` of the `ids`, and how often end-of-text stands where it is learned."""

    records: int = 0
    ids: int = 0
    learned: int = 0
    ends: int = 0


def read_rows(spec: str) -> Iterator[tuple[str, np.ndarray]]:
    """(file and number, row) of every record that `spec` names (as for `resolve_data`), of whatever length.

    A row is int32 [n_ids], with `~id` for an id that is not learned.

    Raises:
        DataError: the data does not exist or is damaged.
    """
    for path in resolve_data(spec):
        plain = plain_file(path)
        with _reader(plain) as (read, size):
            for number, (offset, length) in enumerate(zip(*scan_headers(read, size, path=path), strict=True)):
                data = read(int(offset), int(length) + FOOTER_BYTES)
                payload = checked_payload(data, int(offset), int(length), path=path, record=number)
                yield f"{path}, record {number}", decode_example(payload, where=f"{path}, record {number}")


@contextlib.contextmanager
def _reader(path: str) -> Iterator[tuple[Callable[[int, int], bytes], int]]:
    """(a function that gives the bytes from (start, length), size) of a local file or a URL."""
    size = places.facts(path).size
    if places.is_url(path):
        yield places.reader(path, size), size
        return
    try:
        with open(path, "rb", buffering=0) as file:
            descriptor = file.fileno()
            yield lambda start, length: os.pread(descriptor, length, start), size
    except OSError as error:
        raise places.unreadable(path, error) from error


def show_records(spec: str, tokenizer: Tokenizer, limit: int, counts: RecordCounts) -> Iterator[str]:
    """The first `limit` records as text, each under a line with its counts; `counts` is of all of them at the end.

    Text that is not learned stands under a line that says so.

    Raises:
        DataError: the data does not exist or is damaged.
    """
    for where, row in read_rows(spec):
        learned = row >= 0
        ends = int((row == tokenizer.end_of_text).sum()) if tokenizer.end_of_text is not None else 0
        counts.records += 1
        counts.ids += row.size
        counts.learned += int(learned.sum())
        counts.ends += ends
        if counts.records > limit:
            continue
        distinct = np.unique(np.where(learned, row, ~row)).size
        yield f"--- {where}: {row.size:,} ids, {distinct:,} distinct, {learned.sum():,} learned, {ends:,} ends of text"
        yield from _as_text(row, tokenizer)


def _as_text(row: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of a row; where some is not learned, of each run under a line of its own."""
    if (row >= 0).all():
        yield tokenizer.decode(row.tolist())
        return
    for run in np.split(row, np.flatnonzero(np.diff((row >= 0).astype(np.int8))) + 1):
        if run.size and run[0] >= 0:
            yield f"-- learned, {run.size:,} ids:"
            yield tokenizer.decode(run.tolist())
        elif run.size and (run == run[0]).all() and ~int(run[0]) == tokenizer.end_of_text:
            yield f"-- not learned, {run.size:,} ids: filled up with end of text"
        elif run.size:
            yield f"-- not learned, {run.size:,} ids:"
            yield tokenizer.decode((~run).tolist())
