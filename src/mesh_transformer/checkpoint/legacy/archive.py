"""v1 shards inside a .tar, .tar.gz or .tar.zst, read without unpacking them to the disk.

An archive can only be read from its beginning, and a parameter needs the same file of every shard. Files are therefore
kept in memory for as many of the sixteen as fit; when one is wanted that has gone by, the archive is read from its
start again. One pass is enough where each file's shards lie together; where each shard's files do, one a window.
"""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from mesh_transformer.checkpoint.legacy.files import ShardFiles, check_shards
from mesh_transformer.checkpoint.legacy.layout import N_FILES
from mesh_transformer.checkpoint.legacy.npz import NpzFile
from mesh_transformer.config.errors import CheckpointError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.zstd")
_MEMBER = re.compile(r"(?:.*/)?shard_(0|[1-9][0-9]*)/(0|[1-9][0-9]*)\.npz")
_KEPT = 1_500_000_000  # bytes of files that are held at a time; the shards of one file always are
_WRAPPED = 8 * 2**20  # bytes read at a time
# ((shard, file), name, contents)
_Stream = Generator[tuple[tuple[int, int], str, bytes | None], None, None]


class ArchiveFiles(ShardFiles):
    """The files of the one step that an archive holds; opening it reads all of it once.

    Raises:
        CheckpointError: it is damaged or cut short, or files are missing.
    """

    readers = 1  # one that ran ahead would drop what another still needs

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[tuple[int, int], str] = {}
        self._sizes: dict[int, int] = {}
        self._kept: dict[tuple[int, int], NpzFile] = {}
        self._counters: dict[tuple[int, int, int], int] = {}  # so that these need no pass of their own
        self._lock = threading.Lock()
        described: dict[tuple[int, int], list[Any]] = {}
        for key, name, data in self._stream(lambda key: True):
            assert data is not None
            if key in self._names:
                raise CheckpointError(f"{path}: holds {self._names[key]} and {name}; expected one step's shards")
            self._names[key] = name
            self._sizes[key[1]] = self._sizes.get(key[1], 0) + len(data)
            opened = NpzFile(io.BytesIO(data), f"{path}: {name}")
            described[key] = opened.members
            for i, member in enumerate(opened.members):
                if member.shape == () and member.dtype == np.int32:
                    self._counters[*key, i] = int(opened.read(i))
        self.n_shards = check_shards(str(path), sorted({f"shard_{shard}" for shard, _ in self._names}))
        for shard in range(self.n_shards):
            for file in range(N_FILES):
                if (shard, file) not in self._names:
                    raise CheckpointError(f"{path}: lacks shard_{shard}/{file}.npz; download it again")
        self.members = [[described[shard, file] for file in range(N_FILES)] for shard in range(self.n_shards)]
        self._passing: _Stream | None = None
        self._passed: set[tuple[int, int]] = set()  # since `_passing` began
        self._missing: set[tuple[int, int]] = set()  # what `_passing` is to bring
        self._window: set[int] = set()

    def open(self, shard: int, file: int) -> NpzFile:
        with self._lock:
            if file not in self._window:
                self._load(file)
            return self._kept[shard, file]

    def counter(self, shard: int, file: int, member: int) -> int:
        return self._counters[shard, file, member]

    def name(self, shard: int, file: int) -> str:
        return f"{self.path}: {self._names[shard, file]}"

    def _load(self, first: int) -> None:
        """Reads on until all shards of file number `first`, and those after it that fit, are in memory."""
        total = 0
        window: set[int] = set()
        for file in [*range(first, N_FILES), *range(first)]:
            total += self._sizes[file]
            if window and total > _KEPT:
                break
            window.add(file)
        self._window = set()  # none, until all of it is there
        self._kept = {key: kept for key, kept in self._kept.items() if key[1] in window}
        missing = {(shard, file) for file in window for shard in range(self.n_shards)} - self._kept.keys()
        self._missing = missing
        if self._passing is None or missing & self._passed:
            self._passing, self._passed = self._stream(lambda key: key in self._missing), set()
        for key, name, data in self._passing:
            self._passed.add(key)
            if data is not None:
                self._kept[key] = NpzFile(io.BytesIO(data), f"{self.path}: {name}")
                missing.discard(key)
                if not missing:
                    self._window = window
                    return
        raise CheckpointError(f"{self.path}: has changed while it was read")

    def _stream(self, is_wanted: Callable[[tuple[int, int]], bool]) -> _Stream:
        """((shard, file), name, contents) of every .npz, in the order of the archive; None for what is not wanted."""
        with (
            _reading(self.path),
            _opened(self.path) as raw,
            tarfile.open(fileobj=raw, mode="r|", bufsize=_WRAPPED) as archive,
        ):
            for member in archive:
                match = _MEMBER.fullmatch(member.name)
                if match is None or not member.isreg():
                    continue
                key = int(match[1]), int(match[2])
                if not is_wanted(key):
                    yield key, member.name, None
                    continue
                content = archive.extractfile(member)
                assert content is not None
                data = content.read()
                if len(data) != member.size:
                    raise EOFError(f"{member.name} is cut short")
                yield key, member.name, data


def looks_archive(path: Path) -> bool:
    """Whether the name is that of an archive that `ArchiveFiles` reads."""
    return path.name.endswith(SUFFIXES) and path.is_file()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        if path.name.endswith((".zst", ".zstd")):
            import zstandard

            with zstandard.ZstdDecompressor().stream_reader(
                file, read_size=_WRAPPED, read_across_frames=True
            ) as stream:
                yield stream
        elif path.name.endswith("gz"):
            import gzip

            with gzip.open(file) as stream:
                yield stream  # type: ignore[misc]
        else:
            yield file


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    import zstandard

    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, zstandard.ZstdError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
