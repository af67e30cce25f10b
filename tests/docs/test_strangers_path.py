"""A stranger's path: from an empty folder to a served, fine-tuned model by the commands of the documents alone.

The pages are followed one after another in the same folder. Nothing is there but the installed command.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from document_blocks import ROOT, blocks_of
from document_runner import Reader

import mesh_transformer as mt

pytestmark = pytest.mark.long
PATH = ("getting-started.md", "fine-tune-gpt-j.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stranger")
    reader = Reader(folder, compile_quickly=False, servers=True)
    for page in PATH:
        blocks = blocks_of(ROOT / "docs" / page)
        assert not [block.place for block in blocks if "needs" in block.says], "a stranger has nothing"
        reader.read(blocks)
    return folder


def held_out(run: Path) -> list[float]:
    """The validation losses of a run, in nats a token."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "validation" in line]


def test_the_first_model_learned(folder: Path) -> None:
    losses = held_out(folder / "runs" / "first")
    assert losses[-1] < losses[0] - 0.5


def test_the_tuned_one_knows_its_text(folder: Path) -> None:
    """Six of a sentence's words are drawn, 9.2 nats, and it has about 25 tokens: 0.37 nats a token at the best."""
    assert 0.36 < held_out(folder / "runs" / "diary")[-1] < 0.5
    first, tuned = (mt.load(folder / "runs" / name) for name in ("first", "diary"))
    sentence = ("On Monday the", " goose ate 5 apples near the river.")
    assert tuned.log_likelihood(*sentence)[0] > first.log_likelihood(*sentence)[0] + 20
    text = tuned.generate("On Monday the", max_tokens=24, temperature=0.0)[0].text
    assert any(text.startswith(f" {bird} ") for bird in ("goose", "duck", "swan", "heron")), text


def test_what_was_given_away_is_what_was_trained(folder: Path) -> None:
    tokens = [list(range(20))]
    ours, theirs = (mt.load(folder / name).logits(tokens) for name in ("runs/diary", "diary-hf"))
    assert abs(ours - theirs).max() < 1e-5


def test_gpt_j_was_tuned_in_every_way(folder: Path) -> None:
    for name in ("letters", "letters-adapter", "letters-8"):
        assert held_out(folder / "runs" / name), name
    assert (folder / "letters-peft" / "adapter_model.safetensors").exists()
    assert (folder / "letters-int8" / "quantized.json").exists()
    assert (folder / "letters-legacy" / "meta.json").exists()


def test_both_pages_served(folder: Path) -> None:
    """The last server's log; that it answered is tested by `curl` itself, which fails on an error."""
    assert "ready after" in (folder / ".server").read_text()
