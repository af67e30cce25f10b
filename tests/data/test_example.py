"""Records as other writers make them, and ids that are not learned."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from example_bytes import example, int64s, mixed, packed, strings, unpacked
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_transformer.config.errors import DataError
from mesh_transformer.data.example import Example, decode_example, encode_example, text_row
from mesh_transformer.data.image_text import CAPTIONS as CAPTION_NAMES
from mesh_transformer.data.image_text import image_text_row, is_image_text

IDS, LEARN = [7, 300, 0, 50256, 2**31 - 1], [0, 1, 0, 1, 0]
ROW = [~7, 300, ~0, 50256, ~(2**31 - 1)]


@pytest.mark.parametrize("text", [packed, unpacked, mixed])
@pytest.mark.parametrize("learn", [packed, unpacked, mixed])
def test_every_order_and_encoding_of_features(text: object, learn: object) -> None:
    features = [int64s("text", IDS, text), int64s("learn", LEARN, learn), strings("meta", [b"a", b""])]
    for order in itertools.permutations(features):
        row = decode_example(example(*order))
        assert row.dtype == np.int32
        assert row.tolist() == ROW
    assert decode_example(example(int64s("text", IDS, text))).tolist() == IDS


def test_what_is_written() -> None:
    assert encode_example(np.array(IDS)) == example(int64s("text", IDS))
    assert encode_example(np.array(ROW)) == example(int64s("learn", LEARN), int64s("text", IDS))
    assert encode_example(np.array([~0, ~0])) == example(int64s("learn", [0, 0]), int64s("text", [0, 0]))
    for dtype in (np.uint16, np.uint32, np.int64):
        assert encode_example(np.array([1, 65535], dtype)) == example(int64s("text", [1, 65535]))


@settings(deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_round_trip_of_any_row(row: list[int]) -> None:
    payload = encode_example(np.array(row, np.int64))
    assert decode_example(payload).tolist() == row
    assert (b"learn" in Example(payload).names) == any(each < 0 for each in row)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (example(int64s("text", [1, -5, 2])), "token id -5 is negative"),
        (example(int64s("text", [1, 2**31])), "2147483648 does not fit in 32 bits"),
        (example(int64s("text", [1, 2]), int64s("learn", [1])), "'learn' has 1 values for the 2 ids"),
        (example(int64s("text", [1, 2]), int64s("learn", [1, 2])), "a 0 or 1 for each"),
        (example(int64s("text", [1, 2]), strings("learn", [b"1", b"1"])), "'learn' is not an int64_list"),
        (example(int64s("ids", [1])), "no feature 'text'; features found: ids"),
    ],
)
def test_what_is_refused(payload: bytes, says: str) -> None:
    with pytest.raises(DataError, match=rf"^f\.tfrecords, record 3: .*{says}"):
        decode_example(payload, where="f.tfrecords, record 3")


def test_other_features() -> None:
    found = Example(example(strings("s", [b"one", b"", b"\xff"]), int64s("n", [-1]), int64s("n", [5, 6])))
    assert found.names == {b"s", b"n"}
    assert found.strings(b"s") == [b"one", b"", b"\xff"]
    assert found.int64s(b"n").tolist() == [5, 6]  # the later entry of a map counts
    with pytest.raises(DataError, match="'n' is not a bytes_list"):
        found.strings(b"n")


CAPTIONS = [strings(name.decode(), [b"a"]) for name in CAPTION_NAMES]
WHOLE = [
    example(int64s("learn", LEARN), int64s("text", IDS)),
    example(*CAPTIONS, int64s("dalle", [3] * 1024, unpacked)),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(WHOLE), st.integers(0, 10**6), st.binary(max_size=6), st.integers(0, 6))
def test_damaged_messages_give_a_row_or_a_data_error(whole: bytes, at: int, put: bytes, cut: int) -> None:
    at %= len(whole)
    try:
        found = Example(whole[:at] + put + whole[at + cut :])
        row = image_text_row(found, "record") if is_image_text(found) else text_row(found, "record")
    except DataError:
        return
    assert row.dtype == np.int32
