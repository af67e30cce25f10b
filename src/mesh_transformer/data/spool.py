"""Token ids waiting on the disk, in a file without a name that is gone when the process is."""

from __future__ import annotations

import contextlib
import os
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mesh_transformer.config.errors import DataError


class Spool:
    """Pieces of ids one after the other: the parts of a text. Appended to, then read by position.

    Args:
        directory: where the file lies; the nearest directory above that exists is taken.
        dtype: of the ids in the file.

    Raises:
        DataError: the file cannot be made.
    """

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        while not directory.is_dir() and directory != directory.parent:
            directory = directory.parent
        self._directory = directory
        self._dtype = np.dtype(dtype)
        self._ends = array("q")
        self.size = 0
        with self._naming():
            # Without a name (or unlinked at once): a process that is killed leaves nothing.
            self._file = tempfile.TemporaryFile(dir=directory, prefix=".prepare-")  # noqa: SIM115 -- see close

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self._directory}: no room for the tokens ({error.strerror or error}); "
                f"{self.size * self._dtype.itemsize / 1e9:.1f} GB are written, free space or choose another --out"
            ) from error

    def append(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """Writes `ids` [n]; a part ends before each position in `ends` [m], which count from 0 in `ids`."""
        with self._naming():
            self._file.write(ids.astype(self._dtype, copy=False).tobytes())
        self._ends.frombytes((ends.astype(np.int64) + self.size).tobytes())
        self.size += ids.size

    def ends(self) -> np.ndarray:
        """int64 [n_parts]: the position after each part."""
        return np.frombuffer(self._ends, np.int64) if self._ends else np.zeros(0, np.int64)

    def starts(self) -> np.ndarray:
        """int64 [n_parts]: the position of each part's first id."""
        return np.concatenate([np.zeros(1, np.int64), self.ends()[:-1]]) if self._ends else np.zeros(0, np.int64)

    def finish(self) -> None:
        """To be called between the last `append` and the first `read`."""
        with self._naming():
            self._file.flush()

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int32 [sum of lengths]: the ids of these ranges [n], one after the other."""
        # Not through a mapping of the memory: its pages would count as this process's.
        size, descriptor = self._dtype.itemsize, self._file.fileno()
        with self._naming():
            found = [
                os.pread(descriptor, length * size, start * size)
                for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
            ]
        return np.frombuffer(b"".join(found), self._dtype).astype(np.int32)

    def close(self) -> None:
        """Removes the file. Nothing can be read afterwards."""
        self._file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
