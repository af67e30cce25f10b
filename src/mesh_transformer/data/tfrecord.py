"""TFRecord framing, without TensorFlow (docs/formats.md, section 9.1).

A record is u64le payload length, u32le masked CRC32C of those eight bytes, payload, u32le masked CRC32C of the payload.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from typing import BinaryIO

import google_crc32c
import numpy as np

from mesh_transformer.config.errors import DataError
from mesh_transformer.data.example import decode_example, encode_example
from mesh_transformer.data.files import atomic_writer

__all__ = ["decode_example", "encode_example", "read_record", "scan_headers", "scan_offsets", "write_records"]

HEADER_BYTES = 12
FOOTER_BYTES = 4
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
# What other files begin with: their names are at times those of record files.
_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "parquet",
    b"\x78\x01": "ZLIB, which is expanded where 'zstd' is in the path",
    b"\x78\x9c": "ZLIB, which is expanded where 'zstd' is in the path",
    b"\x78\xda": "ZLIB, which is expanded where 'zstd' is in the path",
}


def masked_crc(data: bytes) -> int:
    """TFRecord's masked CRC32C of `data`, as an unsigned 32-bit integer."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------------- writing


def write_records(target: str | os.PathLike[str] | BinaryIO, sequences: Iterable[np.ndarray]) -> int:
    """Writes one record for each 1-d integer array of token ids, `~id` where one is not learned; returns how many.

    A path is written under a temporary name, fsynced and renamed; an open binary file is written to as it stands.

    Raises:
        DataError: the path cannot be written.
    """
    if isinstance(target, (str, os.PathLike)):
        with atomic_writer(target) as file:
            return write_records(file, sequences)
    count = 0
    for sequence in sequences:
        payload = encode_example(sequence)
        length = struct.pack("<Q", len(payload))
        target.write(length + _FOOTER.pack(masked_crc(length)) + payload + _FOOTER.pack(masked_crc(payload)))
        count += 1
    return count


# ---------------------------------------------------------------------------------------------------------- reading


def is_header(data: bytes) -> bool:
    """Whether `data` begins with the header of a record, by its checksum."""
    if len(data) < HEADER_BYTES:
        return False
    return masked_crc(data[:8]) == _HEADER.unpack_from(data)[1]


def scan_offsets(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """`scan_headers` of a local file, of which nothing but the headers is read. Raises DataError likewise."""
    try:
        with open(path, "rb", buffering=0) as file:
            descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
            return scan_headers(lambda start, length: os.pread(descriptor, length, start), size, path=path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def scan_headers(
    read: Callable[[int, int], bytes], size: int, *, path: str | os.PathLike[str] = "file"
) -> tuple[np.ndarray, np.ndarray]:
    """Finds every record in one pass over the headers, whose CRCs are checked; payloads are not looked at.

    Args:
        read: gives the bytes from (start, length).
        size: of the file, in bytes.
        path: for the message only.

    Returns:
        (offsets, lengths): int64 [n_records], each payload's byte offset in the file and its length in bytes.

    Raises:
        DataError: truncated or damaged; the message names the file, the record number and the byte offset.
    """
    offsets: list[int] = []
    lengths: list[int] = []
    position = 0
    while position < size:
        header = read(position, min(HEADER_BYTES, size - position))
        where = _where(path, len(offsets), position)
        if len(header) < HEADER_BYTES:
            raise DataError(f"{where}: the file ends inside a record header; it is truncated, copy it again")
        length, crc = _HEADER.unpack(header)
        if masked_crc(header[:8]) != crc:
            kind = _looks_like(header) if not offsets else ""
            raise DataError(
                f"{where}: the record header's checksum is wrong; damaged, or not a TFRecord file"
                + (f" (it begins like {kind})" if kind else "")
            )
        end = position + HEADER_BYTES + length + FOOTER_BYTES
        if end > size:
            raise DataError(f"{where}: the record ends at byte {end} but the file has {size}; it is truncated")
        offsets.append(position + HEADER_BYTES)
        lengths.append(length)
        position = end
    return np.array(offsets, np.int64), np.array(lengths, np.int64)


def _looks_like(header: bytes) -> str:
    for magic, kind in _MAGICS.items():
        if header.startswith(magic):
            return kind
    return "text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in header) else ""


def read_record(
    descriptor: int, offset: int, length: int, *, path: str | os.PathLike[str] = "file", record: int = 0
) -> bytes:
    """The payload at byte `offset` of an open file descriptor, its CRC checked. Safe to call from many threads.

    `path` and `record` (the number of the record, from 0) are for the message only.

    Raises:
        DataError: the file is truncated, or the payload's checksum is wrong.
    """
    try:
        data = os.pread(descriptor, length + FOOTER_BYTES, offset)
    except OSError as error:
        raise DataError(f"{_where(path, record, offset)}: cannot be read ({error.strerror or error})") from error
    return checked_payload(data, offset, length, path=path, record=record)


def checked_payload(
    data: bytes, offset: int, length: int, *, path: str | os.PathLike[str] = "file", record: int = 0
) -> bytes:
    """The payload in `data`, which holds `length` bytes of it and its footer, as read from byte `offset`.

    Raises:
        DataError: as `read_record`.
    """
    where = _where(path, record, offset)
    if len(data) < length + FOOTER_BYTES:
        raise DataError(f"{where}: the file ends inside this record; it is truncated, copy it again")
    payload = data[:length]
    if masked_crc(payload) != _FOOTER.unpack(data[length:])[0]:
        raise DataError(f"{where}: the payload's checksum is wrong; the file is damaged, copy it again")
    return payload


def _where(path: str | os.PathLike[str], record: int, offset: int) -> str:
    return f"{os.fspath(path)}, record {record} at byte {offset}"
