"""Opening text that may be compressed: one stream of bytes, or the members of a tar archive, never unpacked to disk."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from mesh_transformer.config.errors import DataError

# What a file begins with -> what it is, for saying so when its name says something else.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"%PDF-": "PDF",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_COMPRESSION = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
_CONTENT = (".txt", ".jsonl", ".tar", ".parquet")
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_ZSTD_BYTES = 1 << 14  # fed at a time: a little input may become much output
_DRAINED = 1 << 20
_LONGEST_MAGIC = max(map(len, _MAGIC))

SUPPORTED = (
    ".txt or .jsonl (also with .gz, .xz or .zst after it), .tar, .tar.gz, .tar.xz or .tar.zst, .parquet, "
    "or .xz for a tar archive"
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a name says: `content` .txt, .jsonl, .tar or .parquet; `compression` gzip, xz, zstd or None."""

    content: str
    compression: str | None = None


def kind_of(name: str) -> Kind | None:
    """The kind that a file's name says, or None where it is none of SUPPORTED."""
    name = name.lower()
    if name.endswith(".tgz"):
        return Kind(".tar", "gzip")
    ending = next((ending for ending in _COMPRESSION if name.endswith(ending)), "")
    compression = _COMPRESSION.get(ending)
    stem = name.removesuffix(ending)
    content = next((content for content in _CONTENT if stem.endswith(content)), None)
    if content is None:
        return Kind(".tar", "xz") if ending == ".xz" else None
    if content == ".parquet" and compression:
        return None
    return Kind(content, compression)


class CountedFile(io.RawIOBase):
    """A binary file that tells how far it has been read.

    Args:
        file: to read from; closed with this one.
        report: called with the bytes read so far.
    """

    def __init__(self, file: IO[bytes], report: Callable[[int], None]) -> None:
        self._file = file
        self._report = report
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._count += len(data)
        self._report(self._count)
        return len(data)

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


class _ZstdFile(io.RawIOBase):
    """All frames of a zstd file; unlike the library's own reader it notices that the last one is cut short."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        # The largest window: files made with --long are read too.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._decompressor.decompressobj()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._ready:
            chunk = (self._frame.unused_data if self._frame.eof else b"") or self._file.read(_ZSTD_BYTES)
            if not chunk:
                if self._begun and not self._frame.eof:
                    raise EOFError("the last frame is cut short")
                return 0
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._begun = True
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns what reading and decompressing raise into a DataError that names `where`."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(
            f"{where}: cannot be unpacked ({error}); it is damaged, cut short or not what its name says, "
            "copy it again or rename it"
        ) from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error})") from error


def unpacked(file: IO[bytes], kind: Kind, where: str) -> io.BufferedReader:
    """The bytes of a file whose name says `kind`, decompressed as they are read.

    Raises:
        DataError: the first bytes are not of that compression, or are not text though they should be.
    """
    source: io.BufferedReader = io.BufferedReader(file, 1 << 18)  # type: ignore[arg-type]
    head = source.peek(_LONGEST_MAGIC)
    found = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if kind.compression is None:
        if kind.content in (".txt", ".jsonl") and found is not None:
            mend = "convert it, for example with iconv -f UTF-16" if "UTF-16" in found else "rename or unpack it"
            raise DataError(f"{where}: its name says plain text, but it holds {found}; {mend}")
        return source
    if not head:
        raise DataError(f"{where}: the file is empty; expected {kind.compression} data")
    if found != kind.compression:
        holds = f"holds {found}" if found else "is not"
        raise DataError(f"{where}: its name says {kind.compression}, but it {holds}; rename it or compress it anew")
    if kind.compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=source, mode="rb"), 1 << 18)
    if kind.compression == "xz":
        return io.BufferedReader(lzma.LZMAFile(source), 1 << 18)
    return io.BufferedReader(_ZstdFile(source), 1 << 18)


def members(stream: io.BufferedReader, where: str) -> Iterator[tuple[str, IO[bytes]]]:
    """The regular files of a tar archive in its order, each to be read before the next is asked for.

    An archive inside it whose name ends in .xz or says tar gives its own files (as OpenWebText is packed).

    Yields:
        (archive and name, file).

    Raises:
        DataError: not a tar archive, or damaged.
    """
    with reading(where):
        head = stream.peek(512)
    if not head:
        raise DataError(f"{where}: the archive is empty")
    if len(head) >= 512 and _TAR_MAGIC not in head[_TAR_MAGIC_AT:512] and any(head[:512]):
        raise DataError(
            f"{where}: not a tar archive inside; text under .xz needs a name that ends in .txt.xz or .jsonl.xz"
        )
    with reading(where), tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            inner = f"{where}: {member.name}"
            kind = kind_of(member.name)
            if kind is not None and kind.content == ".tar":
                yield from members(unpacked(file, kind, inner), inner)
            else:
                yield inner, file
    with reading(where):
        while stream.read(_DRAINED):  # to the end, where the checksum stands
            pass
