"""Writing data files: whole or not at all, with errors that name the file."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mesh_transformer import files
from mesh_transformer.config.errors import DataError


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """`files.atomic_writer` with a DataError, which names the file and the system's reason, for what it raises."""
    try:
        with files.atomic_writer(path) as file:
            yield file
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); check the path and free space"
        ) from error


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` to `path` atomically. Raises DataError as `atomic_writer` does."""
    with atomic_writer(path) as file:
        file.write(data)


def make_directory(path: Path) -> None:
    """Creates `path` and its parents. Raises DataError where the system refuses."""
    try:
        files.make_directories(path)
    except OSError as error:
        raise DataError(f"{path}: the directory cannot be created ({error.strerror or error})") from error


class LateFile:
    """A file being written whose name is not known yet: `file` to write to, `path` to be set before the end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.path: Path | None = None


@contextlib.contextmanager
def late_writer(directory: Path, stem: str) -> Iterator[LateFile]:
    """A file that appears at the `path` that is set in the block when the block ends; else as `atomic_writer`.

    Meanwhile it is `.STEM.tmp-PID` in `directory`. What processes that died left of that name goes first.

    Raises:
        DataError: it cannot be written.
    """
    temporary = directory / f".{stem}.tmp-{os.getpid()}"
    try:
        files.clear_leftovers(directory, re.escape(stem))
        with temporary.open("wb") as file:
            late = LateFile(file)
            yield late
            file.flush()
            os.fsync(file.fileno())
        assert late.path is not None
        temporary.replace(late.path)
        files.fsync_path(directory)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise DataError(
                f"{directory / stem}: cannot be written ({error.strerror or error}); check the path and free space"
            ) from error
        raise
