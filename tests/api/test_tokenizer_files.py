"""What stands beside a tokenizer.json is kept wherever the model goes; a tokenizer that is too large goes nowhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import family_tokenizers
import mesh_transformer as mt
from mesh_transformer import api
from mesh_transformer.checkpoint.convert import convert
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.config.errors import DataError, UserError
from mesh_transformer.data.chat import NoTemplate, encode_chat, render_chat
from mesh_transformer.data.choice import tokenizer_for_data
from mesh_transformer.data.companions import Companions
from mesh_transformer.data.tokenizer import Tokenizer, from_bytes, load_tokenizer
from mesh_transformer.train.beginning import with_companions
from mesh_transformer.train.data import Data
from small_families import params_of, small

FILES = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
TALK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_tokenizers.write(tmp_path_factory.mktemp("tokenizer"), "llama-3")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def chat_model(tokenizer: Tokenizer) -> mt.Model:
    cfg = small("llama", n_vocab=tokenizer.n_vocab + 3, n_ctx=32)
    return mt.Model(cfg, params_of(cfg), tokenizer)


def assert_kept(found: Tokenizer | None, tokenizer: Tokenizer) -> None:
    assert found is not None and found.companions == tokenizer.companions and found.ends == tokenizer.ends
    assert found.sha256 == tokenizer.sha256 and found.begin == tokenizer.begin == (tokenizer.start,)
    assert render_chat(found, TALK).endswith("assistant<|end_header_id|>\n\n")


def test_what_is_known_of_it(tokenizer: Tokenizer) -> None:
    assert tokenizer.ends == tuple(
        tokenizer.encode(f"<|{name}|>", allow_special=True)[0] for name in ("end_of_text", "eot_id")
    )
    assert tokenizer.end_of_text == tokenizer.ends[0]
    assert tokenizer.encode_prompt("a") == [*tokenizer.begin, *tokenizer.encode("a")]
    begun = "<|begin_of_text|>a"
    assert tokenizer.encode_prompt(begun, allow_special=True) == tokenizer.encode_prompt("a")
    assert tokenizer.encode_prompt("") == list(tokenizer.begin)


def test_prompts_are_encoded_together(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, calls, real = ["a", "<|begin_of_text|>é", "", "a b"], [], type(tokenizer)._encode_batch
    expected = [tokenizer.encode_prompt(text, allow_special=True) for text in texts]
    monkeypatch.setattr(type(tokenizer), "_encode_batch", lambda *given: calls.append(given) or real(*given))
    assert tokenizer.encode_prompts(texts, allow_special=True) == expected and len(calls) == 1
    assert load_tokenizer("bytes").encode_prompts(["a", ""]) == [[97], []]


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_formats(chat_model: mt.Model, tokenizer: Tokenizer, directory: Path, tmp_path: Path, to: str) -> None:
    chat_model.save(tmp_path / "first", format=to)
    opened = mt.load(tmp_path / "first")
    assert_kept(opened.tokenizer, tokenizer)
    other = {"native": "huggingface", "huggingface": "native"}[to]
    weights = open_weights(tmp_path / "first")
    convert(weights, tmp_path / "second", api.conversion(other, api.tokenizer_of(weights)))
    assert_kept(mt.load(tmp_path / "second").tokenizer, tokenizer)
    for written in ("first", "second"):
        for name in ("generation_config.json", "tokenizer_config.json"):
            assert (tmp_path / written / name).read_bytes() == (directory / name).read_bytes()
    config = json.loads((tmp_path / ("second" if to == "native" else "first") / "config.json").read_text())
    assert config["eos_token_id"] == list(tokenizer.ends)


def test_an_8_bit_copy(chat_model: mt.Model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat_model.save(tmp_path / "model")
    weights = open_weights(tmp_path / "model")
    convert(weights, tmp_path / "int8", api.conversion("native", api.tokenizer_of(weights), quantize="int8"))
    assert_kept(api.tokenizer_of(open_weights(tmp_path / "int8")), tokenizer)


def test_ends_that_config_json_alone_names(tokenizer: Tokenizer, directory: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    assert load_tokenizer(tmp_path).ends == (tokenizer.end_of_text,)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": tokenizer.ends[1]}))
    found = load_tokenizer(tmp_path)
    assert found.ends == tokenizer.ends[1:] and sorted(found.files()) == FILES
    # What no token of the vocabulary is ends nothing.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 50256}))
    assert load_tokenizer(tmp_path).ends == (tokenizer.end_of_text,)


def test_a_run_keeps_those_of_the_model_that_it_began_from(
    tokenizer: Tokenizer, directory: Path, tmp_path: Path
) -> None:
    """Where the data name the same tokenizer by a file that stands alone."""
    alone = from_bytes(tokenizer.to_bytes())
    source: Any = SimpleNamespace(tokenizer_file=lambda: directory / "tokenizer.json")
    data: Any = Data(train=None, validation={}, tokenizer=alone)  # type: ignore[arg-type]
    assert_kept(with_companions(data, None, source).tokenizer, tokenizer)
    tokenizer.save(tmp_path / "7")
    (tmp_path / "7" / "manifest.json").write_text("{}")
    assert_kept(with_companions(data, tmp_path, None).tokenizer, tokenizer)
    assert with_companions(data, None, None).tokenizer is alone
    other = dataclasses.replace(data, tokenizer=load_tokenizer("bytes"))
    assert with_companions(other, None, source).tokenizer is other.tokenizer
    with pytest.raises(NoTemplate, match="has no chat template"):
        render_chat(alone, TALK)


def test_answering_messages(chat_model: mt.Model, tokenizer: Tokenizer) -> None:
    how = {"max_tokens": 4, "temperature": 0.0}
    found = chat_model.chat(TALK, samples=2, **how)
    assert found == chat_model.generate([encode_chat(tokenizer, TALK)], samples=2, **how) and len(found) == 2
    with pytest.raises(UserError, match=r"^messages, tools cannot be a template's own variable"):
        render_chat(tokenizer, TALK, variables={"tools": [], "x": 1, "messages": []})
    with pytest.raises(UserError, match="no tokenizer"):
        mt.Model(chat_model.config, chat_model.params, None).chat(TALK)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', "chat_template is no text and no list"),
        ("tokenizer_config.json", '{"chat_template": {"a": 1}}', "chat_template is no text and no list"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "a", "template": 1}]}',
            "a template in chat_template is",
        ),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id is '</s>'; expected a token id or a list"),
        ("generation_config.json", '{"eos_token_id": [1, true]}', "expected a token id or a list"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_damaged_files_are_named(directory: Path, tmp_path: Path, name: str, content: Any, said: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and said in str(caught.value)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model_type": "llama", "eos_token_id": "</s>"}', "[" * 100_000, b"\xff\xfe"]
)
def test_a_damaged_config_json_is_none(directory: Path, tmp_path: Path, content: str | bytes) -> None:
    """It is the model's, or another program's: with the tokenizer nothing is wrong."""
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = load_tokenizer(tmp_path)
    assert found.companions == Companions() and found.ends == (found.end_of_text,)


# ----------------------------------------------------------------------------------------------------------- too large


def test_a_tokenizer_larger_than_the_vocabulary(tokenizer: Tokenizer, directory: Path, tmp_path: Path) -> None:
    """Refused wherever the model is opened or a run begins, with both numbers."""
    cfg = small("llama", n_vocab=tokenizer.n_vocab - 1)
    mt.Model(cfg, params_of(cfg), None).save(tmp_path / "model", format="huggingface")
    for name in FILES:
        if name != "generation_config.json":
            (tmp_path / "model" / name).write_bytes((directory / name).read_bytes())
    # The certificate does not know them.
    (tmp_path / "model" / "conversion.json").unlink(missing_ok=True)
    said = rf"the tokenizer tokenizer\.json has {tokenizer.n_vocab} ids but model\.n_vocab is {cfg.n_vocab}"
    with pytest.raises(DataError, match=said):
        mt.load(tmp_path / "model")
    with pytest.raises(DataError, match=said):
        api.tokenizer_of(open_weights(tmp_path / "model"))
    with pytest.raises(DataError, match=said):
        tokenizer_for_data(str(directory), {}, cfg.n_vocab)
    with pytest.raises(DataError, match=said):
        tokenizer_for_data(None, {}, cfg.n_vocab, tokenizer)
    # Another tokenizer may be given.
    assert mt.load(tmp_path / "model", tokenizer="bytes").tokenizer is load_tokenizer("bytes")


def test_a_sentencepiece_model_without_a_tokenizer_json(tmp_path: Path) -> None:
    """It is not taken for a model of bytes."""
    cfg = small("llama", n_vocab=300)
    mt.Model(cfg, params_of(cfg), None).save(tmp_path / "model", format="huggingface")
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(
        DataError, match=r"tokenizer\.model: is not read here, and there is no tokenizer\.json beside it"
    ):
        mt.load(tmp_path / "model")
    assert mt.load(tmp_path / "model", tokenizer="bytes").tokenizer is not None


def test_no_companions_by_default() -> None:
    assert load_tokenizer("gpt2").companions == Companions() and load_tokenizer("gpt2").ends == (50256,)
    assert list(load_tokenizer("bytes").files()) == ["tokenizer.json"] and load_tokenizer("bytes").begin == ()
