"""Reading documents out of text files, for `prepare`: piece by piece, so that no file need fit in memory."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mesh_transformer.config.errors import ConfigError, DataError
from mesh_transformer.data.archives import SUPPORTED, CountedFile, Kind, kind_of, members, reading, unpacked

_PIECE_BYTES = 1 << 18
_PARQUET_ROWS = 1024
POLICIES = ("refuse", "replace", "skip")

# A part of a document's text, and whether the document ends with it.
Piece = tuple[str, bool]


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file that `prepare` reads: a local path or a URL, what its name says, and its size in bytes (0: unknown)."""

    path: str
    kind: Kind
    size: int


# ----------------------------------------------------------------------------------------------------- finding files


def find_text_files(inputs: Sequence[str | os.PathLike[str]]) -> tuple[list[TextFile], list[str]]:
    """The text files among `inputs`; a directory stands for those directly inside it, by name. Any may be a URL.

    Returns:
        (files, skipped): `skipped` are the other files of the directories.

    Raises:
        DataError: an input is missing or of another type, or a directory has no text file.
    """
    files: list[TextFile] = []
    skipped: list[str] = []
    for given in [os.fspath(each) for each in inputs]:
        with reading(given):
            inside = _list_url(given) if "://" in given else _list_local(given)
        if inside is None:
            raise DataError(f"{given} does not exist; expected a file ending in {SUPPORTED}, or a directory")
        if isinstance(inside, int):
            kind = kind_of(given)
            if kind is None:
                raise DataError(f"{given}: not a supported kind of text; expected a file ending in {SUPPORTED}")
            files.append(TextFile(given, kind, inside))
            continue
        known = [(path, kind_of(path), size) for path, size in inside]
        found = [TextFile(path, kind, size) for path, kind, size in known if kind is not None]
        if not found:
            raise DataError(f"{given}: no text in this directory; expected files ending in {SUPPORTED}")
        files += found
        skipped += [path for path, kind, _ in known if kind is None]
    if not files:
        raise DataError(f"no input given; expected files ending in {SUPPORTED}, or directories of them")
    return files, skipped


def _list_local(given: str) -> list[tuple[str, int]] | int | None:
    """A directory's (path, size) by name, a file's size, or None where there is neither."""
    path = Path(given).expanduser()
    if path.is_dir():
        inside = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
        return [(str(entry), entry.stat().st_size) for entry in inside]
    return path.stat().st_size if path.exists() else None


def _list_url(given: str) -> list[tuple[str, int]] | int | None:
    """`_list_local` for an fsspec URL."""
    filesystem, path = _filesystem(given)
    if not filesystem.exists(path):
        return None
    if not filesystem.isdir(path):
        return int(filesystem.info(path).get("size") or 0)
    entries = sorted(filesystem.ls(path, detail=True), key=lambda entry: entry["name"])
    return [
        (filesystem.unstrip_protocol(entry["name"]), int(entry.get("size") or 0))
        for entry in entries
        if entry["type"] == "file" and not os.path.basename(entry["name"]).startswith(".")
    ]


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        scheme = urllib.parse.urlsplit(url).scheme
        raise DataError(f"{url}: fsspec cannot open {scheme}:// ({error}); install what it names") from error


def open_file(file: TextFile, report: Callable[[int], None]) -> IO[bytes]:
    """The raw bytes of a local file or URL; `report` is called with the number read so far. Raises DataError."""
    with reading(file.path):
        if "://" in file.path:
            filesystem, path = _filesystem(file.path)
            raw = filesystem.open(path, "rb")
        else:
            raw = open(Path(file.path).expanduser(), "rb", buffering=0)  # noqa: SIM115 -- closed with CountedFile
    return CountedFile(raw, report)  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------------------- bytes to text


class Utf8:
    """Decodes UTF-8 and does with other bytes what `policy` says: refuse, replace (by U+FFFD) or skip.

    `invalid_bytes` counts those that were replaced or skipped.

    Raises:
        ConfigError: no such policy.
    """

    def __init__(self, policy: str = "refuse") -> None:
        if policy not in POLICIES:
            raise ConfigError(f"--invalid-utf8 {policy} is unknown; expected {', '.join(POLICIES)}")
        self._errors = {"replace": "replace", "skip": "ignore"}.get(policy)
        self.invalid_bytes = 0

    def decode(self, data: bytes, where: str, offset: int) -> str:
        """The text of `data`, which begins at byte `offset` of `where`. Raises DataError as the policy says."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            if self._errors is None:
                raise DataError(
                    f"{where}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the file "
                    "first, for example with iconv, or pass --invalid-utf8 replace or skip"
                ) from error
        self.invalid_bytes += len(data) - len(data.decode("utf-8", "ignore").encode())
        return data.decode("utf-8", self._errors)


def _text_pieces(file: IO[bytes], where: str, utf8: Utf8, *, translate: bool) -> Iterator[Piece]:
    """One document: all of a file, in pieces; `translate`: every kind of line end becomes a newline."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True) if translate else None
    rest, offset = b"", 0
    while True:
        with reading(where):
            chunk = file.read(_PIECE_BYTES)
        data = rest + chunk
        whole = _whole_characters(data) if chunk else len(data)
        text = utf8.decode(data[:whole], where, offset)
        rest, offset = data[whole:], offset + whole
        yield (newlines.decode(text, final=not chunk) if newlines else text), not chunk
        if not chunk:
            return


def _whole_characters(data: bytes) -> int:
    """How many bytes to take so that no character is cut at the end."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # a first byte: of how many?
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back else len(data)
        if byte < 0x80:
            break
    return len(data)


# ------------------------------------------------------------------------------------------------------- documents


def read_documents(
    file: TextFile, utf8: Utf8 | None = None, report: Callable[[int], None] = lambda n: None
) -> Iterator[Piece]:
    """The documents of one file in pieces: (text, whether the document ends here).

    .txt is one document, with line ends as newlines. .jsonl has one a line: an object with `text`, or a string; `text`
    may be a list of strings, which two newlines join. A tar archive has one a file. .parquet has one a row, in the
    column `text`.

    Args:
        utf8: how to decode; default: what is not UTF-8 is refused.
        report: called with the bytes read so far.

    Raises:
        DataError: not UTF-8 (names file and byte), malformed JSON or no text (names file and line), damaged
            compression, or not what the name says.
    """
    utf8 = utf8 or Utf8()
    with open_file(file, report) as raw:
        if file.kind.content == ".parquet":
            yield from _parquet(raw, file.path)
            return
        with reading(file.path):
            stream = unpacked(raw, file.kind, file.path)
        if file.kind.content == ".txt":
            yield from _text_pieces(stream, file.path, utf8, translate=True)
        elif file.kind.content == ".tar":
            for where, member in members(stream, file.path):
                yield from _text_pieces(member, where, utf8, translate=False)
        else:
            for where, content in _json_lines(stream, file.path, utf8):
                yield _json_document(where, content), True


def read_objects(
    file: TextFile, utf8: Utf8 | None = None, report: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[str, Any]]:
    """The JSON value of every line of a .jsonl file, with the words that name its place.

    Raises:
        DataError: not a .jsonl file, or as `read_documents`.
    """
    if file.kind.content != ".jsonl":
        raise DataError(f"{file.path}: --template reads lines of JSON; expected a .jsonl file")
    with open_file(file, report) as raw:
        with reading(file.path):
            stream = unpacked(raw, file.kind, file.path)
        yield from _json_lines(stream, file.path, utf8 or Utf8())


def _json_lines(stream: IO[bytes], path: str, utf8: Utf8) -> Iterator[tuple[str, Any]]:
    offset, number = 0, 0
    while True:
        with reading(path):
            line = stream.readline()
        if not line:
            return
        number += 1
        if line.strip():
            text = utf8.decode(line, path, offset)
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(text.removeprefix("\ufeff") if number == 1 else text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: not JSON ({error}); expected one JSON object a line, with the field 'text'"
                ) from error
        offset += len(line)


def _json_document(where: str, content: Any) -> str:
    text = content.get("text") if isinstance(content, dict) else content
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = "\n\n".join(text)
    if not isinstance(text, str):
        supervised = isinstance(content, dict) and ("messages" in content or "completion" in content)
        more = "; for prompts with completions or messages pass --template" if supervised else ""
        raise DataError(
            f"{where}: no text; expected an object with the field 'text' (a string or list of strings){more}"
        )
    check_surrogates(where, text)
    return text


def check_surrogates(where: str, text: str) -> None:
    """Raises DataError where `text` holds half of a surrogate pair, which JSON can write but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the text holds half of a surrogate pair, {text[error.start]!r}; remove it"
        ) from error


def _parquet(raw: IO[bytes], path: str) -> Iterator[Piece]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: .parquet needs pyarrow; pip install 'mesh-transformer[parquet]'") from error
    try:
        table = parquet.ParquetFile(raw)
        names = table.schema_arrow.names
        if "text" not in names:
            raise DataError(f"{path}: no column 'text'; its columns are {', '.join(names) or 'none'}")
        kind = table.schema_arrow.field("text").type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path}: its column 'text' holds {kind}; expected strings")
        batches = table.iter_batches(batch_size=_PARQUET_ROWS, columns=["text"])
        for batch in batches:
            for text in batch.column(0).to_pylist():
                yield text or "", True
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); damaged, or not what its name says") from error
