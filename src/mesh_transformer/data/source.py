"""Random access to the sequences of record files."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np

from mesh_transformer.config.errors import DataError
from mesh_transformer.data import places
from mesh_transformer.data.example import Example, text_row
from mesh_transformer.data.expand import plain_file
from mesh_transformer.data.finding import is_record_file, notes_on, resolve_data
from mesh_transformer.data.image_text import image_text_row, is_image_text
from mesh_transformer.data.offsets import record_lengths
from mesh_transformer.data.tfrecord import FOOTER_BYTES, HEADER_BYTES, checked_payload, read_record

__all__ = ["RecordSource", "is_record_file", "open_source", "resolve_data"]

# Files of a remote data set that are looked at side by side when it is opened.
_OPENED_AT_ONCE = 8


class RecordSource:
    """Random access to the sequences of a list of record files, in file order.

    Reading is safe from many threads; nothing is held open between reads. A row is int32 [T + 1]; an id that is not to
    be learned stands in it as `~id`. Records of the original's image-text data are known by their features.

    Args:
        files: record files, local or at URLs, as `resolve_data` returns them.
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
        opened = _open_all(self.files)
        self._plain = [plain for plain, _, _ in opened]
        # Payload offsets alone are kept, with the end of the file after each file's last: a length is a difference.
        self._offsets = [
            HEADER_BYTES + np.concatenate([[0], np.cumsum(lengths + HEADER_BYTES + FOOTER_BYTES)])
            for _, lengths, _ in opened
        ]
        self._sizes = [size for _, _, size in opened]
        self._ends = np.cumsum([lengths.size for _, lengths, _ in opened])
        if len(self) == 0:
            shown = ", ".join(self.files[:3]) + (", ..." if len(self.files) > 3 else "")
            raise DataError(f"the data set is empty: no records in {len(self.files)} files ({shown})")
        self._check_first_records()

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
        which, record, offset, length = self._find(index)
        path, plain = self.files[which], self._plain[which]
        if places.is_url(plain):
            data = places.read_range(plain, offset, length + FOOTER_BYTES)
            return self._row(checked_payload(data, offset, length, path=path, record=record), which, record)
        try:
            descriptor = os.open(plain, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        try:
            payload = read_record(descriptor, offset, length, path=path, record=record)
        finally:
            os.close(descriptor)
        return self._row(payload, which, record)

    def read_many(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The sequences of these numbers, those of one remote file at a time. Raises as reading one by one does."""
        if not self.remote:
            return [self[index] for index in indices]
        rows: dict[int, np.ndarray] = {}
        found = [(n, *self._find(index)) for n, index in enumerate(indices)]
        for which in sorted({each[1] for each in found}):
            path, plain = self.files[which], self._plain[which]
            mine = [each for each in found if each[1] == which]
            if not places.is_url(plain):
                rows |= {n: self[indices[n]] for n, *_ in mine}
                continue
            starts = [offset for _, _, _, offset, _ in mine]
            parts = places.read_ranges(plain, starts, [length + FOOTER_BYTES for *_, length in mine])
            for (n, _, record, offset, length), data in zip(mine, parts, strict=True):
                payload = checked_payload(data, offset, length, path=path, record=record)
                rows[n] = self._row(payload, which, record)
        return [rows[n] for n in range(len(indices))]

    @property
    def remote(self) -> bool:
        """Whether some of it is read over a network."""
        return any(map(places.is_url, self._plain))

    @property
    def file_counts(self) -> list[int]:
        """The number of records of each file."""
        return [offsets.size - 1 for offsets in self._offsets]

    @property
    def notes(self) -> list[str]:
        """What a user should know about the files: lines to show."""
        return notes_on(self.files)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over each file's base name, record count and size in bytes, in order: the data list's identity."""
        digest = hashlib.sha256()
        for path, count, size in zip(self.files, self.file_counts, self._sizes, strict=True):
            digest.update(f"{os.path.basename(path)}\0{count}\0{size}\n".encode())
        return digest.hexdigest()

    def _find(self, index: int) -> tuple[int, int, int, int]:
        """(number of its file, number of the record in it, its payload's offset and length)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        offsets = self._offsets[which]
        record = int(index - self._ends[which]) + offsets.size - 1
        offset = int(offsets[record])
        return which, record, offset, int(offsets[record + 1]) - offset - HEADER_BYTES - FOOTER_BYTES

    def _check_first_records(self) -> None:
        first = [int(end) - count for end, count in zip(self._ends, self.file_counts, strict=True) if count]
        if self.remote:
            with concurrent.futures.ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
                list(pool.map(self.__getitem__, first))
            return
        for index in first:
            self[index]

    def _row(self, payload: bytes, which: int, record: int) -> np.ndarray:
        where = f"{self.files[which]}, record {record}"
        example = Example(payload, where)
        row = image_text_row(example, where) if is_image_text(example) else text_row(example, where)
        if row.size != self.sequence_length + 1:
            raise DataError(
                f"{where} has {row.size} ids, but sequence_length {self.sequence_length} needs "
                f"{self.sequence_length + 1}; {self._mend_of_length(row.size, which, record)}"
            )
        self._check_vocabulary(row, where)
        return row

    def _mend_of_length(self, size: int, which: int, record: int) -> str:
        # The first record of every file was checked when it was opened, in the order of the files.
        if record:
            return "the records of this file are of unequal length; prepare the data again"
        if any(self.file_counts[:which]):
            return f"{self.files[which - 1]} before it has so many; prepare the data again, or leave this file out"
        return f"set data.sequence_length = {size - 1} or prepare the data again"

    def _check_vocabulary(self, row: np.ndarray, where: str) -> None:
        ids = np.where(row < 0, ~row, row)
        outside = ids >= self.n_vocab
        if outside.any():
            raise DataError(
                f"{where} has token id {ids[outside][0]}, outside 0..{self.n_vocab - 1} (n_vocab = {self.n_vocab}); "
                "prepare the data with this model's tokenizer, or set model.n_vocab"
            )


def _open_all(files: Sequence[str]) -> list[tuple[str, np.ndarray, int]]:
    """Of each file: the path of its plain records, their lengths, the plain file's own size in bytes."""
    if not any(map(places.is_url, files)):
        return [_open(path) for path in files]
    once = list(dict.fromkeys(files))
    with concurrent.futures.ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        opened = dict(zip(once, pool.map(_open, once), strict=True))
    return [opened[path] for path in files]


def _open(path: str) -> tuple[str, np.ndarray, int]:
    plain = plain_file(path)
    try:
        lengths = record_lengths(plain)
    except DataError as error:
        if plain == path:
            raise
        raise DataError(f"{path}: what it expands to is damaged: {error}") from error
    return plain, lengths, places.facts(path).size


def open_source(
    spec: str, *, sequence_length: int, n_vocab: int, note: Callable[[str], None] | None = None
) -> RecordSource:
    """The sequences of the data set that `spec` names.

    Args:
        note: told what a user should know: that files are read more than once, that remote files are looked through.

    Raises:
        DataError: as `resolve_data` and `RecordSource` say.
    """
    files = resolve_data(spec)
    n_remote = sum(map(places.is_url, files))
    if note and n_remote:
        note(f"{spec}: looking through {n_remote} remote record files; what is found is kept in the user's cache")
    source = RecordSource(files, sequence_length=sequence_length, n_vocab=n_vocab)
    if note:
        for line in source.notes:
            note(line)
    return source
