"""Finding the record files that a data set consists of."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence

from mesh_transformer.config.errors import DataError
from mesh_transformer.data import places

_VALIDATION_FILE = ".val_"
_MAX_SHOWN = 80
_MEND = "`mesh-transformer prepare` makes record files and their index from text"


def resolve_data(spec: str) -> list[str]:
    """The record files that `spec` names, in reading order; local ones exist.

    `spec` is a record file (".tfrecord" in its name), a directory (its record files by name, without the validation
    files that `prepare` puts beside the training files), a glob (by name), or else an index: one path or URL a line,
    blank lines skipped, relative to the index's directory and then to the working directory, in the order of the
    lines. A line that stands twice is read twice. Each may be local or an fsspec URL; paths in an index at a URL are
    relative to that URL alone.

    Raises:
        DataError: nothing there, or an index names a file that is missing (the message names both).
    """
    path = places.normal(spec)
    if not places.is_url(path):
        return _resolve_local(spec, path)
    if places.has_magic(path):
        if found := places.find(path):
            return found
        raise DataError(f"data {spec!r}: no file matches this pattern")
    if is_record_file(path):
        return [path]
    return _record_files(path) if places.is_directory(path) else _read_index(path)


def is_record_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path's own name says that it holds records rather than an index's lines."""
    return ".tfrecord" in os.path.basename(os.fspath(path))


def notes_on(files: Sequence[str]) -> list[str]:
    """What a user should know about a list of record files: those that are in it more than once."""
    times = {path: n for path, n in collections.Counter(files).items() if n > 1}
    if not times:
        return []
    shown = [f"{path} ({n} times)" for path, n in times.items()][:3] + ["..."] * (len(times) > 3)
    return [f"the data names files more than once, which are read as often in every epoch: {', '.join(shown)}"]


def _resolve_local(spec: str, path: str) -> list[str]:
    if os.path.isdir(path):
        return _record_files(path)
    if not os.path.exists(path):
        if places.has_magic(path):
            if found := places.find(path):
                return found
            raise DataError(f"data {spec!r}: no file matches this pattern (working directory {os.getcwd()})")
        raise DataError(
            f"data {spec!r} does not exist (working directory {os.getcwd()}); expected an index file, "
            "a .tfrecords file, a glob or a directory. `mesh-transformer prepare` makes one from text"
        )
    return [path] if is_record_file(path) else _read_index(path)


def _record_files(directory: str) -> list[str]:
    names = [name for name in places.list_names(directory) if is_record_file(name) and not name.startswith(".")]
    training = [name for name in names if _VALIDATION_FILE not in name]
    files = [places.join(directory, name) for name in training or names]
    if not files:
        raise DataError(f"data {directory!r} is a directory without .tfrecords files; {_MEND}")
    return files


def _read_index(index: str) -> list[str]:
    content = places.read_file(index)
    if content is None:
        raise DataError(f"data {index!r} does not exist; expected an index, a .tfrecords file, a glob or a directory")
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{index}: not an index (byte {error.start} is not UTF-8 text); a record file's name holds '.tfrecord'"
        ) from error
    files = [_file_of_line(index, number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not files:
        raise DataError(f"{index}: the index names no files; expected one .tfrecords path a line")
    return files


def _file_of_line(index: str, number: int, line: str) -> str:
    name = places.normal(line)
    if places.is_url(name):
        return name
    beside = places.join(places.parent(index), name)
    if places.is_url(beside):  # whether it exists is found out when it is opened
        return beside
    candidates = list(dict.fromkeys([beside] if places.is_url(index) else [beside, name]))
    found = next((path for path in candidates if os.path.isfile(path)), None)
    if found is None:
        shown = line if len(line) <= _MAX_SHOWN else line[:_MAX_SHOWN] + "..."
        sought = " and ".join(dict.fromkeys(os.path.abspath(path)[: 4 * _MAX_SHOWN] for path in candidates))
        raise DataError(
            f"{index}, line {number} names {shown!r}, which does not exist; looked for {sought}. "
            f"If this is text and no index: {_MEND}"
        )
    return found
