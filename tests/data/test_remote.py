"""Data at URLs: fsspec's file system in memory stands for a bucket."""

from __future__ import annotations

import itertools
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mesh_transformer.config.errors import DataError
from mesh_transformer.data import offsets, places
from mesh_transformer.data.choice import tokenizer_for_data
from mesh_transformer.data.loader import TrainLoader
from mesh_transformer.data.record import DataRecord, write_data_record
from mesh_transformer.data.source import RecordSource, open_source, resolve_data
from mesh_transformer.data.tfrecord import write_records
from mesh_transformer.data.tokenizer import train_bpe

T = 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_TRANSFORMER_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.setattr(places, "_PAUSES", (0, 0, 0))
    return tmp_path / "user-cache"


@pytest.fixture
def bucket() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def rows(first: int, count: int) -> np.ndarray:
    return np.arange(first * (T + 1), (first + count) * (T + 1)).reshape(count, T + 1)


@pytest.fixture
def data(tmp_path: Path, bucket: MemoryFileSystem) -> Path:
    """The same two files and index on the disk and at memory://b/data."""
    directory = tmp_path / "data"
    directory.mkdir()
    write_records(directory / "a_4.tfrecords", rows(0, 4))
    write_records(directory / "c_3.tfrecords", rows(4, 3))
    (directory / "all.index").write_text("a_4.tfrecords\n\n  memory://b/data/c_3.tfrecords\n")
    for path in directory.iterdir():
        bucket.pipe(f"/b/data/{path.name}", path.read_bytes())
    return directory


def open_here(spec: str) -> RecordSource:
    return open_source(spec, sequence_length=T, n_vocab=100)


URLS = ["memory://b/data/a_4.tfrecords", "memory://b/data/c_3.tfrecords"]


def test_an_index_a_directory_a_pattern_and_a_file(data: Path) -> None:
    for spec in (
        "memory://b/data/all.index",
        "memory://b/data",
        "memory://b/data/",
        "memory://b/data/[ac]_*.tfrecords",
    ):
        assert [url.replace(":///", "://") for url in resolve_data(spec)] == URLS, spec
    assert resolve_data(URLS[1]) == [URLS[1]]
    # A local index may name URLs, a remote one local files by their absolute path, and file:// is local.
    local = str(data / "a_4.tfrecords")
    (data / "here.index").write_text(f"file://{local}\n{URLS[1]}\n")
    assert resolve_data(f"file://{data / 'here.index'}") == [local, URLS[1]]
    fsspec.filesystem("memory").pipe("/b/there.index", f"data/a_4.tfrecords\n{local}\n".encode())
    assert resolve_data("memory://b/there.index") == [URLS[0], local]


def test_rows_and_fingerprint_are_those_of_the_same_files_on_a_disk(data: Path) -> None:
    remote = open_here("memory://b/data/all.index")
    assert remote.remote
    (data / "local.index").write_text("a_4.tfrecords\nc_3.tfrecords\n")
    local = open_here(str(data / "local.index"))
    assert not local.remote
    assert remote.fingerprint == local.fingerprint
    np.testing.assert_array_equal(np.stack([remote[i] for i in range(7)]), rows(0, 7))
    (data / "both.index").write_text(f"{data / 'a_4.tfrecords'}\n{URLS[1]}\n")
    both = open_here(str(data / "both.index"))
    order = [5, 0, 6, 3, 5, 1]
    for source in (remote, local, both):
        np.testing.assert_array_equal(np.stack(source.read_many(order)), rows(0, 7)[order])
    streams = [TrainLoader(each, seed=1, batch_size=3, rows=(0, 2)).batches(2) for each in (remote, local)]
    for here, there in itertools.islice(zip(*streams, strict=True), 6):
        np.testing.assert_array_equal(here, there)
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("grain") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)  # what they read ahead ends before the bucket is emptied


def test_headers_are_scanned_once_in_blocks(
    data: Path, cache: Path, bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    cat = MemoryFileSystem.cat_file

    def cat_file(system: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        if path == "/b/scanned.tfrecords":  # threads of another test's loader may still be reading ahead
            reads.append(end - start)
        return cat(system, path, start, end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    for block, n_reads in ((1 << 20, 1), (100, 2), (13, 4)):  # all at once; three headers at a time; each alone
        monkeypatch.setattr(places, "_BLOCK_BYTES", block)
        bucket.pipe("/b/scanned.tfrecords", (data / "a_4.tfrecords").read_bytes())  # another time of change
        reads.clear()
        lengths = offsets.record_lengths("memory://b/scanned.tfrecords")
        np.testing.assert_array_equal(lengths, offsets.record_lengths(str(data / "a_4.tfrecords")))
        assert len(reads) == n_reads
        assert max(reads) <= block
        np.testing.assert_array_equal(offsets.record_lengths("memory://b/scanned.tfrecords"), lengths)
        assert len(reads) == n_reads
    assert len(list((cache / "offsets").iterdir())) == 1


def test_a_changed_file_is_scanned_again(data: Path, bucket: MemoryFileSystem) -> None:
    assert offsets.record_lengths(URLS[0]).size == 4
    write_records(data / "longer.tfrecords", rows(0, 5))
    bucket.pipe("/b/data/a_4.tfrecords", (data / "longer.tfrecords").read_bytes())
    assert offsets.record_lengths(URLS[0]).size == 5


def test_zlib_is_expanded_once(data: Path, cache: Path, bucket: MemoryFileSystem) -> None:
    plain = (data / "a_4.tfrecords").read_bytes()
    bucket.pipe("/b/x.zstd.tfrecords", zlib.compress(plain))
    source = open_here("memory://b/x.zstd.tfrecords")
    np.testing.assert_array_equal(np.stack([source[i] for i in range(4)]), rows(0, 4))
    assert not source.remote  # what is read is the copy
    (expanded,) = (path for path in (cache / "expanded").iterdir() if not path.name.startswith("."))
    assert expanded.read_bytes() == plain
    made = expanded.stat().st_mtime_ns
    open_here("memory://b/x.zstd.tfrecords")
    assert expanded.stat().st_mtime_ns == made
    bucket.pipe("/b/x.zstd.tfrecords", zlib.compress(plain)[:-3])
    with pytest.raises(DataError, match=r"memory://b/x\.zstd\.tfrecords: the ZLIB stream is incomplete"):
        open_here("memory://b/x.zstd.tfrecords")


class Flaky:
    """Makes every read fail so many times before it succeeds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.failed: dict[Any, int] = {}
        cat = MemoryFileSystem.cat_file

        def cat_file(system: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
            key = (path, start, end)
            self.failed[key] = self.failed.get(key, 0) + 1
            if self.failed[key] <= times:
                raise ConnectionResetError("connection reset by peer")
            return cat(system, path, start, end)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


def test_a_read_that_fails_is_tried_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = Flaky(monkeypatch, times=3)
    source = open_here("memory://b/data/all.index")
    np.testing.assert_array_equal(np.stack(source.read_many(range(7))), rows(0, 7))
    assert set(flaky.failed.values()) >= {4}


def test_a_read_that_goes_on_failing_says_what_and_why(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_here("memory://b/data/all.index")
    Flaky(monkeypatch, times=9)
    with pytest.raises(
        DataError, match=r"a_4\.tfrecords: cannot be read \(connection reset by peer\); 4 attempts failed"
    ):
        source[1]
    with pytest.raises(DataError, match=r"c_3\.tfrecords: cannot be read \(connection reset"):
        source.read_many([5])


def test_a_server_that_cannot_read_parts(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_here("memory://b/data/all.index")
    cat = MemoryFileSystem.cat_file
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, start=None, end=None: cat(self, path))
    with pytest.raises(DataError, match=r"bytes came where \d+ were asked for; .*cannot read parts of a file"):
        source[1]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("memory://b/none.index", r"memory://b/none\.index does not exist"),
        ("memory://b/none.tfrecords", r"memory://b/none\.tfrecords does not exist"),
        ("memory://b/none*.tfrecords", "no file matches"),
        ("memory://b/empty", "directory without .tfrecords"),
        ("memory://b/binary", "byte 0 is not UTF-8"),
        ("memory://b/lost.index", r"memory://b/lost\.tfrecords does not exist"),
        ("nothing://b/a.tfrecords", r"nothing://b/a\.tfrecords: cannot be read \(Protocol not known: nothing"),
    ],
)
def test_bad_urls(data: Path, bucket: MemoryFileSystem, spec: str, says: str) -> None:
    bucket.pipe({"/b/empty/readme": b"x", "/b/binary": b"\xff\xfe", "/b/lost.index": b"lost.tfrecords\n"})
    with pytest.raises(DataError, match=says):
        open_here(spec)


def test_the_record_and_tokenizer_beside_remote_data(tmp_path: Path, data: Path, bucket: MemoryFileSystem) -> None:
    tokenizer = train_bpe(["some words"] * 3, 260)
    tokenizer.save(tmp_path)
    record = DataRecord(
        tokenizer="tokenizer.json",
        tokenizer_sha256=tokenizer.sha256,
        n_vocab=tokenizer.n_vocab,
        sequence_length=T,
        sequences=4,
        validation_sequences=0,
    )
    write_data_record(tmp_path / "mine.json", record)
    for name in ("mine.json", "tokenizer.json"):
        bucket.pipe(f"/b/{name}", (tmp_path / name).read_bytes())
    bucket.pipe({"/b/mine.index": b"mine_4.tfrecords", "/b/mine_4.tfrecords": (data / "a_4.tfrecords").read_bytes()})
    for spec in ("memory://b/mine.index", "memory://b/mine_*.tfrecords"):
        found = tokenizer_for_data(None, spec, 60000)  # by size alone it would be gpt2
        assert found is not None
        assert found.sha256 == tokenizer.sha256
