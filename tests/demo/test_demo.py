"""The demo in small: everything that it promises is there, and a second call goes on."""

import json
import math
from pathlib import Path

import pytest

from mesh_transformer import demo
from mesh_transformer.config.presets import PRESETS, preset
from mesh_transformer.data.corpus import Corpus, Document
from mesh_transformer.train.metrics import EvaluationMetrics, StepMetrics, ValidationMetrics


class Listener:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[StepMetrics] = []
        self.validations: list[ValidationMetrics] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def validation(self, metrics: ValidationMetrics) -> None:
        self.validations.append(metrics)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        raise AssertionError("the demo has no tasks")


def small_corpus() -> Corpus:
    texts = [f"def f{n}(x):\n    return x + {n}\n\n\nclass C{n}:\n    value = {n}\n" * 40 for n in range(40)]
    documents = [Document(f"m{n}.py", text) for n, text in enumerate(texts)]
    return Corpus(documents[:35], documents[35:])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "build_corpus", small_corpus)
    monkeypatch.setitem(PRESETS, "gpt-j-demo", preset("gpt-j-tiny"))
    monkeypatch.setattr(demo, "_SAMPLE_TOKENS", 8)


def test_demo(tmp_path: Path, small: None) -> None:
    out = tmp_path / "run"
    first = Listener()
    result = demo.run_demo(out, steps=4, seed=0, observer=first)
    assert result.step == 4 and result.stopped_by is None
    assert [m.step for m in first.steps] == [1, 2, 3, 4]
    for name in ("config.toml", "metrics.jsonl", "loss.png", "samples.txt", "checkpoints/4/manifest.json"):
        assert (out / name).exists(), name
    assert all(p in (out / "samples.txt").read_text() for p in demo.PROMPTS)

    loss = first.validations[-1].loss
    facts = json.loads((out / "data" / "facts.json").read_text())
    held_out_bytes = sum(len(d.text.encode()) for d in small_corpus().validation_documents)
    assert facts["bytes_per_token"] == pytest.approx(held_out_bytes / facts["held_out_tokens"])
    assert f"{loss:.4f}" in result.text
    assert f"{loss / math.log(2) / facts['bytes_per_token']:.4f}" in result.text
    assert "unigram" in result.text and "bigram" in result.text and "mesh-transformer generate" in result.text

    second = Listener()
    assert demo.run_demo(out, steps=6, seed=0, observer=second).step == 6
    assert [m.step for m in second.steps] == [5, 6]
    assert any("going on from checkpoint 4" in note for note in second.notes)
