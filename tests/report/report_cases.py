"""A fine-tune with three validation sets and two evaluated tasks, whose names and texts would like to be markup."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import DataConfig, EvaluateConfig, LogConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.data.tfrecord import write_records
from mesh_transformer.train.init_from import InitFrom
from mesh_transformer.train.loop import Silence
from mesh_transformer.train.run import train

T = 48
MODEL = ModelConfig(n_layers=1, d_model=64, n_heads=2, d_ff=128, n_vocab=264, n_ctx=T, d_rotary=16)
TEXT = "The <b>goose</b> & the 'gander' fly;\n\"home\" <script>alert(1)</script> they cry. \u202eHonk\u2028 "
EVIL = "<img src=x onerror=alert(2)>"
SETS = ("near", "far", EVIL)


def rows_of(n: int, seed: int) -> np.ndarray:
    """int64 [n, T + 1]: bytes of the text's words in an order of their own, as the bytes tokenizer reads them."""
    random = np.random.default_rng(seed)
    words = TEXT.split(" ")
    found = []
    for _ in range(n):
        text = b""
        while len(text) <= T:
            text += str(random.choice(words)).encode() + b" "
        found.append(np.frombuffer(text[: T + 1], np.uint8))
    return np.stack(found).astype(np.int64)


class Runs:
    """A base model and a run that begins from it; `make` makes both."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name, rows in {"general": rows_of(40, 1), "few": rows_of(4, 2), "near": rows_of(9, 3)}.items():
            write_records(directory / f"{name}.tfrecords", rows)
        masked = rows_of(9, 4)
        masked[:, :10] = ~masked[:, :10]  # prompts, which are not learned
        write_records(directory / "far.tfrecords", masked)
        self.base = self._run("base", "general", steps=20, learning_rate=5e-3, checkpoint_every=10)
        tuned = self._run("tuned & <i>", "few", steps=60, learning_rate=1e-2)
        self.tuned = dataclasses.replace(tuned, evaluate=EvaluateConfig(tasks=("geese", EVIL), every=20))

    def make(self) -> None:
        train(self.base, Silence())
        train(self.tuned, Silence(), init_from=InitFrom(model=str(self.base.run_directory)), evaluate=_evaluation)

    def _run(self, name: str, data: str, **of_train: Any) -> RunConfig:
        sets = dict(zip(SETS, ("near", "far", "near"), strict=True))
        usual = {"batch_size": 4, "gradient_accumulation": 2, "validate_every": 10, "checkpoint_every": 60}
        return RunConfig(
            name=name,
            model=MODEL,
            data=DataConfig(
                train=str(self.directory / f"{data}.tfrecords"),
                validation={name: str(self.directory / f"{where}.tfrecords") for name, where in sets.items()},
                tokenizer="bytes",
                sequence_length=T,
            ),
            train=TrainConfig(**(usual | of_train)),
            mesh=MeshConfig(data=1),
            log=LogConfig(directory=str(self.directory / "runs")),
        )


def _evaluation(run: RunConfig, *_: Any) -> Any:
    """In place of lm-evaluation-harness: a task that gets better."""
    asked = iter(range(100))

    def evaluate(_: Any) -> Mapping[str, Mapping[str, float]]:
        better = next(asked) * 0.125
        return {
            "geese": {"acc": 0.25 + better, "acc_stderr": 0.0625},
            EVIL: {"perplexity": 9.0 - better, "perplexity_stderr": float("nan")},
        }

    return evaluate


class Page(HTMLParser):
    """What a browser would find: sections by their headings, tags, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.sections: dict[str, str] = {"": ""}
        self.open: list[str] = []
        self._heading, self._in_heading = "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "h2":
            self._heading, self._in_heading = "", True

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        if tag == "h2":
            self._in_heading = False
            self.sections[self._heading] = ""

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self._heading += data
        elif not self.open or self.open[-1] != "style":
            self.sections[self._heading] += data


@dataclasses.dataclass(frozen=True)
class Written:
    """A report: its file, its text, its parts and what was said while it was made."""

    file: Path
    text: str
    page: Page
    notes: list[str]
