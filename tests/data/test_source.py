from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from mesh_transformer.config.errors import DataError
from mesh_transformer.data import offsets
from mesh_transformer.data.offsets import record_lengths
from mesh_transformer.data.source import RecordSource, open_source, resolve_data
from mesh_transformer.data.tfrecord import write_records

T = 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_TRANSFORMER_CACHE", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache"


def rows(first: int, count: int, length: int = T + 1) -> np.ndarray:
    return np.arange(first * length, (first + count) * length).reshape(count, length)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three record files (the middle one empty) and an index; ids count up through all of them."""
    directory = tmp_path / "data"
    directory.mkdir()
    for name, first, count in (("a_4", 0, 4), ("b_0", 4, 0), ("c_3", 4, 3)):
        write_records(directory / f"{name}.tfrecords", rows(first, count))
    (directory / "all.index").write_text("a_4.tfrecords\n\n  b_0.tfrecords  \nc_3.tfrecords")
    return directory


def test_an_index_is_relative_to_itself_then_to_the_working_directory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(data / f"{name}.tfrecords") for name in ("a_4", "b_0", "c_3")]
    assert resolve_data(str(data / "all.index")) == names
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "list").write_text(f"data/c_3.tfrecords\n{names[0]}\nlocal.bin\n")
    shutil.copy(names[0], elsewhere / "local.bin")
    shutil.copy(names[0], tmp_path / "local.bin")  # the index's own directory goes first
    assert resolve_data("elsewhere/list") == ["data/c_3.tfrecords", names[0], "elsewhere/local.bin"]


def test_a_file_a_glob_and_a_directory(data: Path) -> None:
    names = [str(data / f"{name}.tfrecords") for name in ("a_4", "b_0", "c_3")]
    assert resolve_data(names[2]) == [names[2]]
    assert resolve_data(str(data / "[ac]_*.tfrecords")) == [names[0], names[2]]
    RecordSource(names, sequence_length=T, n_vocab=100)  # leaves its offsets beside the data
    shutil.copy(names[0], data / "a.val_4.tfrecords")  # what prepare sets aside for validation
    assert resolve_data(str(data)) == names


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a_4.tfrecords\nnone.tfrecords\n", r"list, line 2 names 'none\.tfrecords'"),
        ("\n\n", "names no files"),
        (
            '{"text": "' + 200 * "x" + '"}',
            r"line 1 names .{60,100}x\.\.\.', which does not exist.*`mesh-transformer prepare`",
        ),
        ("\xff\xfe", "byte 0 is not UTF-8"),
    ],
)
def test_bad_indexes(data: Path, content: str, says: str) -> None:
    (data / "list").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=says):
        resolve_data(str(data / "list"))


def test_nothing_there(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for spec, says in (
        (data / "none.index", "does not exist"),
        (data / "*.none", "no file matches"),
        (tmp_path / "empty", "without .tfrecords"),
    ):
        with pytest.raises(DataError, match=says):
            resolve_data(str(spec))
    with pytest.raises(DataError, match="is empty: no records in 1 files"):
        open_source(str(data / "b_0.tfrecords"), sequence_length=T, n_vocab=100)


def test_every_sequence_in_file_order_from_many_threads(data: Path) -> None:
    source = open_source(str(data / "all.index"), sequence_length=T, n_vocab=100)
    assert len(source) == 7
    got: dict[int, np.ndarray] = {}

    def read(indices: range) -> None:
        for i in indices:
            got[i] = source[i]

    threads = [threading.Thread(target=read, args=(range(i, 7, 3),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.stack([got[i] for i in range(7)]), rows(0, 7))
    assert got[0].dtype == np.int32
    for outside in (-1, 7):
        with pytest.raises(IndexError):
            source[outside]


def test_wrong_length_says_both_numbers(data: Path) -> None:
    with pytest.raises(DataError, match=r"a_4\.tfrecords, record 0 has 9 ids, but sequence_length 16 needs 17"):
        open_source(str(data / "all.index"), sequence_length=16, n_vocab=100)
    # Only the first record is read at open; a later one is found out when it is read.
    write_records(data / "mixed.tfrecords", [*rows(0, 2), np.arange(5)])
    source = open_source(str(data / "mixed.tfrecords"), sequence_length=T, n_vocab=100)
    with pytest.raises(DataError, match=r"mixed\.tfrecords, record 2 has 5 ids.*needs 9; .* of unequal length"):
        source[2]
    write_records(data / "short.tfrecords", [np.arange(5)])
    (data / "unequal.index").write_text("a_4.tfrecords\nshort.tfrecords\n")
    with pytest.raises(
        DataError, match=r"short\.tfrecords, record 0 has 5 ids.*a_4\.tfrecords before it has so many"
    ) as e:
        open_source(str(data / "unequal.index"), sequence_length=T, n_vocab=100)
    assert "set data.sequence_length" not in str(e.value)


def test_ids_that_are_not_learned_come_as_they_were_written(data: Path) -> None:
    marked = rows(0, 3)
    marked[1, :4] = ~marked[1, :4]
    marked[2] = ~marked[2]
    write_records(data / "marked.tfrecords", marked)
    source = open_source(str(data / "marked.tfrecords"), sequence_length=T, n_vocab=27)
    np.testing.assert_array_equal(source.read_many([2, 0, 1]), marked[[2, 0, 1]])


def test_a_file_named_twice_is_read_twice_and_said(data: Path) -> None:
    (data / "twice.index").write_text("a_4.tfrecords\nc_3.tfrecords\n\na_4.tfrecords\n")
    notes: list[str] = []
    source = open_source(str(data / "twice.index"), sequence_length=T, n_vocab=100, note=notes.append)
    assert len(source) == 4 + 3 + 4
    np.testing.assert_array_equal(source[7], rows(0, 1)[0])
    assert len(notes) == 1
    assert "a_4.tfrecords (2 times)" in notes[0]
    open_source(str(data / "all.index"), sequence_length=T, n_vocab=100, note=notes.append)
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b'{"text": "a line of JSON, and no record"}\n', "begins like text", id="text"),
        pytest.param(gzip.compress(b"x" * 100), "begins like gzip", id="gzip"),
        pytest.param(b"PAR1" + bytes(100), "begins like parquet", id="parquet"),
        pytest.param(zlib.compress(b"x" * 100), "begins like ZLIB.*'zstd' is in the path", id="zlib"),
        pytest.param(bytes(100), "not a TFRecord file$", id="zeros"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.tfrecords").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.tfrecords, record 0 at byte 0.*{says}"):
        open_source(str(tmp_path / "a.tfrecords"), sequence_length=T, n_vocab=100)


@pytest.mark.parametrize("token", [100, 50256, 2**31 - 1])
@pytest.mark.parametrize("learned", [True, False])
def test_ids_outside_the_vocabulary(data: Path, token: int, learned: bool) -> None:
    bad = rows(0, 2)
    bad[1, 3] = token if learned else ~token
    write_records(data / "bad.tfrecords", bad)
    source = open_source(str(data / "bad.tfrecords"), sequence_length=T, n_vocab=100)
    with pytest.raises(DataError, match=rf"bad\.tfrecords, record 1 has token id {token}, .*n_vocab = 100"):
        source[1]
    bad[1, 3] = 99
    write_records(data / "good.tfrecords", bad)
    assert open_source(str(data / "good.tfrecords"), sequence_length=T, n_vocab=100)[1][3] == 99


def test_damage_under_the_reader_names_the_record(data: Path) -> None:
    path = data / "a_4.tfrecords"
    source = open_source(str(path), sequence_length=T, n_vocab=100)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a_4\.tfrecords, record 3 at byte \d+: .*checksum"):
        source[3]


def test_offsets_are_scanned_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(data / "a_4.tfrecords")
    scans = []
    scan = offsets.scan_offsets
    monkeypatch.setattr(offsets, "scan_offsets", lambda p: scans.append(p) or scan(p))
    first = record_lengths(path)
    np.testing.assert_array_equal(record_lengths(path), first)
    assert len(scans) == 1
    kept = data / ".a_4.tfrecords.offsets"

    # Stale: the same size at another time, then another size at the same time.
    status = os.stat(path)
    write_records(path, rows(0, 4)[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    record_lengths(path)
    assert len(scans) == 2
    write_records(path, rows(0, 2))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert record_lengths(path).size == 2
    assert len(scans) == 3

    # Damaged: every flipped byte, and every truncation, is noticed and mended.
    whole = kept.read_bytes()
    for i in range(len(whole)):
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :]):
            kept.write_bytes(damaged)
            count = len(scans)
            assert record_lengths(path).size == 2
            assert len(scans) == count + 1
            assert kept.read_bytes() == whole


def test_offsets_go_to_the_users_cache_where_the_data_cannot_be_written(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = offsets.write_atomic

    def refuse_beside(path: Path, content: bytes) -> None:
        if path.parent == data:
            raise DataError("read-only")
        write(path, content)

    monkeypatch.setattr(offsets, "write_atomic", refuse_beside)
    path = str(data / "a_4.tfrecords")
    assert record_lengths(path).size == 4
    assert not (data / ".a_4.tfrecords.offsets").exists()
    assert len(list((cache / "offsets").iterdir())) == 1
    monkeypatch.setattr(offsets, "scan_offsets", lambda p: pytest.fail("scanned again"))
    assert record_lengths(path).size == 4


def test_fingerprint_is_of_names_counts_and_sizes(data: Path, tmp_path: Path) -> None:
    def fingerprint(*names: str, directory: Path = data) -> str:
        return RecordSource([str(directory / name) for name in names], sequence_length=T, n_vocab=100).fingerprint

    one = fingerprint("a_4.tfrecords", "c_3.tfrecords")
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    assert fingerprint("a_4.tfrecords", "c_3.tfrecords", directory=moved) == one
    assert fingerprint("c_3.tfrecords", "a_4.tfrecords") != one
    assert fingerprint("a_4.tfrecords") != one
    write_records(moved / "c_3.tfrecords", rows(0, 4))
    assert fingerprint("a_4.tfrecords", "c_3.tfrecords", directory=moved) != one
    # Told over again: a change of the recipe would make every run begun before it refuse to resume.
    sizes = [os.path.getsize(data / name) for name in ("a_4.tfrecords", "c_3.tfrecords")]
    text = f"a_4.tfrecords\0004\0{sizes[0]}\nc_3.tfrecords\0003\0{sizes[1]}\n"
    assert one == hashlib.sha256(text.encode()).hexdigest()
