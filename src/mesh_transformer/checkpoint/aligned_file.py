"""safetensors files whose arrays can be used where they lie: written in parts, opened by memory map.

The format (https://huggingface.co/docs/safetensors) is eight bytes, the length of a JSON text that says where each
array is; the text, which may end in spaces; and the arrays without gaps, little-endian, in C order. Here the text is as
long as puts the first array at a multiple of 64 bytes, where JAX on CPU uses memory without a copy of it; so do the
next ones where the sizes of those before them are such multiples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import numpy as np

from mesh_transformer.config.errors import CheckpointError

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 64  # bytes
_MAX_HEADER = 1 << 20  # bytes; these files hold one parameter each
_METADATA = "__metadata__"

Described = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # name -> shape and dtype


class AlignedFile:
    """A file of arrays of known shapes, to be written in any order; a context manager.

    Args:
        new: make it; else it is one that was made so before, of the same arrays.

    Raises:
        OSError: it exists and should not, or cannot be written.
    """

    def __init__(self, path: Path, arrays: Described, *, new: bool = True) -> None:
        self._arrays = dict(arrays)
        self._start: dict[str, int] = {}
        entries: dict[str, Any] = {_METADATA: {"format": "np"}}
        at = 0
        for name, (shape, dtype) in arrays.items():
            n_bytes = math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + n_bytes]}
            self._start[name] = at
            at += n_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        header = struct.pack("<Q", len(text)) + text
        self._data = len(header)
        self._descriptor = os.open(path, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if new else 0), 0o666)
        if new:
            os.ftruncate(self._descriptor, self._data + at)
            self._write_at(header, 0)

    def write(self, name: str, row: int | None, values: np.ndarray) -> None:
        """The whole array, or `array[row]`."""
        shape, dtype = self._arrays[name]
        part = shape if row is None else shape[1:]
        assert values.dtype == dtype and values.shape == part, f"{name}: {values.dtype} {values.shape}"
        n_bytes = math.prod(part) * dtype.itemsize
        contiguous = np.ascontiguousarray(values).reshape(-1)
        self._write_at(contiguous.view(np.uint8).data, self._data + self._start[name] + (row or 0) * n_bytes)

    def __enter__(self) -> AlignedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def _write_at(self, data: bytes | memoryview, at: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], at + done)


def open_mapped(path: Path) -> dict[str, np.ndarray]:
    """Every array of a file that `AlignedFile` wrote, read-only, as memory that the system fills from the file.

    Nothing but the header is read before an array is used. The file must not be changed while its arrays live; it may
    be deleted, or replaced by another.

    Raises:
        CheckpointError: it is missing, cut short, or its header is damaged.
    """
    places = _places(path)
    with _readable(path), path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: np.frombuffer(mapped, place.dtype, math.prod(place.shape), place.start).reshape(place.shape)
        for name, place in places.items()
    }


def read_array(path: Path, name: str, row: int | None) -> np.ndarray:
    """A copy of the whole array, or of `array[row]`: for going through a file, which as a map would stay resident.

    Raises:
        CheckpointError: as `open_mapped`.
    """
    place = _places(path)[name]
    part = place.shape if row is None else place.shape[1:]
    n_bytes = math.prod(part) * place.dtype.itemsize
    with _readable(path), path.open("rb") as file:
        file.seek(place.start + (row or 0) * n_bytes)
        return np.frombuffer(file.read(n_bytes), place.dtype).reshape(part)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an array is; start: its first byte in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


def _places(path: Path) -> dict[str, _Place]:
    with _readable(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MAX_HEADER:
            raise ValueError("a header of that length is no header")
        entries = json.loads(file.read(length))
    try:
        return {name: _place(8 + length, size, entry) for name, entry in entries.items() if name != _METADATA}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged, its header does not fit its {size} bytes") from error


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path}: damaged, its header is not that of a safetensors file") from error


def _place(data: int, size: int, entry: Mapping[str, Any]) -> _Place:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    fits = 0 <= start <= end and data + end <= size and end - start == math.prod(shape) * dtype.itemsize
    if not fits or min(shape, default=0) < 0:
        raise ValueError("an array is not where it should be")
    return _Place(dtype, shape, data + start)
