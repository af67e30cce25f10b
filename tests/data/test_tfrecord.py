from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_transformer.config.errors import DataError
from mesh_transformer.data import tfrecord
from mesh_transformer.data.expand import plain_file


def read_all(path: Path) -> list[np.ndarray]:
    """Every record of a file, through the same three calls that the source makes."""
    offsets, lengths = tfrecord.scan_offsets(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        payloads = [
            tfrecord.read_record(descriptor, int(o), int(n), path=path, record=i)
            for i, (o, n) in enumerate(zip(offsets, lengths, strict=True))
        ]
    finally:
        os.close(descriptor)
    return [tfrecord.decode_example(payload) for payload in payloads]


# Example{features{feature{key: "text" value{int64_list{value: [1, 300, 50256]}}}}}, written out by hand.
TEXT_PACKED = bytes.fromhex("0a14 0a12 0a04 74657874 120a 1a08 0a06 01 ac02 d08803")
TEXT_UNPACKED = bytes.fromhex("0a15 0a13 0a04 74657874 120b 1a09 0801 08ac02 08d08803")


def test_example_bytes_written_by_hand() -> None:
    assert tfrecord.encode_example(np.array([1, 300, 50256])) == TEXT_PACKED
    for payload in (TEXT_PACKED, TEXT_UNPACKED):
        ids = tfrecord.decode_example(payload)
        assert ids.dtype == np.int32
        assert ids.tolist() == [1, 300, 50256]


def test_frame_bytes_written_by_hand() -> None:
    # The CRC of 32 zero bytes is RFC 3720's test vector; the mask is TFRecord's.
    crc = 0x8A9136AA
    assert tfrecord.masked_crc(bytes(32)) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32
    file = io.BytesIO()
    assert tfrecord.write_records(file, [np.array([1, 300, 50256])]) == 1
    length = struct.pack("<Q", len(TEXT_PACKED))
    checks = [struct.pack("<I", tfrecord.masked_crc(data)) for data in (length, TEXT_PACKED)]
    assert file.getvalue() == length + checks[0] + TEXT_PACKED + checks[1]


def test_unknown_features_and_fields_are_skipped() -> None:
    other = bytes.fromhex("0a 0d 0a05 6f74686572 12 04 0a02 0a00")  # "other": an empty bytes_list value
    floats = bytes.fromhex("0a 0f 0a01 66 12 0a 1208 0a06 000000000000")  # "f": a float_list of six bytes
    text = TEXT_PACKED[2:]
    fields = other + text + floats
    unknown = bytes.fromhex("58 05  61 0102030405060708  6d 01020304")  # varint, fixed64 and fixed32 fields
    payload = unknown + b"\x0a" + bytes([len(fields)]) + fields + unknown
    assert tfrecord.decode_example(payload).tolist() == [1, 300, 50256]


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "features found: none"),
        (bytes.fromhex("0a 0c 0a0a 0a05 6f74686572 12 01 00"), "features found: other"),
        (bytes.fromhex("0a0c 0a0a 0a04 74657874 1202 0a00"), "not an int64_list"),
        (TEXT_PACKED[:-1], "past the end"),
        (b"\x0b", "wire type 3"),
        (b"\xff" * 11, "longer than 10"),
        (bytes.fromhex("0a12 0a10 0a04 74657874 1208 1a06 0a04 80808080"), "past the end"),
        (tfrecord.encode_example(np.array([2**31])), "2147483648 does not fit"),
    ],
)
def test_malformed_example_is_a_data_error(payload: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        tfrecord.decode_example(payload)


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_example_round_trip(ids: list[int]) -> None:
    assert tfrecord.decode_example(tfrecord.encode_example(np.array(ids, np.int64))).tolist() == ids


def test_example_is_what_protobuf_writes() -> None:
    pb = pytest.importorskip("google.protobuf")  # an independent writer of the same message
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    assert pb
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> None:
        entry = file.message_type.add(name=name)
        for field, number, label, kind, type_name in fields:
            entry.field.add(name=field, number=number, label=label, type=kind, type_name=type_name or None)

    message("Int64List", ("value", 1, 3, 3, ""))
    message("Feature", ("int64_list", 3, 1, 11, ".t.Int64List"))
    message("Entry", ("key", 1, 1, 9, ""), ("value", 2, 1, 11, ".t.Feature"))
    message("Features", ("feature", 1, 3, 11, ".t.Entry"))
    message("Example", ("features", 1, 1, 11, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    example = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    ids = np.random.default_rng(0).integers(0, 50400, 2049)
    entry = example.features.feature.add(key="text")
    entry.value.int64_list.value.extend(ids.tolist())
    assert tfrecord.encode_example(ids) == example.SerializeToString()


SEQUENCES = [np.array([5, 50256, 0]), np.array([], np.int32), np.arange(130)]


def test_write_scan_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecords"
    assert tfrecord.write_records(path, SEQUENCES) == 3
    assert [ids.tolist() for ids in read_all(path)] == [ids.tolist() for ids in SEQUENCES]
    assert os.listdir(tmp_path) == ["a.tfrecords"]


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecords"
    tfrecord.write_records(path, SEQUENCES)
    before = path.read_bytes()

    def broken():  # type: ignore[no-untyped-def]
        yield np.array([1])
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        tfrecord.write_records(path, broken())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.tfrecords"]
    with pytest.raises(DataError, match="missing"):
        tfrecord.write_records(tmp_path / "missing" / "a.tfrecords", SEQUENCES)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecords"
    tfrecord.write_records(path, SEQUENCES)
    data = path.read_bytes()
    for i in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
            with pytest.raises(DataError, match=r"a\.tfrecords, record \d at byte \d+"):
                read_all(path)


def test_every_truncation_is_noticed_unless_between_records(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecords"
    tfrecord.write_records(path, SEQUENCES)
    data = path.read_bytes()
    offsets, _ = tfrecord.scan_offsets(path)
    whole = {int(offset) - tfrecord.HEADER_BYTES: i for i, offset in enumerate(offsets)}
    for end in range(len(data)):
        path.write_bytes(data[:end])
        if end in whole:
            assert len(read_all(path)) == whole[end]
        else:
            with pytest.raises(DataError, match="truncated"):
                read_all(path)


def test_garbage_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecords"
    path.write_bytes(b"This is a text file and no TFRecord file.")
    with pytest.raises(DataError, match=r"record 0 at byte 0.*checksum"):
        tfrecord.scan_offsets(path)
    with pytest.raises(DataError, match="No such file"):
        tfrecord.scan_offsets(tmp_path / "none")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_TRANSFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_zstd_in_the_path_means_zlib(tmp_path: Path, cache: Path) -> None:
    plain = io.BytesIO()
    tfrecord.write_records(plain, SEQUENCES)
    path = tmp_path / "data.zstd.tfrecords"
    half = len(plain.getvalue()) // 2
    # Two streams one after the other are one file.
    path.write_bytes(zlib.compress(plain.getvalue()[:half]) + zlib.compress(plain.getvalue()[half:]))
    expanded = plain_file(path)
    assert Path(expanded).read_bytes() == plain.getvalue()
    assert cache in Path(expanded).parents
    changed = os.stat(expanded).st_mtime_ns
    assert plain_file(path) == expanded
    assert os.stat(expanded).st_mtime_ns == changed  # once only

    whole = path.read_bytes()
    for damaged in (whole[:-3], b"(\xb5/\xfd not this", b"x\x9c" + whole[5:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"zstd\.tfrecords.*ZLIB"):
            plain_file(path)
    assert len(list((cache / "expanded").iterdir())) == 1


def test_plain_files_stay_where_they_are(tmp_path: Path, cache: Path) -> None:
    directory = tmp_path / "zstd-archive"
    directory.mkdir()
    for name, sequences in (("a.tfrecords", SEQUENCES), ("empty.tfrecords", [])):
        tfrecord.write_records(directory / name, sequences)
        assert plain_file(directory / name) == str(directory / name)
    assert not cache.exists()
