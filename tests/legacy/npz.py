"""The original's npz files, written byte by byte (docs/formats.md, 1.4), for the generators of old checkpoints.

Nothing here or in the generators uses the package: they are what its reader is tested against. bfloat16 is handled as
its 16 bits, in integers.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Member(NamedTuple):
    """One array as it is stored: its bytes in C order, and what the .npy header says of them."""

    data: np.ndarray
    descr: str  # <f4, <f2, <i4, or <V2 for bfloat16


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even; uint16 of the same shape. Finite values only."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    # Half a bfloat16 step, less one for an even result: a tie then goes up only from an odd one.
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 -> the same values in float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray, dtype: str) -> tuple[Member, np.ndarray]:
    """What is stored of float32 values as "float32", "bfloat16" or "float16", and the float32 values it then means."""
    values = np.asarray(values, np.float32)
    if dtype == "bfloat16":
        bits = bfloat16_bits(values)
        return Member(bits, "<V2"), from_bfloat16_bits(bits)
    if dtype == "float16":
        half = values.astype(np.float16)
        return Member(half, "<f2"), half.astype(np.float32)
    assert dtype == "float32", dtype
    return Member(values, "<f4"), values


def counter(value: int) -> Member:
    """A 0-d int32."""
    return Member(np.asarray(value, np.int32), "<i4")


def header(shape: tuple[int, ...], descr: str) -> bytes:
    """A .npy version 1.0 header in C order, filled up with spaces so that the data starts at a multiple of 64."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape!r}, }}"
    length = -(-(10 + len(text) + 1) // 64) * 64 - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + text.ljust(length - 1).encode("latin1") + b"\n"


def write_npz(path: Path, members: Iterable[Member]) -> None:
    """An uncompressed npz with members arr_0.npy, arr_1.npy, ... in this order; without members an empty zip file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i, (data, descr) in enumerate(members):
            # A fixed date, so that equal checkpoints are equal files; zip64 as np.savez writes it.
            with archive.open(zipfile.ZipInfo(f"arr_{i}.npy"), "w", force_zip64=True) as file:
                file.write(header(data.shape, descr) + data.tobytes())
