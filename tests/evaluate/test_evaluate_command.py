"""`mesh-transformer evaluate` without lm-evaluation-harness: perplexity of a text, and everything that it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mesh_transformer as mt
from mesh_transformer import compat
from mesh_transformer.cli.main import main
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.model.params import abstract_params

CFG = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=264, n_ctx=32, d_rotary=4)
TEXT = "A text of some words.\nIt goes on beyond what the context holds at one time.\n"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`mesh-transformer evaluate ARGUMENTS` in this process: status, output, errors."""
    monkeypatch.setattr(compat, "prepare_process", lambda: None)
    monkeypatch.setattr(compat, "use_compile_cache", lambda: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mesh-transformer", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = np.random.default_rng(1)
    params: Any = jax.tree.map(
        lambda a: jnp.asarray(0.3 * chosen.normal(size=a.shape), jnp.float32), abstract_params(CFG)
    )
    path = tmp_path_factory.mktemp("model") / "small"
    mt.Model(CFG, params, load_tokenizer("bytes")).save(path)
    return path


def test_a_text(call: Call, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    output = tmp_path / "new" / "results.json"
    status, out, err = call(model, "--text", tmp_path / "text.txt", "--output", output)
    assert status == 0, err
    found = json.loads(output.read_text())["text"]
    opened, windows = mt.load(model), [TEXT[:32], TEXT[32:64], TEXT[64:]]
    # Windows of bytes: each after the last byte of the one before, the last after as much as the context holds.
    contexts = ["<|endoftext|>", TEXT[31], TEXT[len(TEXT) - 33 : 64]]
    ids = [[256], [ord(contexts[1])], [*contexts[2].encode()]]
    logits = [opened.logits([[*a, *b.encode()][:-1]])[0] for a, b in zip(ids, windows, strict=True)]
    total = 0.0
    for context, window, row in zip(ids, windows, logits, strict=True):
        here = row[len(context) - 1 :].astype(np.float64)
        chosen = here[range(len(window)), [*window.encode()]]
        total += float((chosen - np.log(np.exp(here).sum(-1))).sum())
    assert found["log_likelihood"] == pytest.approx(total, abs=1e-3)
    assert found["tokens"] == found["bytes"] == len(TEXT) and found["words"] == 17
    assert f"{found['bits_per_byte']:.4f} bits a byte" in out and f"{len(TEXT):,} tokens" in out
    assert str(output) in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate; give --tasks A,B or --text FILE"),
        (["--device", "cpu"], "--device is not taken here: JAX chooses it"),
        (
            ["--apply_chat_template", "--tasks", "a"],
            "--apply_chat_template is not taken here: tasks are asked in plain text",
        ),
        (["--use_cache", "x"], "--use_cache is not taken here; lm-eval's own command takes it:"),
        (["--num-fewshoot=3"], "no such option: --num-fewshoot\nsee: mesh-transformer evaluate --help"),
        (["--tasks", "a", "b"], "unexpected argument: b; several tasks are joined by commas"),
        (["--text", "absent.txt", "--legacy-prompts"], "--legacy-prompts is for tasks, and none is named"),
        (["--text", "absent.txt", "--num_fewshot", "0"], "--num-fewshot is for tasks, and none is named"),
        (["--text", "absent.txt"], "--text absent.txt: cannot be read as UTF-8 text"),
        (["--tasks", "a", "--log_samples"], "write answers beside the results; give --output F.json too"),
        (["--tasks", "a", "--output", "."], "--output . is a directory; expected a file, for example results.json"),
        (["--tasks", "a", "--batch_size", "0"], "--batch-size 0: expected auto or a whole number of at least 1"),
        (["--tasks", "a", "--limit", "-2"], "--limit -2: expected a number of questions"),
        (["--tasks", "a", "--limit", "1.5"], "--limit 1.5: expected a whole number"),
        (["--tasks", "a", "--seed", "1,2"], "--seed 1,2: expected one whole number, or four"),
        (["--tasks", "a", "--gen_kwargs", "temperature"], "--gen-kwargs temperature: temperature has no value"),
        (["--tasks", "a", "--gen_kwargs", "{x"], "--gen-kwargs {x: is not JSON"),
        (["--tasks", "a", "--samples", "absent.json"], "--samples absent.json: neither JSON nor a file of it"),
        (["--tasks", "a", "--samples", '{"a": 1}'], 'expected {"task": [0, 5]}'),
        (["--tasks", "a", "--samples", "{}", "--limit", "2"], "--samples and --limit both say which questions"),
    ],
)
def test_refused(call: Call, arguments: list[str], message: str) -> None:
    status, out, err = call("no-model", *arguments)
    assert status == 2 and not out and message in err and err.startswith("error: ")


def test_text_that_is_none(call: Call, model: Path, tmp_path: Path) -> None:
    for content, message in ((b" \n", "nothing but white space"), (b"\xff\xfe", "cannot be read as UTF-8 text")):
        (tmp_path / "text.txt").write_bytes(content)
        status, _, err = call(model, "--text", tmp_path / "text.txt")
        assert status == 2 and message in err


def test_the_harness_is_missing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    status, out, err = call("no-model", "--tasks", "piqa")
    assert status == 2 and not out and len(err.splitlines()) == 2
    assert "lm-evaluation-harness, which is not installed\ninstall it: pip install 'mesh-transformer[eval]'" in err
