"""Writing files so that a reader never sees half of one, and so that a power cut does not undo a rename."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_LEFTOVER = r"\.({name})\.(tmp|old|del)-([0-9]+)"


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the block ends: fsynced, renamed over it, directory fsynced.

    Whoever reads `path` meanwhile, and whatever dies meanwhile, the file is the old one or the new one.

    Raises:
        OSError: nothing was changed at `path`, and the temporary file is gone.
    """
    path = Path(path)
    # Not tempfile: its files are readable by their owner only, and keep that mode after the rename.
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_path(path.parent)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Puts `data` at `path` as `atomic_writer` does. Raises OSError likewise."""
    with atomic_writer(path) as file:
        file.write(data)


def make_directories(path: Path) -> None:
    """`mkdir -p` whose result a power cut does not undo."""
    if not path.is_dir():
        make_directories(path.parent)
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Waits until the file, or the directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """`fsync_path` for everything in `directory` and at last itself."""
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            fsync_path(Path(parent, name))
        fsync_path(Path(parent))


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """An empty directory to fill, which appears at `path`, fsynced, when the block ends.

    Meanwhile it is `.NAME.tmp-PID` beside its place. With `overwrite`, what is at `path` is removed only after its
    successor is there (in between it is `.NAME.old-PID`). What processes that died left of either is cleared away
    first, and a former directory whose successor never came is put back.

    Raises:
        FileExistsError: `path` exists and is not to be overwritten.
        OSError: nothing was changed at `path`, and the new directory is gone.
    """
    path = Path(path).absolute()
    clear_leftovers(path.parent, re.escape(path.name))
    if not overwrite and (path.exists() or path.is_symlink()):
        raise FileExistsError(errno.EEXIST, "exists already", str(path))
    make_directories(path.parent)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    replaced = path.with_name(f".{path.name}.old-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        if path.exists() or path.is_symlink():
            path.rename(replaced)
        try:
            temporary.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)
    _remove(replaced)


def is_leftover(name: str) -> bool:
    """Whether a directory of that name is half written or half removed, or was while the process that made it lived."""
    match = re.fullmatch(_LEFTOVER.format(name=".+"), name)
    return match is not None and match[2] != "old"


def clear_leftovers(directory: Path, name_pattern: str) -> None:
    """Removes what dead processes left of directories in `directory` whose name matches the regular expression.

    Left-overs are `.NAME.tmp-PID` (half written), `.NAME.del-PID` (half removed) and `.NAME.old-PID` (being replaced);
    the last is put back where its successor never came.
    """
    leftover = re.compile(_LEFTOVER.format(name=name_pattern))
    for entry in list(directory.iterdir()) if directory.is_dir() else []:
        match = leftover.fullmatch(entry.name)
        # Our own process number is that of an earlier process too: in a container every run may be number 1.
        if match is None or (int(match[3]) != os.getpid() and _is_alive(int(match[3]))):
            continue
        final = entry.with_name(match[1])
        if match[2] == "old" and not final.exists():
            entry.rename(final)
        else:
            _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def is_out_of_space(error: BaseException) -> bool:
    """Whether the disk or a quota is full; also where TensorStore reports it as text of another exception."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    # The accelerator's memory running out has the same status code.
    exhausted = "RESOURCE_EXHAUSTED" in text and "memory" not in text.lower()
    return exhausted or "No space left" in text or "quota exceeded" in text.lower()
