"""Finding the record files of a data set, and random access to their sequences."""

from __future__ import annotations

import glob
import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from mesh_transformer.config.errors import DataError
from mesh_transformer.config.paths import cache_directory
from mesh_transformer.data.files import make_directory, write_atomic
from mesh_transformer.data.tfrecord import (
    FOOTER_BYTES,
    HEADER_BYTES,
    decode_example,
    plain_file,
    read_record,
    scan_offsets,
)

_VALIDATION_FILE = ".val_"


# ----------------------------------------------------------------------------------------------------- finding files


def resolve_data(spec: str) -> list[str]:
    """The record files that `spec` names, in reading order; each exists.

    `spec` is a record file (".tfrecord" in its name), a directory (its record files by name, without the validation
    files that `prepare` puts beside the training files), a glob (by name), or else an index: one path a line, blank
    lines skipped, relative to the index's directory and then to the working directory, in the order of the lines.

    Raises:
        DataError: nothing there, or an index names a file that is missing (the message names both).
    """
    _refuse_remote(spec, "data")
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        return _record_files(path)
    if not os.path.exists(path):
        if glob.has_magic(path):
            found = sorted(name for name in glob.glob(path) if os.path.isfile(name))
            if found:
                return found
            raise DataError(f"data {spec!r}: no file matches this pattern (working directory {os.getcwd()})")
        raise DataError(
            f"data {spec!r} does not exist (working directory {os.getcwd()}); expected an index file, "
            "a .tfrecords file, a glob or a directory. `mesh-transformer prepare` makes one from text"
        )
    return [path] if is_record_file(path) else _read_index(path)


def is_record_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path's own name says that it holds records rather than an index's lines."""
    return ".tfrecord" in os.path.basename(os.fspath(path))


def _record_files(directory: str) -> list[str]:
    names = sorted(name for name in os.listdir(directory) if is_record_file(name) and not name.startswith("."))
    training = [name for name in names if _VALIDATION_FILE not in name]
    files = [os.path.join(directory, name) for name in training or names]
    if not files:
        raise DataError(f"data {directory!r} is a directory without .tfrecords files")
    return files


def _read_index(index: str) -> list[str]:
    try:
        lines = Path(index).read_bytes().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{index}: not an index (byte {error.start} is not UTF-8 text); a record file's name holds '.tfrecord'"
        ) from error
    except OSError as error:
        raise DataError(f"{index}: cannot be read ({error.strerror or error})") from error
    files = []
    for number, line in enumerate(lines, 1):
        if not (name := line.strip()):
            continue
        _refuse_remote(name, f"{index}, line {number}")
        name = os.path.expanduser(name)
        candidates = [os.path.join(os.path.dirname(index), name), name]
        found = next((path for path in candidates if os.path.isfile(path)), None)
        if found is None:
            raise DataError(
                f"{index}, line {number} names {name!r}, which does not exist; looked for "
                f"{' and '.join(dict.fromkeys(map(os.path.abspath, candidates)))}"
            )
        files.append(found)
    if not files:
        raise DataError(f"{index}: the index names no files; expected one .tfrecords path a line")
    return files


def _refuse_remote(name: str, where: str) -> None:
    if "://" in name:
        raise DataError(f"{where}: {name!r} is remote; records are read from local or mounted paths, copy them first")


# ------------------------------------------------------------------------------------------------------- the offsets

_OFFSETS_MAGIC = b"MTOFFS01"
# magic, the record file's size in bytes and mtime in ns, number of records
_OFFSETS_HEADER = struct.Struct("<8sQQQ")


def record_lengths(path: str) -> np.ndarray:
    """int64 [n_records]: the payload length in bytes of every record of an uncompressed file.

    They come from one pass over the headers, kept in a hidden file beside the data, or in the user's cache where that
    directory cannot be written; a kept one that is damaged, or of another size or time of change, is made anew.

    Raises:
        DataError: the record file is missing or damaged.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    beside = Path(path).with_name(f".{Path(path).name}.offsets")
    key = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32]
    cached = cache_directory() / "offsets" / f"{key}.offsets"
    for candidate in (beside, cached):
        lengths = _read_lengths(candidate, status)
        if lengths is not None:
            return lengths
    lengths = scan_offsets(path)[1]
    head = _OFFSETS_HEADER.pack(_OFFSETS_MAGIC, status.st_size, status.st_mtime_ns, lengths.size)
    data = head + lengths.astype("<i8").tobytes()
    data += struct.pack("<I", google_crc32c.value(data))
    for candidate in (beside, cached):
        try:
            make_directory(candidate.parent)
            write_atomic(candidate, data)
            break
        except DataError:
            continue  # without a place to keep them, the next start scans again
    return lengths


def _lengths_of(path: str, plain: str) -> np.ndarray:
    """`record_lengths` of the expanded copy `plain`; an error names the user's own file too."""
    try:
        return record_lengths(plain)
    except DataError as error:
        if plain == path:
            raise
        raise DataError(f"{path}: what it expands to is damaged: {error}") from error


def _read_lengths(path: Path, status: os.stat_result) -> np.ndarray | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _OFFSETS_HEADER.size + 4 or google_crc32c.value(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        return None
    magic, size, mtime, count = _OFFSETS_HEADER.unpack_from(data)
    if (magic, size, mtime) != (_OFFSETS_MAGIC, status.st_size, status.st_mtime_ns):
        return None
    return np.frombuffer(data, "<i8", count, _OFFSETS_HEADER.size).astype(np.int64)


# -------------------------------------------------------------------------------------------------------- the source


class RecordSource:
    """Random access to the sequences of a list of record files, in file order: a data source as Grain expects.

    Reading is safe from many threads; nothing is held open between reads.

    Args:
        files: record files, as `resolve_data` returns them.
        sequence_length: T; every record must hold T + 1 ids.
        n_vocab: ids must lie in 0..n_vocab-1.

    Raises:
        DataError: a file is missing or damaged, there are no records at all, or the first record of a file has another
            length or an id outside the vocabulary. Every other record is checked when it is read.
    """

    def __init__(self, files: Sequence[str], *, sequence_length: int, n_vocab: int) -> None:
        self.files = tuple(files)
        self.sequence_length = sequence_length
        self.n_vocab = n_vocab
        self._plain = [plain_file(path) for path in self.files]
        lengths = [_lengths_of(path, plain) for path, plain in zip(self.files, self._plain, strict=True)]
        # Payload offsets alone are kept, with the end of the file after each file's last: a length is a difference.
        self._offsets = [
            HEADER_BYTES + np.concatenate([[0], np.cumsum(each + HEADER_BYTES + FOOTER_BYTES)]) for each in lengths
        ]
        self._sizes = [os.path.getsize(path) for path in self.files]
        self._ends = np.cumsum([each.size for each in lengths])
        if len(self) == 0:
            shown = ", ".join(self.files[:3]) + (", ..." if len(self.files) > 3 else "")
            raise DataError(f"the data set is empty: no records in {len(self.files)} files ({shown})")
        for end, each in zip(self._ends, lengths, strict=True):
            if each.size:
                self[int(end) - each.size]

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def __repr__(self) -> str:
        return f"RecordSource({len(self.files)} files, {len(self)} sequences of {self.sequence_length} + 1 ids)"

    def __getitem__(self, index: int) -> np.ndarray:
        """Sequence `index`, counted through all files: int32 [T + 1].

        Raises:
            DataError: damaged, of another length, or an id is outside the vocabulary.
            IndexError: `index` is not in 0..len-1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        offsets = self._offsets[which]
        record = int(index - self._ends[which]) + offsets.size - 1
        offset = int(offsets[record])
        length = int(offsets[record + 1]) - offset - HEADER_BYTES - FOOTER_BYTES
        path = self.files[which]
        try:
            descriptor = os.open(self._plain[which], os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        try:
            payload = read_record(descriptor, offset, length, path=path, record=record)
        finally:
            os.close(descriptor)
        where = f"{path}, record {record}"
        ids = decode_example(payload, where=where)
        self._check(ids, where)
        return ids

    def _check(self, ids: np.ndarray, where: str) -> None:
        if ids.size != self.sequence_length + 1:
            raise DataError(
                f"{where} has {ids.size} ids, but sequence_length {self.sequence_length} needs "
                f"{self.sequence_length + 1}; set data.sequence_length = {ids.size - 1} or prepare the data again"
            )
        # Negative ids wrap to large unsigned ones, so one comparison finds both kinds.
        outside = ids.view(np.uint32) >= self.n_vocab
        if outside.any():
            raise DataError(
                f"{where} has token id {ids[outside][0]}, outside 0..{self.n_vocab - 1} (n_vocab = {self.n_vocab}); "
                "prepare the data with this model's tokenizer, or set model.n_vocab"
            )

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over each file's base name, record count and size in bytes, in order: the data list's identity."""
        digest = hashlib.sha256()
        for path, offsets, size in zip(self.files, self._offsets, self._sizes, strict=True):
            digest.update(f"{os.path.basename(path)}\0{offsets.size - 1}\0{size}\n".encode())
        return digest.hexdigest()


def open_source(spec: str, *, sequence_length: int, n_vocab: int) -> RecordSource:
    """The sequences of the data set that `spec` names. Raises DataError as `resolve_data` and `RecordSource` do."""
    return RecordSource(resolve_data(spec), sequence_length=sequence_length, n_vocab=n_vocab)
