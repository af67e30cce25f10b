"""The original's image-text records; the one here is put together by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from example_bytes import example, int64s, strings, unpacked

from mesh_transformer.config.errors import DataError
from mesh_transformer.data.source import open_source
from mesh_transformer.data.tfrecord import masked_crc, write_records

TEXTS = {
    "page_title": b"never read",
    "section_title": b"never read",
    "hierarchical_section_title": b"never read",
    "mime_type": b"image/jpeg",
    "caption_alt_text_description": b"Hello world",
    "context_section_description": b"",
    "caption_attribution_description": b" Hello",
    "context_page_description": b"I'll",
    "caption_reference_description": b"don't 2048",
}
# GPT-2's ids, in the order page, section, reference, alternative text, attribution; 50256 before each.
EXPECTED = [50256, 40, 1183, 50256, 50256, 9099, 470, 36117, 50256, 15496, 995, 50256, 18435]
CODES = [(i * 37) % 8192 for i in range(1024)]


def record(path: Path, *, texts: dict[str, bytes] = TEXTS, codes: list[int] = CODES) -> Path:
    features = [strings(name, [text]) for name, text in texts.items()] + [int64s("dalle", codes, unpacked)]
    payload = example(*features)
    length = struct.pack("<Q", len(payload))
    path.write_bytes(length + struct.pack("<I", masked_crc(length)) + payload + struct.pack("<I", masked_crc(payload)))
    return path


def row_of(path: Path, n_vocab: int = 50258 + 8192) -> list[int]:
    return open_source(str(path), sequence_length=1279, n_vocab=n_vocab)[0].tolist()


def test_a_row_is_text_padding_separator_and_codes(tmp_path: Path) -> None:
    row = row_of(record(tmp_path / "wit.tfrecords"))
    assert len(row) == 1280
    assert row[: len(EXPECTED)] == EXPECTED
    assert row[len(EXPECTED) : 255] == [50258] * (255 - len(EXPECTED))
    assert row[255] == 50257
    assert row[256:] == [50258 + code for code in CODES]


def test_of_long_text_the_last_ids_are_kept(tmp_path: Path) -> None:
    texts = TEXTS | {"context_page_description": b" Hello" * 400}
    row = row_of(record(tmp_path / "wit.tfrecords", texts=texts))
    assert row[:255] == [18435] * (255 - len(EXPECTED) + 3) + EXPECTED[3:]


def test_the_name_of_the_end_in_a_caption_is_the_token(tmp_path: Path) -> None:
    row = row_of(record(tmp_path / "wit.tfrecords", texts=TEXTS | {"context_page_description": b"I'll<|endoftext|>"}))
    assert row[:4] == [50256, 40, 1183, 50256]


def test_rows_of_text_and_of_images_in_one_data_set(tmp_path: Path) -> None:
    record(tmp_path / "a.tfrecords")
    write_records(tmp_path / "b.tfrecords", [np.arange(1280)])
    source = open_source(str(tmp_path), sequence_length=1279, n_vocab=60000)
    assert [int(row[1]) for row in source.read_many([0, 1])] == [40, 1]


@pytest.mark.parametrize(
    ("texts", "codes", "says"),
    [
        ({}, CODES, "no feature 'context_page_description'"),
        (TEXTS | {"context_page_description": b"\xff"}, CODES, "'context_page_description' is not UTF-8"),
        (TEXTS, CODES[:-1], "'dalle' has 1023 values from 0 to 81..; expected 1024"),
        (TEXTS, [-1, *CODES[1:]], "from -1 to"),
        (TEXTS, [], "'dalle' has 0 values from 0 to 0"),
        (TEXTS, [8192, *CODES[1:]], "token id 58450, outside"),
    ],
)
def test_what_is_refused(tmp_path: Path, texts: dict[str, bytes], codes: list[int], says: str) -> None:
    with pytest.raises(DataError, match=rf"wit\.tfrecords, record 0.*{says}"):
        row_of(record(tmp_path / "wit.tfrecords", texts=texts, codes=codes))


def test_another_sequence_length_says_which(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1280 ids.*set data\.sequence_length = 1279"):
        open_source(str(record(tmp_path / "wit.tfrecords")), sequence_length=2048, n_vocab=60000)
