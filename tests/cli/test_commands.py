"""prepare, train, inspect, generate and going on, as a user meets them, on a tiny model."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pty
import random
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mesh_transformer as mt
from mesh_transformer import api
from mesh_transformer.checkpoint.digest import digest
from mesh_transformer.cli import console
from mesh_transformer.data.source import open_source


@pytest.fixture(scope="module", autouse=True)
def load_once() -> Iterator[None]:
    """A model that was loaded is loaded: every new one would compile its programs again."""
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(api.load)

        def load(path: Any, **options: Any) -> mt.Model:
            return once(str(path), **{name: value for name, value in options.items() if value is not None})

        patch.setattr(api, "load", load)
        yield


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def generate(command: Any, place: Any, *arguments: object) -> list[dict[str, Any]]:
    ended = command.call("generate", place.run, "--json", "--ignore-eos", *arguments)
    assert ended.status == 0 and re.fullmatch(r"(tokens: .*\n)*", ended.err)  # where it takes long, lines say how far
    return [json.loads(line) for line in ended.out.splitlines()]


# ------------------------------------------------------------------------------------------------ prepare and train


def test_prepare_says_what_it_made(place: Any) -> None:
    first, sequences, held_out, dropped, *_ = place.prepared.out.splitlines()
    text = (place.path / "text.txt").read_text()
    n_tokens = len(text.replace("<|endoftext|>", "")) + 300  # bytes, and an end after each of 300 documents
    assert first == f"300 documents, {n_tokens:,} tokens"
    n_train, n_held_out = (len(open_source(str(place.path / "data" / name), sequence_length=32, n_vocab=257))
                           for name in ("tiny.index", "tiny.val.index"))  # fmt: skip
    assert sequences.startswith(f"{n_train:,} sequences in ") and sequences.endswith(f"listed in {place.index}")
    assert held_out.startswith(f"{n_held_out:,} sequences of 30 documents")
    assert dropped == f"dropped: {n_tokens - 33 * (n_train + n_held_out)} tokens that did not fill a last sequence, " \
                      "0 sequences with too few distinct tokens"  # fmt: skip
    assert place.prepared.err == ""


def test_prepare_overwrites_only_when_told(command: Any, place: Any, tmp_path: Path) -> None:
    arguments = ["prepare", place.path / "text.txt", "--out", tmp_path / "d", "--tokenizer", "bytes"]
    first = command.call(*arguments, "--sequence-length", 64)
    assert first.status == 0
    again = command.call(*arguments, "--sequence-length", 128, "--overwrite", "--preserve-data-order")
    assert again.status == 0
    (record,) = tmp_path.glob("*.tfrecords")
    assert (tmp_path / "d.index").read_text().strip() == record.name
    source = open_source(str(tmp_path / "d.index"), sequence_length=128, n_vocab=257)
    text = (place.path / "text.txt").read_text().split("<|endoftext|>")
    ids = [i for document in text for i in [*document.encode(), 256]]
    np.testing.assert_array_equal(source[0], ids[:129])
    np.testing.assert_array_equal(source[len(source) - 1], ids[129 * (len(source) - 1) : 129 * len(source)])


def test_a_run_directory_holds_what_it_should(place: Any) -> None:
    found = {p.name for p in place.run.iterdir()}
    assert found == {"config.toml", "metrics.jsonl", "checkpoints", "loss.png", ".lock", "tensorboard"}
    assert sorted(p.name for p in (place.run / "checkpoints").iterdir()) == ["2", "4"]
    resolved = tomllib.loads((place.run / "config.toml").read_text())
    assert resolved["model"]["n_layers"] == 2 and resolved["data"]["train"] == str(place.index)
    assert (place.run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics(place: Any) -> None:
    lines = lines_of(place.run / "metrics.jsonl")
    training = [line for line in lines if "validation" not in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    expected = {"step", "loss", "last_loss", "z_loss", "total_loss", "grad_norm", "learning_rate", "tokens",
                "tokens_per_second", "step_time"}  # fmt: skip
    for line in training:
        assert expected <= line.keys() <= expected | {"mfu"}
        assert line["tokens"] == line["step"] * 4 * 32
        assert line["total_loss"] == pytest.approx(line["loss"] + line["z_loss"], rel=1e-5)
    validation = [line for line in lines if "validation" in line]
    assert [(line["step"], line["validation"]) for line in validation] == [(2, "held_out"), (4, "held_out")]
    for line in validation:
        assert set(line) == {"step", "validation", "loss", "perplexity"}
        assert line["perplexity"] == pytest.approx(np.exp(line["loss"]))
    assert validation[1]["loss"] < training[0]["loss"] - 1


def test_without_a_terminal_progress_is_plain_lines(place: Any) -> None:
    assert place.trained.out == ""
    lines = place.trained.err.splitlines()
    assert lines[0] == "compiling" and lines[-1] == f"done: step 4; see {place.run}"
    assert any("step 1/4" in line and "loss" in line for line in lines)
    assert any("step 4/4  held_out: loss" in line for line in lines)
    assert "\x1b" not in place.trained.err and "\r" not in place.trained.err


def test_going_on(command: Any, place: Any, tmp_path: Path) -> None:
    for name in ("data", "runs", "tiny.toml"):
        copy = shutil.copytree if (place.path / name).is_dir() else shutil.copy
        copy(place.path / name, tmp_path / name)
    before = (tmp_path / "runs/tiny/metrics.jsonl").read_text()

    complete = command.call("train", tmp_path / "tiny.toml")
    assert complete.status == 0
    assert "complete at step 4" in complete.err and "raise train.steps" in complete.err
    assert (tmp_path / "runs/tiny/metrics.jsonl").read_text() == before

    more = command.start("train", "tiny.toml", "--set", "train.steps=6", cwd=tmp_path)
    assert more.status == 0, more.err
    assert "going on from checkpoint 4" in more.err
    after = (tmp_path / "runs/tiny/metrics.jsonl").read_text()
    assert after.startswith(before)
    assert [line["step"] for line in lines_of(tmp_path / "runs/tiny/metrics.jsonl") if "validation" not in line] == [
        1, 2, 3, 4, 5, 6,
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "runs/tiny/checkpoints").iterdir()) == ["2", "4", "6"]
    change = lines_of(tmp_path / "runs/tiny/changes.jsonl")[-1]
    assert change["step"] == 4 and change["changed"]["train.steps"] == [4, 6]


def test_the_originals_configuration(command: Any, place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flat JSON as it stands; data/ is in the working directory, runs are kept on this disk."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for file in (place.path / "data").glob("tiny*"):
        shutil.copy(file, tmp_path / "data")
    original = {
        "layers": 1, "d_model": 32, "n_heads": 4, "n_vocab": 264, "norm": "layernorm", "pe": "rotary",
        "pe_rotary_dims": 4, "seq": 32, "cores_per_replica": 1, "per_replica_batch": 2, "tpu_size": 1,
        "gradient_accumulation_steps": 2, "warmup_steps": 1, "anneal_steps": 2, "lr": 1e-2, "end_lr": 1e-3,
        "weight_decay": 0.1, "total_steps": 3, "bucket": "models", "model_dir": "small", "train_set": "tiny.index",
        "val_set": {"held": "tiny.val.index"}, "val_batches": 2, "val_every": 3, "ckpt_every": 3, "keep_every": 3,
        "eval_harness_tasks": [], "name": "small", "wandb_project": "", "comment": "",
    }  # fmt: skip
    (tmp_path / "small.json").write_text(json.dumps(original))
    ended = command.start("train", "small.json", "--set", "log.directory=runs")
    assert ended.status == 0, ended.err
    run = tmp_path / "runs" / "small"
    assert ended.err.endswith(f"done: step 3; see {run}\n")
    training = [line for line in lines_of(run / "metrics.jsonl") if "validation" not in line]
    assert [(line["step"], line["tokens"]) for line in training] == [(1, 128), (2, 256), (3, 384)]
    assert training[0]["learning_rate"] == 0 and training[1]["learning_rate"] == pytest.approx(1e-2)
    assert [line["validation"] for line in lines_of(run / "metrics.jsonl") if "validation" in line] == ["held"]
    facts = json.loads(command.call("inspect", run, "--json").out)
    assert (facts["step"], facts["model"]["n_layers"], facts["model"]["d_rotary"]) == (3, 1, 4)


# ----------------------------------------------------------------------------------------------------------- inspect


def test_inspect(command: Any, place: Any) -> None:
    ended = command.call("inspect", place.run)
    assert (ended.status, ended.err) == (0, "")
    for line in ("format: native", "family: gptj", "step: 4", "parameters: 165,440", "tokenizer: bytes",
                 "  n_layers = 2", f"path: {place.run / 'checkpoints' / '4'}"):  # fmt: skip
        assert line in ended.out.splitlines()
    assert "float32   layers 2, embed 64, heads 4, head_dim 16" in ended.out


def test_inspect_as_json(command: Any, place: Any) -> None:
    ended = command.call("inspect", place.run, "--json", "--digest")
    facts = json.loads(ended.out)
    model = mt.load(place.run)
    assert facts["digest"] == digest(model.config, model.params)
    assert facts["model"] == model.config.to_dict()
    assert facts["bytes"] == 4 * facts["parameters"] == 4 * 165440
    shapes = {name: entry["shape"] for name, entry in facts["tensors"].items()}
    assert shapes["embed/tokens"] == [512, 64] and sum(int(np.prod(s)) for s in shapes.values()) == 165440
    assert json.loads(command.call("inspect", place.run, "--json", "--step", "2").out)["step"] == 2


def test_the_digest_alone(command: Any, place: Any, tmp_path: Path) -> None:
    ended = command.call("inspect", place.run, "--digest")
    assert len(bytes.fromhex(ended.out.strip())) == 32
    for kind in ("native", "huggingface"):
        mt.load(place.run).save(tmp_path / kind, format=kind)
        assert command.call("inspect", tmp_path / kind, "--digest").out == ended.out
    assert command.call("inspect", place.run, "--digest", "--step", "2").out != ended.out


# ---------------------------------------------------------------------------------------------------------- generate


def test_generate_writes_prompt_and_completion(command: Any, place: Any) -> None:
    arguments = ["generate", place.run, "--prompt", "the ", "--max-tokens", 12, "--temperature", 0, "--ignore-eos"]
    ended = command.call(*arguments)
    expected = mt.load(place.run).generate("the ", max_tokens=12, temperature=0.0, ignore_eos=True)[0].text
    assert (ended.status, ended.err) == (0, "")
    assert ended.out == f"the {expected}\n"
    assert command.call(*arguments, "--stream").out == ended.out


def test_several_prompts_and_samples(command: Any, place: Any) -> None:
    both = ["--prompt", "the cat", "--prompt", "a", "--samples", 2, "--max-tokens", 8]
    records = generate(command, place, *both, "--seed", 5)
    assert [(r["prompt"], r["sample"]) for r in records] == [("the cat", 0), ("the cat", 1), ("a", 0), ("a", 1)]
    assert all(len(r["tokens"]) == 8 and r["finish_reason"] == "length" for r in records)
    assert len({r["text"] for r in records}) == 4
    assert generate(command, place, *both, "--seed", 5) == records, "the same seed writes the same text"
    assert generate(command, place, *both, "--seed", 6) != records
    # Neither does it depend on what else is asked for.
    assert generate(command, place, "--prompt", "a", "--max-tokens", 8, "--seed", 5)[0] == records[2]
    text = command.call("generate", place.run, *both, "--seed", 5, "--ignore-eos").out
    assert "--- prompt 1, sample 2 ---\nthe cat" + records[1]["text"] in text
    assert text.count("--- prompt") == 4


def test_a_prompt_from_a_file(command: Any, place: Any, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("the cat\nsat é", encoding="utf-8")
    (record,) = generate(command, place, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 2)
    assert record["prompt"] == "the cat\nsat é"
    given = generate(command, place, "--prompt", "the cat\nsat é", "--max-tokens", 2)
    assert given == [record]


def test_stop(command: Any, place: Any) -> None:
    ask = ["--prompt", "the ", "--temperature", 0, "--max-tokens", 12]
    (whole,) = generate(command, place, *ask)
    stop = whole["text"][3:5]
    (cut,) = generate(command, place, *ask, "--stop", "\x00", "--stop", stop)
    assert cut["text"] == whole["text"][: whole["text"].find(stop)] and cut["finish_reason"] == "stop"


def test_a_step_and_a_dtype(command: Any, place: Any) -> None:
    ask = ["--prompt", "the ", "--temperature", 0, "--max-tokens", 5]
    model = mt.load(place.run, step=2, dtype="bf16")
    expected = model.generate("the ", max_tokens=5, temperature=0.0, ignore_eos=True)[0]
    assert generate(command, place, *ask, "--step", 2, "--dtype", "bf16")[0]["tokens"] == expected.tokens


def test_a_reader_that_leaves_is_no_error_of_ours(command: Any, place: Any) -> None:
    line = [sys.executable, "-m", "mesh_transformer", "inspect", str(place.run)]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=command.environment
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(60) == 1


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: object, env: dict[str, str]) -> None:
        ours, theirs = pty.openpty()
        line = [sys.executable, "-m", "mesh_transformer", *map(str, arguments)]
        self.process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=env, close_fds=True)
        os.close(theirs)
        self._terminal = ours

    def read_until(self, end: str, seconds: float = 60) -> str:
        """What is written until `end`, which must come."""
        text, last = "", time.monotonic() + seconds
        while not text.endswith(end):
            ready, _, _ = select.select([self._terminal], [], [], max(0, last - time.monotonic()))
            assert ready, f"waited for {end!r}, got {text!r}"
            text += os.read(self._terminal, 1).decode("utf-8", "replace")
        return text.replace("\r\n", "\n")

    def write(self, data: bytes) -> None:
        os.write(self._terminal, data)

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self._terminal)


def test_an_interactive_session(command: Any, place: Any) -> None:
    ask = ["--max-tokens", 6, "--temperature", 0, "--ignore-eos"]
    expected = mt.load(place.run).generate("the ", max_tokens=6, temperature=0.0, ignore_eos=True)[0].text
    session = Terminal("generate", place.run, *ask, env=command.environment)
    try:
        greeting = session.read_until("> ")
        assert "Ctrl-D" in greeting and len(greeting.splitlines()) == 2
        session.write(b"the \n")
        assert session.read_until("> ") == f"the \nthe {expected}\n> "
        session.write(b"x" * 129 + b"\n")
        assert "error: the prompt has 129 tokens" in session.read_until("> ")
        session.write(b"the \n")
        assert expected in session.read_until("> ")
        session.write(b"\x04")  # end of file
    finally:
        assert session.close() == 0


class TerminalText(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("in_bytes", [False, True])
def test_progress_on_a_terminal_is_a_bar_for_what_takes_long(in_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = TerminalText()
    monkeypatch.setattr(sys, "stderr", shown)
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(console, "time", types.SimpleNamespace(monotonic=lambda: next(clock) / 2))
    with console.StageDisplay(in_bytes=in_bytes) as display:
        display.progress("tokenizing", 1, 4_000_000)
        display.progress("tokenizing", 2, 4_000_000)
        assert not shown.getvalue()
        display.progress("tokenizing", 3, 4_000_000)
        display.progress("tokenizing", 4_000_000, 4_000_000)
    assert "tokenizing" in shown.getvalue() and "100%" in shown.getvalue()
    assert ("4.0/4.0 MB" in shown.getvalue()) == in_bytes


# ------------------------------------------------------------------------------------------------------------ the demo


@pytest.mark.long
def test_demo(command: Any, tmp_path: Path) -> None:
    first = command.start("demo", "--steps", "3", "--out", "demo", cwd=tmp_path)
    assert first.status == 0, first.err
    run = tmp_path / "demo"
    for name in ("config.toml", "metrics.jsonl", "checkpoints/3/manifest.json", "loss.png", "samples.txt"):
        assert (run / name).is_file()
    assert [r["step"] for r in lines_of(run / "metrics.jsonl") if "validation" not in r] == [1, 2, 3]
    for told in ("held-out text", "unigram", "bigram", "tokens a second", "loss.png", "mesh-transformer generate"):
        assert told in first.out
    assert (run / "samples.txt").read_text() in first.out

    corpus = hashlib.sha256((run / "data" / "train.jsonl").read_bytes()).hexdigest()
    metrics = (run / "metrics.jsonl").read_bytes()
    again = command.start("demo", "--steps", "3", "--out", "demo", cwd=tmp_path)
    assert again.status == 0 and "complete at step 3" in again.err
    assert (run / "metrics.jsonl").read_bytes() == metrics
    more = command.start("demo", "--steps", "4", "--out", "demo", cwd=tmp_path)
    assert more.status == 0 and "going on from checkpoint 3" in more.err
    assert [r["step"] for r in lines_of(run / "metrics.jsonl") if "validation" not in r] == [1, 2, 3, 4]
    assert hashlib.sha256((run / "data" / "train.jsonl").read_bytes()).hexdigest() == corpus
    words = random.Random(0).choice(["def ", "import "])
    wrote = command.start("generate", "demo", "--prompt", words, "--max-tokens", "5", cwd=tmp_path)
    assert wrote.status == 0 and wrote.out.startswith(words)
