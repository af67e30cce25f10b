"""Tensors out of PyTorch's .bin files (`torch.save` of a state dict), without torch and without running the file.

Both forms are read. Since torch 1.6 a file is a zip archive: `<top>/data.pkl`, a pickle that describes the tensors,
`<top>/data/<key>`, the bytes of each storage, and `<top>/byteorder`. Before, it was five pickles in a row (a magic
number, the protocol, facts about the machine, the description, the storages' keys), then for each storage an int64
count and the bytes. All numbers are little-endian.

The pickles are read by `torch_pickle`, which runs nothing. A description is believed only as far as the file bears it
out: every tensor lies inside its storage, and every storage has the size that the file has for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import math
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from mesh_transformer.checkpoint.torch_pickle import MAX_PICKLE, RebuiltTensor, Refusal, is_count, unpickle, word_for
from mesh_transformer.config.checks import shown
from mesh_transformer.config.errors import CheckpointError

_MAX_RANK = 64  # numpy's own limit
_CHUNK = 1 << 20  # bytes
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_PROTOCOL = 1001

_DTYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}

# Where a storage's bytes are: the archive's member, or the place in an old file where they begin.
_Places = dict[str, str | int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchTensor:
    """What the file says of one tensor. `dtype` is native; bfloat16 is that of ml_dtypes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    _key: str  # of the storage
    _offset: int  # in values from the storage's beginning
    _strides: tuple[int, ...]  # in values

    @property
    def _span(self) -> int:
        """How many values of the storage lie between the tensor's first and its last, both included."""
        return sum((n - 1) * stride for n, stride in zip(self.shape, self._strides, strict=True)) + 1


class TorchFile:
    """The state dict in a `torch.save` file, described when made and read tensor by tensor.

    Entries that are None, a bool, a number or a string are left out, as is the `_metadata` of `Module.state_dict`.

    Attributes:
        tensors: name -> description, in the file's order.

    Raises:
        CheckpointError: the file is missing, damaged, no state dict of plain tensors, or asks for anything else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        with _errors_naming(self._path), _BoundedReader(self._path) as file:
            self.tensors: Mapping[str, TorchTensor]
            self.tensors, self._places = _read_zip(file) if _is_zip(file) else _read_old(file)

    def read(self, name: str) -> np.ndarray:
        """That tensor as a C-contiguous array of its own, in native byte order.

        Only the part of the storage that the tensor spans is held, once; a tensor that is not contiguous there is held
        twice for a moment. The zip form's checksum is verified.

        Raises:
            CheckpointError: there is no such tensor, or its bytes are damaged or gone.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self._path}: lacks the tensor {shown(name)}")
        tensor = self.tensors[name]
        if 0 in tensor.shape:
            return np.empty(tensor.shape, tensor.dtype)
        place = self._places[tensor._key]
        start, n_bytes = tensor._offset * tensor.dtype.itemsize, tensor._span * tensor.dtype.itemsize
        with _errors_naming(self._path, shown(name)), _BoundedReader(self._path) as file:
            if isinstance(place, int):
                file.seek(place + start)
                raw = _read_exactly(file, n_bytes)
            else:
                with _open_zip(file) as archive, archive.open(_member(archive, place)) as stream:
                    _skip(stream, start)
                    raw = _read_exactly(stream, n_bytes)
                    _skip(stream, None)  # zipfile compares the checksum at the member's end
            return _shaped(raw, tensor)


def _shaped(raw: np.ndarray, tensor: TorchTensor) -> np.ndarray:
    """The bytes of the tensor's span as the tensor."""
    if tensor.dtype == np.bool_:
        np.not_equal(raw, 0, out=raw.view(np.bool_))  # a byte other than 0 and 1 is no valid numpy bool
    values = raw.view(tensor.dtype)
    if sys.byteorder == "big":
        values.byteswap(inplace=True)
    # numpy verifies once more that shape and strides stay inside the buffer.
    strides = tuple(stride * tensor.dtype.itemsize for stride in tensor._strides)
    view: np.ndarray = np.ndarray(tensor.shape, tensor.dtype, buffer=raw, strides=strides)
    return values.reshape(tensor.shape) if view.flags.c_contiguous else view.copy(order="C")


# --- The two containers ---


class _BoundedReader(io.BufferedReader):
    """Refuses to read more than `MAX_PICKLE` bytes at once, whatever length a damaged field claims."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.n_bytes = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self.n_bytes - self.tell() if size is None or size < 0 else size
        if wanted > MAX_PICKLE:
            raise Refusal(f"is damaged: a part that is no tensor has {wanted:,} bytes; copy or download it again")
        return super().read(max(wanted, 0))

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(MAX_PICKLE if size is None or size < 0 else min(size, MAX_PICKLE))


def _is_zip(file: _BoundedReader) -> bool:
    """Whether it is of the zip form. Raises Refusal where it is of neither form."""
    head = file.read(64)
    file.seek(0)
    if head.startswith(b"version https://git-lfs"):
        raise Refusal("is a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise Refusal(f"is no PyTorch file ({'it is empty' if not head else 'neither a zip archive nor a pickle'})")
    return head.startswith(b"PK")


def _open_zip(file: _BoundedReader) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(file)
    if len(archive.NameToInfo) != len(archive.filelist):
        raise Refusal("two members of the archive have the same name")  # which one counts differs between readers
    return archive


def _member(archive: zipfile.ZipFile, name: str, max_bytes: int | None = None) -> zipfile.ZipInfo:
    """The directory's entry for `name`, whose sizes are such that the file can hold what they claim."""
    if name not in archive.NameToInfo:
        raise Refusal(f"lacks the archive member {shown(name)}")
    info = archive.NameToInfo[name]
    if info.flag_bits & 1:
        raise Refusal(f"the archive member {shown(name)} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refusal(f"the archive member {shown(name)} has an unknown compression")
    # Deflate makes at most 1032 bytes out of one.
    largest = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else 1032)
    n_file = os.fstat(archive.fp.fileno()).st_size if archive.fp else 0
    if info.header_offset + info.compress_size > n_file or info.file_size > largest:
        raise Refusal(f"the archive member {shown(name)} is cut short; copy or download the file again")
    if max_bytes is not None and info.file_size > max_bytes:
        raise Refusal(f"{shown(name)} has {info.file_size:,} bytes; expected at most {max_bytes:,}")
    return info


def _read_zip(file: _BoundedReader) -> tuple[dict[str, TorchTensor], _Places]:
    places: _Places = {}
    with _open_zip(file) as archive:
        tops = [name[: -len("data.pkl")] for name in archive.NameToInfo if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(tops) != 1:
            raise Refusal(f"has {len(tops)} members */data.pkl; expected one, as torch.save writes it")
        (top,) = tops
        if top + "byteorder" in archive.NameToInfo:
            order = archive.read(_member(archive, top + "byteorder", max_bytes=64))
            if order != b"little":
                raise Refusal(f"its byte order is {shown(order.decode('latin-1'))}; only little can be read")
        description = archive.read(_member(archive, top + "data.pkl", max_bytes=MAX_PICKLE))
        state, storages = unpickle(io.BytesIO(description))
        tensors = _describe_all(state)
        for key, storage in storages.items():
            name = f"{top}data/{key}"
            n_bytes = _member(archive, name).file_size
            # The odd bytes at the end of a storage that began as one of bytes are no value.
            if storage.kind in _DTYPES and n_bytes // _DTYPES[storage.kind].itemsize != storage.n:
                raise Refusal(f"{shown(name)} has {n_bytes:,} bytes; expected {storage.n} values of {storage.kind}")
            places[key] = name
    return tensors, places


def _read_old(file: _BoundedReader) -> tuple[dict[str, TorchTensor], _Places]:
    if unpickle(file)[0] != _OLD_MAGIC:
        raise Refusal("is a pickle, but none that torch.save wrote")
    if unpickle(file)[0] != _OLD_PROTOCOL:
        raise Refusal(f"its protocol is not the known one, {_OLD_PROTOCOL}")
    facts, _ = unpickle(file)
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise Refusal("its byte order is not little; only that can be read")
    state, storages = unpickle(file)
    tensors = _describe_all(state)
    keys, _ = unpickle(file)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise Refusal("is damaged: its list of storages does not match its tensors; copy or download it again")
    places: _Places = {}
    for key in keys:
        storage = storages[key]
        if storage.kind not in _DTYPES:
            raise Refusal(f"has a storage of the unknown kind {storage.kind}, so that what follows cannot be found")
        count, place = int.from_bytes(file.read(8), "little"), file.tell()
        end = place + storage.n * _DTYPES[storage.kind].itemsize
        if end > file.n_bytes:
            raise Refusal(f"is cut short at storage {shown(key)}; copy or download it again")
        if count != storage.n:
            raise Refusal(f"storage {shown(key)} has {count} values; expected {storage.n}")
        places[key] = place
        file.seek(end)
    return tensors, places


def _read_exactly(stream: IO[bytes], n_bytes: int) -> np.ndarray:
    raw = np.empty(n_bytes, np.uint8)
    filled = 0
    while filled < n_bytes:
        got = stream.readinto(raw.data[filled : filled + _CHUNK])  # type: ignore[attr-defined]
        if not got:
            raise Refusal("ends early; copy or download it again")
        filled += got
    return raw


def _skip(stream: IO[bytes], n_bytes: int | None) -> None:
    """Reads so many bytes, or all that are left, and forgets them."""
    while n_bytes != 0:
        got = len(stream.read(_CHUNK if n_bytes is None else min(_CHUNK, n_bytes)))
        if not got:
            return
        n_bytes = None if n_bytes is None else n_bytes - got


# --- The description ---


def _describe_all(state: Any) -> dict[str, TorchTensor]:
    hint = "expected a state dict, a mapping of names to tensors"
    if not isinstance(state, dict):
        raise Refusal(f"holds a {word_for(state)}; {hint}")
    found = {}
    for name, value in state.items():
        if isinstance(value, RebuiltTensor) and isinstance(name, str):
            found[name] = _describe(name, value)
        elif not isinstance(value, bool | int | float | str | None):
            is_a = f"the entry {shown(name)} is a {word_for(value)}"
            raise Refusal(f"{is_a}; {hint}\nif it holds the state dict, save that alone")
    return found


def _describe(name: str, rebuilt: RebuiltTensor) -> TorchTensor:
    """Verifies that the tensor lies inside its storage, whose size is the file's.

    Raises:
        Refusal: it does not, or is of an unknown kind.
    """
    storage, shape, strides = rebuilt.storage, rebuilt.shape, rebuilt.strides
    if storage.kind not in _DTYPES:
        known = ", ".join(kind.removeprefix("torch.").removesuffix("Storage") for kind in _DTYPES)
        raise Refusal(f"the tensor {shown(name)} lies in a {storage.kind}; only these can be read: {known}")
    counts = all(isinstance(part, tuple) and all(map(is_count, part)) for part in (shape, strides))
    if not counts or not is_count(rebuilt.offset) or len(shape) != len(strides) or len(shape) > _MAX_RANK:
        raise Refusal(f"the tensor {shown(name)} has a damaged shape, stride or offset")
    tensor = TorchTensor(
        shape=shape, dtype=_DTYPES[storage.kind], _key=storage.key, _offset=rebuilt.offset, _strides=strides
    )
    if math.prod(n or 1 for n in shape) * tensor.dtype.itemsize >= 1 << 63:
        raise Refusal(f"the tensor {shown(name)} has the impossible shape {shown(shape)}")
    # More values than the storage has: broadcast by strides of 0, which would let one byte claim all memory.
    n = math.prod(shape)
    if n > storage.n or (n and tensor._offset + tensor._span > storage.n):
        raise Refusal(
            f"the tensor {shown(name)} of shape {shown(shape)} does not fit its storage of {storage.n} values\n"
            "if it was made by expand(), save tensor.contiguous()"
        )
    return tensor


# --- Errors ---


@contextlib.contextmanager
def _errors_naming(path: Path, part: str | None = None) -> Iterator[None]:
    what = f"{path}: the tensor {part}:" if part else f"{path}:"
    try:
        yield
    except Refusal as error:
        raise CheckpointError(f"{what} {error}") from error
    except OSError as error:
        # What a damaged archive makes zipfile seek to may lie before the file's beginning.
        hint = "; it is damaged, copy or download it again" if error.errno == errno.EINVAL else ""
        raise CheckpointError(f"{what} cannot be read: {error.strerror or error}{hint}") from error
    except MemoryError as error:
        raise CheckpointError(f"{what} too little memory to read it") from error
    # Damaged bytes make zipfile, zlib and pickletools raise almost anything: the user sees one thing.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise CheckpointError(f"{what} is damaged ({reason}); copy or download it again") from error
