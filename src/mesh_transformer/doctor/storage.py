"""Whether a place can be written to, read from and deleted from: tried out with a file that does not stay."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.config.paths import cache_directory
from mesh_transformer.data import places
from mesh_transformer.doctor.finding import Finding, failed, ok, warning
from mesh_transformer.doctor.machine import gib

_BYTES = 1 << 20
_MENDS = {
    errno.ENOSPC: "free space there, or write elsewhere",
    errno.EDQUOT: "the quota is used up: free space there, or write elsewhere",
    errno.EROFS: "it is mounted for reading only: mount it for writing, or write elsewhere",
    errno.EACCES: "give this user the right to write there (chown, chmod), or write elsewhere",
    errno.EPERM: "give this user the right to write there (chown, chmod), or write elsewhere",
}
_ELSEWHERE = "make it usable, or write elsewhere"


class PlaceError(Exception):
    """A place cannot be used; `mend` says what to do."""

    def __init__(self, message: str, mend: str) -> None:
        super().__init__(message)
        self.mend = mend


def check_place(name: str, where: str, mend: str = "") -> Iterator[Finding]:
    """Writes, reads and deletes a file at a directory or fsspec URL, or where the directory would be made.

    Args:
        mend: what to add to the advice where it cannot be used.
    """
    try:
        yield ok(name, try_place(where))
    except PlaceError as error:
        yield failed(name, str(error), f"{error.mend}; {mend}" if mend else error.mend)


def check_compile_cache(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Where compiled programs are kept between processes; without it every start compiles anew."""
    where = environment.get("JAX_COMPILATION_CACHE_DIR") or str(cache_directory() / "xla")
    variable = "JAX_COMPILATION_CACHE_DIR" if environment.get("JAX_COMPILATION_CACHE_DIR") else "MESH_TRANSFORMER_CACHE"
    try:
        yield ok("compile cache", try_place(where))
    except PlaceError as error:
        message = f"{error}; every start compiles anew"
        yield warning("compile cache", message, f"{error.mend}; {variable} names another directory")


def try_place(where: str) -> str:
    """What was found, in words.

    Raises:
        PlaceError: a file cannot be written, read back, renamed or deleted there.
    """
    path = places.normal(where)
    return _try_url(path) if places.is_url(path) else _try_directory(Path(path))


# ---------------------------------------------------------------------------------------------------------- directory


def nearest_directory(path: Path) -> Path:
    """The directory itself, or the nearest one above it that exists.

    Raises:
        PlaceError: something else stands in the way.
    """
    for candidate in (path.absolute(), *path.absolute().parents):
        try:
            is_there = os.path.lexists(candidate)
        except OSError as error:
            raise PlaceError(f"{candidate}: cannot be looked at ({error.strerror})", _ELSEWHERE) from error
        if candidate.is_dir():
            return candidate
        if is_there:
            what = "a link that leads nowhere" if candidate.is_symlink() else "a file"
            raise PlaceError(f"{candidate} is {what}, where a directory must be", f"move {candidate} out of the way")
    raise AssertionError  # the root is a directory


def _try_directory(path: Path) -> str:
    directory = nearest_directory(path)
    probe = directory / _probe_name()
    renamed = probe.with_name(f"{probe.name}.renamed")
    data = os.urandom(_BYTES)
    doing = "writing"
    began = time.perf_counter()
    try:
        with probe.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
            doing = "locking"
            _lock(file)
        doing = "renaming"
        probe.rename(renamed)
        doing = "reading back"
        if renamed.read_bytes() != data:
            raise PlaceError(f"{directory}: what is read there is not what was written", "do not use this storage")
        doing = "deleting"
        renamed.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        mend = _MENDS.get(error.errno or 0, _ELSEWHERE)
        raise PlaceError(f"{directory}: {doing} a file failed ({reason}){_left(probe, renamed)}", mend) from error
    finally:
        for file_path in (probe, renamed):
            with contextlib.suppress(OSError):
                file_path.unlink()
    made = "" if directory == path.absolute() else f", where {path} would be made"
    return f"{directory}{made}: written at {_BYTES / 1e6 / seconds:,.0f} MB/s, read and deleted"


def _lock(file: Any) -> None:
    import fcntl

    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _left(*paths: Path) -> str:
    """What to say of a probe file that can no longer be deleted."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
    left = [str(path) for path in paths if path.exists()]
    return f"; {left[0]} could not be deleted and is left" if left else ""


def _probe_name() -> str:
    return f".mesh-transformer-doctor-{os.getpid()}-{secrets.token_hex(4)}"


# ---------------------------------------------------------------------------------------------------------------- URL


def _try_url(url: str) -> str:
    import fsspec  # only where needed: it is slow to import

    try:
        system, inside = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise PlaceError(f"{url}: {error}", "pip install 'mesh-transformer[remote]'") from error
    except Exception as error:  # each file system raises its own
        raise _unusable(url, "opening", error) from error
    probe = posixpath.join(inside.rstrip("/"), _probe_name())
    data, doing = os.urandom(_BYTES), "looking at it"
    before: list[str] = []
    began = time.perf_counter()
    try:
        before = _missing_directories(system, inside.rstrip("/"))
        doing = "writing"
        system.pipe_file(probe, data)
        seconds = time.perf_counter() - began
        doing = "reading back"
        if system.cat_file(probe) != data:
            raise PlaceError(f"{url}: what is read there is not what was written", "do not use this storage")
        doing = "deleting"
        system.rm_file(probe)
    except PlaceError:
        raise
    except Exception as error:  # each file system raises its own
        raise _unusable(url, f"{doing} a file", error) from error
    finally:
        _clean(system, probe, before)
    return f"{url}: written at {_BYTES / 1e6 / seconds:,.0f} MB/s, read and deleted ({gib(_BYTES)})"


def _unusable(url: str, doing: str, error: Exception) -> PlaceError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    mend = "look at the address, and at the rights of the account whose credentials are used"
    return PlaceError(f"{url}: {doing} failed ({reason})", mend)


def _missing_directories(system: Any, inside: str) -> list[str]:
    """Of the directory and those above it the ones that are not there, innermost first."""
    missing = []
    while inside.strip("/") and not system.exists(inside):
        missing.append(inside)
        inside = posixpath.dirname(inside)
    return missing


def _clean(system: Any, probe: str, directories: list[str]) -> None:
    """Removes what may be left: the file, and the directories that were made for it."""
    with contextlib.suppress(Exception):  # each file system raises its own
        if system.exists(probe):
            system.rm_file(probe)
    for directory in directories:
        with contextlib.suppress(Exception):
            if system.exists(directory):
                system.rmdir(directory)
