"""Tokenizers of the families against transformers': ids, texts whole and as a stream, prompts made of messages."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import family_tokenizers
from family_tokenizers import NAMES
from mesh_transformer.config.errors import UserError
from mesh_transformer.data.chat import encode_chat, render_chat
from mesh_transformer.data.tokenizer import IncrementalDecoder, Tokenizer, load_tokenizer

# Deprecations inside transformers are theirs to mend.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

TEXTS = [
    "The geese ate.",
    "",
    "a",
    "  two  spaces and a line\nand another\n\n\tend ",
    "café, naïve Ελληνικά 日本語 😀👩‍👩‍👧 x",
    "12345 of 6.789",
]
TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What did the geese eat?"}],
    [
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": " Yes? "},
        {"role": "user", "content": "é😀"},
    ],
]
SYSTEM = [{"role": "system", "content": "You are a duck & no <goose>."}, *TALKS[0]]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    directory = family_tokenizers.write(tmp_path_factory.mktemp("tokenizer") / request.param, request.param)
    return load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_prompts(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    ids = theirs(text)["input_ids"]
    assert ours.encode_prompt(text) == ids
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert [ours.begin[0]] == ids[:1] if theirs.bos_token else ours.begin == ()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_what_stands_before_a_text_is_said_by_tokenizer_json(tmp_path: Path, name: str, flags: dict[str, bool]) -> None:
    """The flags of tokenizer_config.json say nothing beside it, there and here."""
    from transformers import AutoTokenizer

    plain = load_tokenizer(family_tokenizers.write(tmp_path, name))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | flags))
    ids = AutoTokenizer.from_pretrained(tmp_path)("The geese")["input_ids"]
    assert load_tokenizer(tmp_path).encode_prompt("The geese") == ids == plain.encode_prompt("The geese")


@pytest.mark.parametrize("text", TEXTS)
def test_texts(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    for ids in (ours.encode(text), ours.encode_prompt(text)):
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    if not text.startswith(" "):  # Mistral's puts a space before a text that has none, and takes off any
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_streams(pair: tuple[Tokenizer, Any], text: str) -> None:
    """Token by token: nothing but whole characters, and after a prompt exactly what stands after it in the text."""
    ours, theirs = pair
    ids = ours.encode(text)
    decoder = IncrementalDecoder(ours, begins=True)
    parts = [decoder.push([token]) for token in ids]
    assert "".join(parts) + decoder.flush() == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert not any("\ufffd" in part for part in parts)
    prompt = ours.encode_prompt("The geese")
    whole = theirs.decode([*prompt, *ids], clean_up_tokenization_spaces=False)
    decoder = IncrementalDecoder(ours)
    after = "".join(decoder.push([token]) for token in ids) + decoder.flush()
    assert theirs.decode(prompt, clean_up_tokenization_spaces=False) + after == whole


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}])
@pytest.mark.parametrize("talk", TALKS)
def test_messages(pair: tuple[Tokenizer, Any], talk: list[dict[str, Any]], more: dict[str, Any]) -> None:
    ours, theirs = pair
    asked = {"add_generation_prompt": True, **more}
    expected = theirs.apply_chat_template(talk, tokenize=False, **asked)
    assert render_chat(ours, talk, **asked) == expected
    ids = theirs.apply_chat_template(talk, tokenize=True, return_dict=False, **asked)
    assert encode_chat(ours, talk, **asked) == ids
    # No beginning but those of the template: Llama 2 has one before every user's message, others one or none.
    assert ids.count(theirs.bos_token_id) <= sum(message["role"] == "user" for message in talk)


def test_system_messages_tools_and_variables(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    tools = [{"type": "function", "function": {"name": "count", "description": "of <geese> & é", "parameters": {}}}]
    variables = {"enable_thinking": False}
    how: dict[str, Any] = {"tools": tools, "add_generation_prompt": True}
    try:
        expected = theirs.apply_chat_template(SYSTEM, tokenize=False, **how, **variables)
    except Exception as error:
        with pytest.raises(UserError, match="cannot make a prompt of these messages: Only user and assistant roles"):
            render_chat(ours, SYSTEM, variables=variables, **how)
        assert "Only user and assistant roles" in str(error)
        return
    assert render_chat(ours, SYSTEM, variables=variables, **how) == expected
    assert "duck & no <goose>" in expected


def test_names_of_special_tokens_in_a_message(pair: tuple[Tokenizer, Any]) -> None:
    """They become those tokens, there and here: a user can write them."""
    ours, theirs = pair
    talk = [{"role": "user", "content": f"a {theirs.eos_token} b"}]
    ids = theirs.apply_chat_template(talk, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert encode_chat(ours, talk) == ids
    plain = [{"role": "user", "content": "a b"}]
    assert ids.count(theirs.eos_token_id) == encode_chat(ours, plain).count(theirs.eos_token_id) + 1
    # In a plain prompt they are text.
    assert theirs.eos_token_id not in ours.encode(theirs.eos_token)


@pytest.mark.parametrize("name", NAMES)
def test_where_templates_stand(tmp_path: Path, name: str) -> None:
    """In tokenizer_config.json, or in a file beside it; and as transformers saves them."""
    from transformers import AutoTokenizer

    talk = TALKS[0]
    within = load_tokenizer(family_tokenizers.write(tmp_path / "within", name))
    apart = load_tokenizer(family_tokenizers.write(tmp_path / "apart", name, apart=True))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "within")
    expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    theirs.chat_template = {"default": theirs.chat_template, "tool_use": "tools: {{ tools | length }}"}
    theirs.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert render_chat(within, talk) == render_chat(apart, talk) == render_chat(saved, talk) == expected
    assert render_chat(saved, talk, tools=[{}, {}]) == "tools: 2"
    # What is kept of them is read by both.
    saved.save(tmp_path / "kept")
    kept = AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert kept.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == expected
    assert kept.apply_chat_template(talk, tools=[{}], tokenize=False) == "tools: 1"
    assert render_chat(load_tokenizer(tmp_path / "kept"), talk, tools=[{}]) == "tools: 1"
