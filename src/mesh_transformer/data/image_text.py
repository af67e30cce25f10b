"""The original's image-text records: captions, and an image as codes of a discrete autoencoder.

A record has captions as strings and 1024 integers `dalle` (docs/data.md). It becomes a row of 1280 ids: 255 of text, a
separator, the codes. Ids are GPT-2's, then the separator 50257 and the padding 50258, then the codes from 50258 on: the
original counted its codes from where its padding lay already, so that code 0 and padding are one id.
"""

from __future__ import annotations

import numpy as np

from mesh_transformer.config.errors import DataError
from mesh_transformer.data.example import Example
from mesh_transformer.data.tokenizer import load_tokenizer

CODES = b"dalle"
# In the order in which the original put them together; titles and the MIME type are not read.
CAPTIONS = (
    b"context_page_description",
    b"context_section_description",
    b"caption_reference_description",
    b"caption_alt_text_description",
    b"caption_attribution_description",
)
N_CODES = 1024
TEXT_IDS = 255
ROW_IDS = TEXT_IDS + 1 + N_CODES
_END_OF_TEXT, _SEPARATOR, _PADDING, _FIRST_CODE = 50256, 50257, 50258, 50258


def is_image_text(example: Example) -> bool:
    """Whether a record is of this kind: it has codes of an image, and no text of its own."""
    return CODES in example.names and b"text" not in example.names


def image_text_row(example: Example, where: str) -> np.ndarray:
    """int32 [1280]: the last 255 ids of the captions, each after end-of-text, padded behind; separator; codes.

    Raises:
        DataError: a caption is missing or not UTF-8, or there are not 1024 codes from 0 on; begins with `where`.
    """
    texts = [_caption(example, name, where) for name in CAPTIONS]
    tokenizer = load_tokenizer("gpt2")
    ids: list[int] = []
    for caption in tokenizer.encode_batch(texts, allow_special=True):
        ids += [_END_OF_TEXT, *caption]
    ids = ids[-TEXT_IDS:]
    codes = example.int64s(CODES)
    if codes.size != N_CODES or codes.min() < 0 or codes.max() >= 2**31 - _FIRST_CODE:
        raise DataError(
            f"{where}: its feature 'dalle' has {codes.size} values from {codes.min(initial=0)} to "
            f"{codes.max(initial=0)}; expected {N_CODES} codes of an image, from 0 on"
        )
    ids += [_PADDING] * (TEXT_IDS - len(ids)) + [_SEPARATOR]
    return np.concatenate([np.array(ids, np.int64), codes + _FIRST_CODE]).astype(np.int32)


def _caption(example: Example, name: bytes, where: str) -> str:
    values = example.strings(name)
    if len(values) != 1:
        raise DataError(f"{where}: its feature {name.decode()!r} has {len(values)} values; expected one caption")
    try:
        return values[0].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: its feature {name.decode()!r} is not UTF-8 (byte {error.start})") from error
