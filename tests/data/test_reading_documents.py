"""Reading text of every kind, whole and in pieces, and what is not what it seems."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

import fsspec
import pytest
import zstandard

from mesh_transformer.config.errors import ConfigError, DataError
from mesh_transformer.data import documents
from mesh_transformer.data.archives import kind_of
from mesh_transformer.data.documents import Utf8, find_text_files, read_documents, read_objects
from mesh_transformer.data.encoding import Divider, cut_pieces, may_cut
from mesh_transformer.data.tokenizer import from_bytes, load_tokenizer, train_bpe

TEXT = "one\r\ntwo\rthree — vier\n\nfünf 🙂"
LINES = '{"text": "first", "meta": 1}\n\n"second — zweite"\r\n{"text": ["x", "y"]}'
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def texts(path: Path | str, utf8: Utf8 | None = None) -> list[str]:
    (file,), _ = find_text_files([path])
    return joined(read_documents(file, utf8))


def joined(pieces: Iterable[tuple[str, bool]]) -> list[str]:
    found, held = [], ""
    for text, ends in pieces:
        held += text
        if ends:
            found.append(held)
            held = ""
    assert held == ""
    return found


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(params=[1, 3, 1 << 18])
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PIECE_BYTES", request.param)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.usefixtures("piece_bytes")
def test_text_and_lines(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.txt{ending}").write_bytes(COMPRESS[ending](TEXT.encode()))
    assert texts(tmp_path / f"a.txt{ending}") == ["one\ntwo\nthree — vier\n\nfünf 🙂"]
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](LINES.encode()))
    assert texts(tmp_path / f"a.jsonl{ending}") == ["first", "second — zweite", "x\n\ny"]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.xz", "a.tar.zst", "urlsf_subset00-1_data.xz"])
@pytest.mark.usefixtures("piece_bytes")
def test_archives(tmp_path: Path, name: str) -> None:
    inner = lzma.compress(tar({"deep.txt": b"deep"}))
    data = tar({"b/x": TEXT.encode(), "a": b"", "b/urlsf_subset1_data.xz": inner, "notes.md": b"last"})
    ending = {".gz": ".gz", "tgz": ".gz", ".xz": ".xz", "zst": ".zst"}.get(name[-3:], "")
    (tmp_path / name).write_bytes(COMPRESS[ending](data))
    assert texts(tmp_path / name) == [TEXT, "", "deep", "last"]  # line ends as they are


def test_several_streams_in_one_file(tmp_path: Path) -> None:
    for ending in (".gz", ".xz", ".zst"):
        data = COMPRESS[ending](b'"one"\n"t') + COMPRESS[ending](b'wo"\n')
        (tmp_path / f"a.jsonl{ending}").write_bytes(data)
        assert texts(tmp_path / f"a.jsonl{ending}") == ["one", "two"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": ["eins", None, "drei"]}), path)
    assert texts(path) == ["eins", "", "drei"]
    for table, says in (({"body": ["x"]}, "no column 'text'; its columns are body"), ({"text": [1]}, "holds int64")):
        parquet.write_table(pyarrow.table(table), path)
        with pytest.raises(DataError, match=says):
            texts(path)
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        texts(path)


def test_urls(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/texts/b.txt", TEXT.encode())
    system.pipe("/texts/a.jsonl.gz", gzip.compress(b'"packed"'))
    system.pipe("/texts/picture.png", b"")
    try:
        assert texts("memory://texts/b.txt") == ["one\ntwo\nthree — vier\n\nfünf 🙂"]
        files, skipped = find_text_files(["memory://texts"])
        assert [(file.path, file.size) for file in files] == [
            ("memory:///texts/a.jsonl.gz", system.size("/texts/a.jsonl.gz")),
            ("memory:///texts/b.txt", len(TEXT.encode())),
        ]
        assert skipped == ["memory:///texts/picture.png"]
        assert joined(read_documents(files[0])) == ["packed"]
        with pytest.raises(DataError, match=r"memory://texts/c\.txt does not exist"):
            find_text_files(["memory://texts/c.txt"])
    finally:
        system.rm("/texts", recursive=True)
    with pytest.raises(DataError, match=r"nosuch://x/a\.txt: fsspec cannot open nosuch://"):
        find_text_files(["nosuch://x/a.txt"])


def test_how_far_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"x" * 3_000_000))
    (file,), _ = find_text_files([path])
    seen: list[int] = []
    joined(read_documents(file, None, seen.append))
    assert seen == sorted(seen) and seen[-1] == file.size == path.stat().st_size


# -------------------------------------------------------------------------------------------------------------- UTF-8

BAD = b"ok \xff\xc3( caf\xc3\xa9 \xe2\x82 end \xf0\x9f\x99"


@pytest.mark.usefixtures("piece_bytes")
def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(BAD)
    with pytest.raises(DataError, match=r"a\.txt: byte 3 \(0xff\) is not UTF-8.*--invalid-utf8"):
        texts(tmp_path / "a.txt")
    for policy, errors in (("replace", "replace"), ("skip", "ignore")):
        utf8 = Utf8(policy)
        assert texts(tmp_path / "a.txt", utf8) == [BAD.decode("utf-8", errors)]
        assert utf8.invalid_bytes == 1 + 1 + 2 + 3
    (tmp_path / "a.jsonl").write_bytes(b'"fine"\n"b\xffad"\n')
    with pytest.raises(DataError, match=r"a\.jsonl: byte 9 \(0xff\)"):
        texts(tmp_path / "a.jsonl")
    assert texts(tmp_path / "a.jsonl", Utf8("skip")) == ["fine", "bad"]
    with pytest.raises(ConfigError, match="--invalid-utf8 drop"):
        Utf8("drop")


# ------------------------------------------------------------------------------------------------- not what they seem


def gzipped(content: bytes) -> bytes:
    """Packed without the time, which would stand in the name of a test."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", gzipped(b"x"), r"a\.txt: its name says plain text, but it holds gzip"),
        ("a.jsonl", COMPRESS[".zst"](b"x"), r"a\.jsonl: its name says plain text, but it holds zstd"),
        ("a.txt", "text".encode("utf-16"), "holds UTF-16 text; convert it"),
        ("a.txt", b"%PDF-1.7", "holds PDF"),
        ("a.txt.gz", b"text", "its name says gzip, but it is not"),
        ("a.txt.gz", lzma.compress(b"text"), "its name says gzip, but it holds xz"),
        ("a.txt.gz", b"", "the file is empty; expected gzip"),
        ("a.txt.gz", gzipped(b"text" * 99)[:-9], "cannot be unpacked"),
        ("a.txt.gz", gzipped(b"text")[:-6] + b"damage", "cannot be unpacked"),
        ("a.jsonl.xz", lzma.compress(b'"text"' * 99)[:-9], "cannot be unpacked"),
        ("a.jsonl.zst", COMPRESS[".zst"](bytes(range(256)) * 9)[:-9], r"a\.jsonl\.zst: cannot be unpacked"),
        ("a.tar.gz", gzipped(b"text" * 999), "not a tar archive inside"),
        ("a.tar.gz", gzipped(b""), "the archive is empty"),
        ("a.tar", tar({"x": b"text" * 999})[:2000], r"a\.tar"),
        ("a.tar.gz", gzipped(tar({"x": b"text" * 999}))[:-9], r"a\.tar\.gz: cannot be unpacked"),
        # The checksum stands behind what the archive needs.
        ("a.tar.gz", gzipped(tar({"x": b"text"}) + bytes(1 << 20))[:-8] + b"checksum", "cannot be unpacked"),
        ("a.tar", tar({"x": b"te\xffxt"}), r"a\.tar: x: byte 2 \(0xff\)"),
        ("a.xz", lzma.compress(b"text" * 999), r"a name that ends in \.txt\.xz"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}', "line 1: no text.*--template"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says) as caught:
        texts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_kinds_by_name() -> None:
    assert kind_of("a.TXT") == kind_of("b.txt")
    assert kind_of("a.bz2") is None and kind_of("a.parquet.gz") is None and kind_of("txt") is None


def test_objects_only_from_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"a": 1}\n\n[2]\n', encoding="utf-8")
    (file,), _ = find_text_files([tmp_path / "a.jsonl"])
    found = [(where.removeprefix(str(tmp_path)), content) for where, content in read_objects(file)]
    assert found == [("/a.jsonl, line 1", {"a": 1}), ("/a.jsonl, line 3", [2])]
    (tmp_path / "a.txt").write_text("x")
    (file,), _ = find_text_files([tmp_path / "a.txt"])
    with pytest.raises(DataError, match="--template reads lines of JSON"):
        list(read_objects(file))


# ------------------------------------------------------------------------------------------------- pieces of documents


@pytest.mark.parametrize("divide", [True, False])
def test_division_does_not_depend_on_the_pieces(divide: bool) -> None:
    end = "<|endoftext|>"
    made = [f"a{end}b<|endof{end}{end}", "", end, f"{end}<|endoftext|", "plain", f"x{end}"]
    expected = [part for text in made for part in (text.split(end) if divide else [text])]
    for size in (1, 2, 5, 13, 100):
        pieces = [
            (text[i : i + size], i + size >= len(text)) for text in made for i in range(0, max(1, len(text)), size)
        ]
        divider = Divider(divide)
        assert joined(divider(pieces)) == [part for part in expected if part]
        assert divider.empty == expected.count("")


def test_long_text_is_cut_where_no_token_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_transformer.data.encoding._PIECE", 50)
    generator = random.Random(0)
    words = ["it's", "12", "o'clock,", "\t", "\n\n", "they're", "a", "—", "🙂", "end.", "1 000", "\u00a0", "\u3000", ""]
    text = "".join(generator.choice(words) + " " * generator.choice([0, 1, 1, 2, 5]) for _ in range(4000))
    pieces = list(cut_pieces([(text[i : i + 33], i + 33 >= len(text)) for i in range(0, len(text), 33)], cut=True))
    assert len(pieces) > 20
    assert "".join(piece for piece, _ in pieces) == text
    for tokenizer in (load_tokenizer("gpt2"), train_bpe([text], 400)):  # the second has tokens of several spaces
        assert [i for piece, _ in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)
    assert len(list(cut_pieces([("x" * 1000, True)], cut=True))) == 1


def test_only_tokenizers_that_allow_it_are_given_pieces() -> None:
    trained = train_bpe(["some words to learn"], 270)
    assert may_cut(load_tokenizer("gpt2")) and may_cut(load_tokenizer("bytes")) and may_cut(trained)
    description = json.loads(trained.to_bytes())
    own = {"id": 0, "special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for key, value in (
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer", description["pre_tokenizer"] | {"add_prefix_space": True}),
        ("added_tokens", [own | {"content": "<|endoftext|>"}]),
    ):
        assert not may_cut(from_bytes(json.dumps(description | {key: value}).encode())), key
