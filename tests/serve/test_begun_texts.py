"""Prompts and echoes with a tokenizer that puts a token before every text and a space before its first word."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from serve_cases import CONFIG

import family_tokenizers
from mesh_transformer.data.tokenizer import Tokenizer, load_tokenizer
from mesh_transformer.engine.request import Output, TokenLogprob
from mesh_transformer.sample.text import TextStream
from mesh_transformer.serve.answers import ChoiceText
from mesh_transformer.serve.asking import ask
from mesh_transformer.serve.tokens import TokenTexts

PROMPT = "The geese é"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(family_tokenizers.write(tmp_path_factory.mktemp("tokenizer"), "llama-2"))


def asked(server: Any, **body: Any) -> Any:
    return ask(json.dumps(body).encode(), server.served)


def test_prompts(make_server: Any, tokenizer: Tokenizer) -> None:
    begin = tokenizer.begin
    assert len(begin) == 1 and begin != (tokenizer.end_of_text,)
    config = {"config": dataclasses.replace(CONFIG, n_vocab=tokenizer.n_vocab)}
    server = make_server(model={"tokenizer": tokenizer, **config})
    ids = tuple(tokenizer.encode(PROMPT))
    found = asked(server, prompt=[PROMPT, ""], echo=True)
    assert [each.prompt for each in found.requests] == [(*begin, *ids), begin]
    assert found.texts == (PROMPT, "") and found.before == (1, 0)
    # Ids are taken as they are, and their echo is their text.
    found = asked(server, prompt=[*begin, *ids], echo=True)
    assert found.requests[0].prompt == (*begin, *ids) and found.before == (0,)
    assert found.texts == (f"<s> {PROMPT}",)


def entries(ids: list[int]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(token, None if i == 0 else -1.0) for i, token in enumerate(ids))


def test_an_echo_and_what_is_written_after_it(tokenizer: Tokenizer) -> None:
    """Every token stands where its text begins; the one before the text has none."""
    ids, written = tokenizer.encode_prompt(PROMPT), tokenizer.encode("ate é")
    choice, stream, texts = (
        ChoiceText(tokenizer, echo=PROMPT, echoed=True, n_before=1),
        TextStream(tokenizer),
        TokenTexts(tokenizer),
    )
    pieces = [choice.add(Output(prompt_logprobs=entries(ids), text=""))]
    for token in written:
        told = TokenLogprob(token, -1.0)
        pieces.append(choice.add(Output(tokens=(token,), text=stream.push(token), logprobs=(told,))))
    pieces.append(choice.add(Output(text=stream.flush(), finish_reason="length")))
    text = "".join(piece.text for piece in pieces)
    assert text == f"{PROMPT} ate é"
    found = [entry for piece in pieces for entry in piece.entries]
    assert [entry.token for entry, _ in found] == [*ids, *written]
    assert [at for _, at in found][:2] == [0, 0]
    for k, (entry, at) in enumerate(found[2:], 2):
        name = texts.text(entry.token)
        if not name.startswith("bytes:"):
            assert text.startswith(name, at), (k, name, at)
    assert "bytes:\\xc3" in [texts.text(token) for token in ids]


def test_a_stop_string_across_bytes_and_spaces(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=("é x",))
    parts = [stream.push(token) for token in tokenizer.encode("a é x b")]
    assert "".join(parts) == stream.text == " a " and stream.stopped


def test_families_are_there(tmp_path: Path) -> None:
    """Each kind of tokenizer stands for fixed bytes, so that a stream costs as much as its tokens."""
    for name in family_tokenizers.NAMES:
        found = load_tokenizer(family_tokenizers.write(tmp_path / name, name))
        assert found.byte_level and found.decode(found.encode("a é😀\n")) == "a é😀\n", name
