"""One .npz file of the original: members arr_0, arr_1, ... read singly and verified, written piece by piece.

Layout: docs/formats.md, sections 1.4 and 8.1. NumPy's own reader would do but for three things: it opens pickles when
asked wrongly, it knows no bfloat16, and it copies a member in pieces of 256 KiB.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

import ml_dtypes
import numpy as np

from mesh_transformer.config.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Header descr -> dtype. bfloat16 is stored as raw two-byte values; "|V2" is how plain NumPy writes those.
_DTYPES = {
    "<f4": np.dtype(np.float32),
    "<f2": np.dtype(np.float16),
    "<i4": np.dtype(np.int32),
    "<V2": BFLOAT16,
    "|V2": BFLOAT16,
}
_DESCR = {np.dtype(np.float32): "<f4", np.dtype(np.float16): "<f2", np.dtype(np.int32): "<i4", BFLOAT16: "<V2"}
_CHUNK = 8 * 2**20
# {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), } as NumPy has always written it; a list is a record's.
_HEADER = re.compile(
    r"\{\s*'descr':\s*('[^']*'|\[[^\]]*\]),\s*'fortran_order':\s*(True|False),"
    r"\s*'shape':\s*\(((?:\s*\d{1,18}\s*,)*\s*(?:\d{1,18})?\s*)\),?\s*\}\s*"
)
# What zipfile, zlib, struct and NumPy's header parser raise on damaged bytes.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, TypeError, EOFError, SyntaxError),
    *(NotImplementedError, RuntimeError, OverflowError, MemoryError, RecursionError, UnicodeError, IndexError),
)


@contextlib.contextmanager
def reading(file: str | Path) -> Iterator[None]:
    """Turns whatever damaged bytes or the disk raise into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; copy it again, or all of the checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__  # it may quote the file
        raise CheckpointError(f"{file}: damaged or cut short ({reason}); copy it again") from error


@dataclasses.dataclass(frozen=True)
class Member:
    """What the header of one array says."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile:
    """An open .npz; `members` in numeric order. Reading is verified against the zip's checksums.

    Args:
        file: a path, or an open binary file.
        name: what messages call it.

    Raises:
        CheckpointError: it is missing, damaged, or holds what the original never wrote (pickled objects are refused).
    """

    def __init__(self, file: Path | IO[bytes], name: str | Path) -> None:
        self.name = str(name)
        with reading(self.name):
            self._zip = zipfile.ZipFile(file)
            infos = {info.filename: info for info in self._zip.infolist()}
            expected = [f"arr_{i}.npy" for i in range(len(self._zip.infolist()))]
            strange = next((found for found in infos if found not in expected), None)
            if strange is not None or len(infos) != len(expected):
                raise CheckpointError(
                    f"{self.name}: holds {strange!r:.80}; expected arr_0.npy to arr_{len(expected) - 1}.npy alone"
                )
            self._infos = [infos[name] for name in expected]
            self.members = [self._describe(i) for i in range(len(expected))]

    def _describe(self, i: int) -> Member:
        with self._zip.open(self._infos[i]) as stream:
            member = _header(stream, f"{self.name}: arr_{i}")
            if self._infos[i].file_size != stream.tell() + member.n_bytes:
                raise CheckpointError(
                    f"{self.name}: arr_{i} has {self._infos[i].file_size - stream.tell()} bytes, but its header says "
                    f"{member.dtype} {member.shape}, {member.n_bytes} bytes; copy the file again"
                )
            return member

    def read(self, i: int) -> np.ndarray:
        """The values of member `i`, writable."""
        member = self.members[i]
        out = np.empty(member.shape, member.dtype)
        self.read_into(i, out)
        return out

    def read_into(self, i: int, out: np.ndarray) -> None:
        """Fills `out`, which is C-contiguous and of the member's shape and dtype."""
        with reading(self.name), self._zip.open(self._infos[i]) as stream:
            _header(stream, self.name)
            into = out.reshape(-1).view(np.uint8).data
            done = 0
            while done < len(into):
                n = stream.readinto(into[done : done + _CHUNK])  # type: ignore[attr-defined]
                if not n:
                    raise EOFError("the file ends early")
                done += n
            stream.read(1)  # at the end the checksum is compared

    def verify(self, i: int) -> None:
        """Reads member `i` in bounded memory for the sake of its checksum."""
        with reading(self.name), self._zip.open(self._infos[i]) as stream:
            while stream.read(_CHUNK):
                pass

    def data_offset(self, i: int) -> int:
        """Where in the file, which must lie on a disk, the values of member `i` begin.

        Raises:
            CheckpointError: the member is compressed; the original's never are.
        """
        info = self._infos[i]
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.name}: arr_{i} is compressed; write the file again with numpy.savez")
        with reading(self.name), self._zip.open(info) as stream, open(self.name, "rb") as file:
            _header(stream, self.name)
            file.seek(info.header_offset)
            name_length, extra_length = struct.unpack("<HH", file.read(30)[26:])
            return info.header_offset + 30 + name_length + extra_length + stream.tell()

    def close(self) -> None:
        """Closes the file."""
        self._zip.close()

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _header(stream: IO[bytes], where: str) -> Member:
    """Reads an .npy header; pickles and unknown dtypes are refused before anything is made of them."""
    major, _ = np.lib.format.read_magic(stream)
    if major != 1:
        raise CheckpointError(f"{where}: .npy version {major}; expected 1.0")
    length = struct.unpack("<H", stream.read(2))[0]
    text = stream.read(length)
    if len(text) != length:
        raise EOFError("the header ends early")
    shape, in_fortran_order, descr = _parse(text)
    if "O" in str(descr):
        raise CheckpointError(f"{where}: holds Python objects, which could run code when read; refused")
    if not isinstance(descr, str) or descr not in _DTYPES:
        raise CheckpointError(
            f"{where}: dtype {descr!r:.80} is none of the original's; expected {', '.join(sorted(_DTYPES))}"
        )
    if in_fortran_order and len(shape) > 1:
        raise CheckpointError(f"{where}: stored column by column, which the original never did; expected C order")
    return Member(shape, _DTYPES[descr])


def _parse(text: bytes) -> tuple[tuple[int, ...], bool, str]:
    # Not by ast.literal_eval, as NumPy does: files are read in several threads, and CPython 3.11 counts the depth of
    # its parser once for all of them, so that two at a time may fail with a SystemError (python/cpython issue 106905).
    found = _HEADER.fullmatch(text.decode("latin-1"))
    if not found:
        raise ValueError("the header is not that of an array")
    descr, order, dimensions = found.groups()
    return tuple(int(n) for n in dimensions.split(",") if n.strip()), order == "True", descr.strip("'")


class NpzWriter:
    """Writes members arr_0, arr_1, ... uncompressed, each in as many parts as the caller likes. A context manager."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._n = 0

    @contextlib.contextmanager
    def member(self, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[IO[bytes]]:
        """A stream for the next array's values: little-endian, C order, `shape` of `dtype` in all."""
        # A fixed date: equal arrays make equal files.
        info = zipfile.ZipInfo(f"arr_{self._n}.npy", date_time=(1980, 1, 1, 0, 0, 0))
        self._n += 1
        with self._zip.open(info, "w", force_zip64=True) as stream:
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header, {"descr": _DESCR[np.dtype(dtype)], "fortran_order": False, "shape": shape}
            )
            stream.write(header.getvalue())
            yield stream

    def write(self, values: np.ndarray) -> None:
        """The next array, whole."""
        with self.member(values.shape, values.dtype) as stream:
            stream.write(data_of(values))

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._zip.close()


def data_of(values: np.ndarray) -> memoryview:
    """The bytes of an array in C order; a copy is made only if it is not contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
