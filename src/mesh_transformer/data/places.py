"""Files of data wherever they lie: on a local or mounted disk, or behind an fsspec URL (gs://, s3://, https://, ...).

What is read over a network is read again a few times before it is given up. Messages name the URL and the reason.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import posixpath
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from mesh_transformer.config.errors import DataError

_T = TypeVar("_T")
_BLOCK_BYTES = 8 << 20
# Seconds before the second, the third and the last attempt.
_PAUSES = (0.5, 2.0, 8.0)
# What file systems call the facts that change with a file's content.
_VERSION_KEYS = ("etag", "ETag", "generation", "md5Hash", "crc32c", "content-md5", "versionId") + (
    "mtime",
    "updated",
    "LastModified",
    "last_modified",
    "modified",
    "created",
)


@dataclasses.dataclass(frozen=True)
class Facts:
    """size: bytes. version: 64 bits that change with the content, as far as the file system tells; of a local file its
    time of change in nanoseconds, elsewhere a hash of its ETag, time of change or the like."""

    size: int
    version: int


def normal(path: str) -> str:
    """`path` with `~` expanded, and a file:// URL as the path that it means; other URLs as they are."""
    if path.startswith(("file://", "local://")):
        return path.partition("://")[2]
    return path if is_url(path) else os.path.expanduser(path)


def is_url(path: str) -> bool:
    """Whether a `normal` path is read through fsspec."""
    return "://" in path


def join(directory: str, name: str) -> str:
    """`name` in `directory`, a path or a URL; an absolute `name` stands for itself."""
    if not is_url(directory):
        return os.path.join(directory, name)
    return name if name.startswith("/") else posixpath.join(directory, name)


def parent(path: str) -> str:
    """The directory of a path or URL."""
    return path.rpartition("/")[0] if is_url(path) else os.path.dirname(path)


# ------------------------------------------------------------------------------------------------------------ reading


def facts(path: str) -> Facts:
    """Size and version of a file. Raises DataError if it is missing or cannot be asked."""
    if not is_url(path):
        try:
            status = os.stat(path)
        except OSError as error:
            raise unreadable(path, error) from error
        return Facts(status.st_size, status.st_mtime_ns)
    info = _attempt(path, lambda system, inside: system.info(inside))
    size = info.get("size")
    if not isinstance(size, int):
        raise DataError(f"{path}: its size is not known ({info.get('type', 'no file')}); expected a file")
    version = "\0".join(f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key) is not None)
    return Facts(size, int.from_bytes(hashlib.sha256(version.encode()).digest()[:8], "little"))


def read_range(url: str, start: int, length: int) -> bytes:
    """Exactly `length` bytes of a remote file from byte `start`. Raises DataError if they cannot be had."""

    def read(system: Any, inside: str) -> bytes:
        return _exactly(system.cat_file(inside, start=start, end=start + length), length)

    return _attempt(url, read) if length else b""


def read_ranges(url: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """`read_range` of each, all at a time where the file system can. Raises DataError likewise."""
    system, inside = _file_system(url)
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    try:
        # One that fails is given in place of its bytes; it is read again below, alone.
        found = system.cat_ranges([inside] * len(ends), list(starts), ends, on_error="return")
    except Exception:  # each file system raises its own
        found = [None] * len(ends)
    whole = [isinstance(each, bytes) and len(each) == length for each, length in zip(found, lengths, strict=True)]
    return [
        each if is_whole else read_range(url, start, length)
        for each, is_whole, start, length in zip(found, whole, starts, lengths, strict=True)
    ]


def read_blocks(path: str, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, in order, in blocks. Raises DataError if they cannot be read."""
    if is_url(path):
        for start in range(0, size, _BLOCK_BYTES):
            yield read_range(path, start, min(_BLOCK_BYTES, size - start))
        return
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise unreadable(path, error) from error


def reader(path: str, size: int) -> Callable[[int, int], bytes]:
    """A function of (start, length) that reads a remote file in big blocks, for a scan that goes forward in it."""
    block, first = b"", 0

    def read(start: int, length: int) -> bytes:
        nonlocal block, first
        if not first <= start <= start + length <= first + len(block):
            block, first = read_range(path, start, min(max(length, _BLOCK_BYTES), size - start)), start
        return block[start - first : start - first + length]

    return read


def read_file(path: str) -> bytes | None:
    """A small file as a whole; None where there is none. Raises DataError if it cannot be read."""
    try:
        if is_url(path):
            return _attempt(path, lambda system, inside: system.cat_file(inside), missing=FileNotFoundError)
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from error


# ------------------------------------------------------------------------------------------------------------ listing


def is_directory(path: str) -> bool:
    """Whether files lie below `path`. Raises DataError if nothing is there, of a URL."""
    if not is_url(path):
        return os.path.isdir(path)
    # Not isdir: over HTTP it takes every page with links for a directory, and so an index of URLs.
    return path.endswith("/") or _attempt(path, lambda system, inside: system.info(inside)).get("type") == "directory"


def list_names(directory: str) -> list[str]:
    """The names of what lies directly in a directory, sorted."""
    if not is_url(directory):
        try:
            return sorted(os.listdir(directory))
        except OSError as error:
            raise unreadable(directory, error) from error
    paths = _attempt(directory, lambda system, inside: system.ls(inside, detail=False))
    return sorted(posixpath.basename(path.rstrip("/")) for path in paths)


def has_magic(path: str) -> bool:
    """Whether a path is a pattern. In a URL `?` is none: there it begins a query."""
    return glob.has_magic(path.replace("?", "") if is_url(path) else path)


def find(pattern: str) -> list[str]:
    """The files that match a pattern, sorted."""
    if not is_url(pattern):
        return sorted(name for name in glob.glob(pattern) if os.path.isfile(name))

    def search(system: Any, inside: str) -> list[str]:
        found = system.glob(inside, detail=True)
        return sorted(system.unstrip_protocol(path) for path, info in found.items() if info.get("type") == "file")

    return _attempt(pattern, search)


# ----------------------------------------------------------------------------------------------------------- attempts


def unreadable(path: str, error: Exception) -> DataError:
    """What to raise where the system refuses to read `path`."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path}: cannot be read ({reason})")


def _attempt(url: str, act: Callable[[Any, str], _T], missing: type[Exception] | None = None) -> _T:
    """`act` on the URL's file system and the path in it, again after some time if it fails.

    Raises:
        DataError: all attempts failed, or another would fail likewise; but `missing`, where nothing is there.
    """
    system, inside = _file_system(url)
    for pause in (*_PAUSES, None):
        try:
            return act(system, inside)
        except FileNotFoundError as error:
            if missing is not None:
                raise missing(url) from error
            raise DataError(f"{url} does not exist; check the URL") from error
        except (PermissionError, IsADirectoryError, NotImplementedError) as error:
            raise unreadable(url, error) from error
        except Exception as error:  # each file system raises its own
            if pause is None:
                raise DataError(f"{unreadable(url, error)}; {len(_PAUSES) + 1} attempts failed") from error
            time.sleep(pause)
    raise AssertionError  # the last attempt returned or raised


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec  # only where needed: it is slow to import

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DataError(f"{url}: {error}; pip install the package that is named, or copy the data to a disk") from error
    except Exception as error:  # each file system raises its own
        raise unreadable(url, error) from error


def _exactly(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise OSError(
            f"{len(data)} bytes came where {length} were asked for; the file has changed, or the server cannot read "
            "parts of a file"
        )
    return data
