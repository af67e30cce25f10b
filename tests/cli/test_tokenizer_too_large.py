"""A tokenizer with more ids than the model is refused by every command that opens both, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import family_tokenizers
import mesh_transformer as mt
from mesh_transformer.data.tokenizer import load_tokenizer
from small_families import params_of, small


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama of 300 ids in the working directory, with a tokenizer.json of more."""
    cfg = small("llama", n_vocab=300)
    mt.Model(cfg, params_of(cfg), None).save(tmp_path / "model", format="huggingface")
    family_tokenizers.write(tmp_path / "tokenizer", "mistral")
    (tmp_path / "model" / "tokenizer.json").write_bytes((tmp_path / "tokenizer" / "tokenizer.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "model", "target", "--to", "native"],
        ["convert", "model", "target", "--to", "huggingface"],
        ["convert", "model", "target", "--to", "native", "--tokenizer", "tokenizer"],
        ["generate", "model", "--prompt", "a"],
        ["serve", "model", "--port", "0"],
        ["inspect", "model"],
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[3:]),
)
def test_refused(command: Any, model: Path, arguments: list[str]) -> None:
    before = sorted(path.name for path in model.parent.rglob("*"))
    ended = command.call(*arguments)
    assert ended.status == 2 and len(ended.err.splitlines()) <= 2, ended
    n_vocab = load_tokenizer(model.parent / "tokenizer").n_vocab
    assert f"the tokenizer tokenizer.json has {n_vocab} ids but model.n_vocab is 300" in ended.err
    assert "or another tokenizer" in ended.err
    assert sorted(path.name for path in model.parent.rglob("*")) == before
