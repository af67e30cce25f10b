"""Where the records of a file lie, found once and kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np

from mesh_transformer.config.errors import DataError
from mesh_transformer.config.paths import cache_directory
from mesh_transformer.data import places
from mesh_transformer.data.files import make_directory, write_atomic
from mesh_transformer.data.tfrecord import scan_headers, scan_offsets

_MAGIC = b"MTOFFS01"
# magic, the record file's size in bytes and its version (places.Facts), number of records
_HEADER = struct.Struct("<8sQQQ")


# Whether what was found is kept. Not a variable of the context: remote files are opened on other threads.
_keeping = True


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Within it `record_lengths`, on whatever thread, reads what is kept and writes nothing."""
    global _keeping
    before, _keeping = _keeping, False
    try:
        yield
    finally:
        _keeping = before


def record_lengths(path: str) -> np.ndarray:
    """int64 [n_records]: the payload length in bytes of every record of an uncompressed file, local or at a URL.

    They come from one pass over the headers, kept in a hidden file beside the data, or in the user's cache where that
    directory cannot be written or the file is remote; a kept one that is damaged, or of another size or version, is
    made anew.

    Raises:
        DataError: the record file is missing or damaged.
    """
    facts = places.facts(path)
    remote = places.is_url(path)
    key = hashlib.sha256((path if remote else os.path.realpath(path)).encode()).hexdigest()[:32]
    cached = cache_directory() / "offsets" / f"{key}.offsets"
    kept = [cached] if remote else [Path(path).with_name(f".{Path(path).name}.offsets"), cached]
    for candidate in kept:
        lengths = _read(candidate, facts)
        if lengths is not None:
            return lengths
    if remote:
        lengths = scan_headers(places.reader(path, facts.size), facts.size, path=path)[1]
    else:
        lengths = scan_offsets(path)[1]
    head = _HEADER.pack(_MAGIC, facts.size, facts.version, lengths.size)
    data = head + lengths.astype("<i8").tobytes()
    data += struct.pack("<I", google_crc32c.value(data))
    for candidate in kept if _keeping else []:
        try:
            make_directory(candidate.parent)
            write_atomic(candidate, data)
            break
        except DataError:
            continue  # without a place to keep them, the next start scans again
    return lengths


def _read(path: Path, facts: places.Facts) -> np.ndarray | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _HEADER.size + 4 or google_crc32c.value(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        return None
    magic, size, version, count = _HEADER.unpack_from(data)
    if (magic, size, version) != (_MAGIC, facts.size, facts.version):
        return None
    return np.frombuffer(data, "<i8", count, _HEADER.size).astype(np.int64)
