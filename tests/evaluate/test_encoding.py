"""Contexts and continuations as token ids: by the harness' rules, and by the original's."""

from __future__ import annotations

import pytest

from mesh_transformer.config.errors import UserError
from mesh_transformer.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from mesh_transformer.engine.packing import Pair
from mesh_transformer.evaluate.encoding import encode_legacy, encode_pairs


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(["the quick brown fox jumps over the lazy dog. " * 50], 320)


BYTES = load_tokenizer("bytes")


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    return encode_pairs(tokenizer, [(context, continuation)])[0]


def test_spaces_that_end_the_context_go_to_the_continuation(bpe: Tokenizer) -> None:
    assert encode_pair(bpe, "the quick  ", "brown fox") == encode_pair(bpe, "the quick", "  brown fox")
    context, continuation = encode_pair(bpe, "the quick ", "brown fox")
    assert list(context) == bpe.encode("the quick") and [*context, *continuation] == bpe.encode("the quick brown fox")


def test_the_whole_is_cut_where_the_context_alone_would_end(bpe: Tokenizer) -> None:
    # "qu" and "ick" grow together across the border: the context's own number of tokens decides where it is cut.
    head, whole = bpe.encode("the qu"), bpe.encode("the quick")
    assert len(whole) <= len(head), "a case where the border moves"
    with pytest.raises(UserError, match=r"the continuation 'ick' has no token of its own"):
        encode_pair(bpe, "the qu", "ick")
    context, continuation = encode_pair(bpe, "the qu", "ick brown")
    assert context == head and continuation == bpe.encode("the quick brown")[len(head) :]


def test_an_empty_context_is_end_of_text() -> None:
    assert encode_pair(BYTES, "", "ab") == ([256], [97, 98])
    assert encode_pair(BYTES, " \n", "ab") == ([256], [32, 10, 97, 98])
    # A continuation that begins with it needs no other.
    assert encode_pair(BYTES, "", "<|endoftext|>ab") == ([256], [97, 98])
    assert encode_pair(BYTES, "<|endoftext|>a", "b") == ([256, 97], [98])


def test_pairs_are_encoded_together(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [("the quick ", "brown fox"), ("", "dog"), (" ", "fox"), ("the qu", "ick brown"), ("", "<|endoftext|>a")]
    expected, calls, real = [encode_pair(bpe, *text) for text in texts], [], type(bpe)._encode_batch
    monkeypatch.setattr(type(bpe), "_encode_batch", lambda *given: calls.append(given) or real(*given))
    assert encode_pairs(bpe, texts) == expected and len(calls) == 2
    assert encode_pairs(bpe, []) == []


@pytest.mark.parametrize(("context", "continuation"), [("a", ""), ("", ""), ("", "<|endoftext|>")])
def test_nothing_to_score(context: str, continuation: str) -> None:
    with pytest.raises(UserError, match=r"has no token of its own; expected text to score"):
        encode_pair(BYTES, context, continuation)


def test_the_originals_rules() -> None:
    # Encoded apart, spaces stay where they are, the ligature and the broken encoding are mended.
    assert encode_legacy(BYTES, "ﬁ ", " x", 64) == ([256, *b"fi "], [*b" x"])
    assert encode_legacy(BYTES, "schÃ¶n", "x", 64) == ([256, *"schön".encode()], [*b"x"])
    # The newest n_ctx tokens of both, not one more.
    assert encode_legacy(BYTES, "abcdef", "gh", 5) == ([*b"def"], [*b"gh"])
    with pytest.raises(UserError, match=r"has 5 tokens, and with the original's rules the context of 5 holds 4"):
        encode_legacy(BYTES, "a", "bcdef", 5)
