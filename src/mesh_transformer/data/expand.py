"""Record files that are stored as ZLIB streams, expanded once into the user's cache."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from mesh_transformer.config.errors import DataError
from mesh_transformer.config.paths import cache_directory
from mesh_transformer.data import places
from mesh_transformer.data.files import atomic_writer, make_directory
from mesh_transformer.data.tfrecord import HEADER_BYTES, is_header

_MAX_EXPANDED = 16 << 20  # bytes at a time: what compresses well would fill the memory


def plain_file(path: str | os.PathLike[str]) -> str:
    """The path or URL of an uncompressed file with the records of `path`: itself, or a copy in the user's cache.

    As in the original, "zstd" anywhere in a path says that the file is a ZLIB stream. A file that begins with a valid
    record header is taken as it is all the same, so that a directory's name cannot spoil a plain file. The copy is made
    once; another size or time of change (of a URL: ETag or the like) makes another.

    Raises:
        DataError: the file is missing, or is neither plain records nor a complete ZLIB stream.
    """
    path = os.fspath(path)
    expanded = place_of_copy(path)
    if expanded is None:
        return path
    if not expanded.exists():
        make_directory(expanded.parent)
        with atomic_writer(expanded) as target:
            _expand(path, places.read_blocks(path, places.facts(path).size), target)
    return str(expanded)


def place_of_copy(path: str) -> Path | None:
    """Where the expanded copy of a file is, or would be made; None where the file is read as it is.

    Raises:
        DataError: the file is missing.
    """
    if "zstd" not in path:
        return None
    facts = places.facts(path)
    header = next(places.read_blocks(path, min(facts.size, HEADER_BYTES)), b"")[:HEADER_BYTES]
    if not header or is_header(header):
        return None
    name = path if places.is_url(path) else os.path.realpath(path)
    key = hashlib.sha256(f"{name}\0{facts.size}\0{facts.version}".encode()).hexdigest()[:16]
    return cache_directory() / "expanded" / f"{os.path.basename(path)[-100:]}.{key}.tfrecords"


def _expand(path: str, blocks: Iterable[bytes], target: BinaryIO) -> None:
    stream = zlib.decompressobj()
    try:
        for block in blocks:
            rest = block
            while rest:  # several streams may follow one another
                if stream.eof:
                    stream = zlib.decompressobj()
                target.write(stream.decompress(rest, _MAX_EXPANDED))
                rest = stream.unconsumed_tail or stream.unused_data
        target.write(stream.flush())
    except zlib.error as error:
        raise DataError(
            f'{path}: "zstd" in its path says ZLIB-compressed records, but it is neither ZLIB nor plain ({error})'
        ) from error
    if not stream.eof:
        raise DataError(f"{path}: the ZLIB stream is incomplete; the file is truncated, copy it again")
