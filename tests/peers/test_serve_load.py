"""Many streaming clients, a part of which vanish, against the real server; and beside Hugging Face's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.tiny_model import CFG, save_tiny_model
from mesh_transformer.bench.load_plan import Plan, Span

pytestmark = pytest.mark.peers

START_SECONDS = 600  # for servers, on a machine that is busy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("load") / "model")


def bench_load(model: Path, *words: object, seconds: float) -> dict[str, Any]:
    """The result of a run in which nothing is wrong."""
    line = [sys.executable, "-m", "mesh_transformer", "bench", "load", model, "--max-batch", 4, "--json"]
    line += ["--seconds", seconds, *words]
    # One device in place of the tests' eight; compiled with little care, and so in less time.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment["MESH_TRANSFORMER_CACHE"] = str(model.parent / "cache")
    done = subprocess.run(
        list(map(str, line)), capture_output=True, text=True, env=environment, timeout=START_SECONDS + 3 * seconds
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["faults"] == []
    return result


def check(load: dict[str, Any]) -> None:
    """Nothing failed, and everything is free again."""
    assert load["failures"] == load["warmup_failures"] == {}
    assert load["requests"] == load["done"] + load["vanished"] + load["refused"]
    assert load["seconds_until_idle"] is not None
    assert load["counters"]["engine_step_failures"] == 0
    assert load["counters"]["generated_tokens"] >= load["output_tokens"] > 0
    assert load["repeated_alone"]["equal"] == load["repeated_alone"]["asked"] > 0


def test_a_short_load(model: Path) -> None:
    result = bench_load(model, "--clients", 16, "--vanish", 0.3, seconds=10)
    load = result["load"]
    check(load)
    assert load["refused"] == 0 and load["done"] > 16 and load["vanished"] > 0
    assert result["server_status"] == 0


def test_beside_others(model: Path) -> None:
    result = bench_load(
        model, "--clients", 4, "--one-by-one", "--against", "hf", "--rounds", 1, "--compare-seconds", 1, seconds=1
    )  # fmt: skip
    names = ["ours", "ours one by one", "hf one by one", "hf in batches"]
    assert list(result["comparison"]["turns"]) == names
    for name, (turn,) in result["comparison"]["turns"].items():
        assert turn["done"] == turn["requests"] > 0, name
    assert list(result["comparison"]["ratios"]) == [f"ours over {name}" for name in names[1:]]


def test_batches_of_the_peer_are_right(model: Path) -> None:
    """A fast peer that writes nonsense would be no peer: likeliest tokens, in a padded batch as alone."""
    directory = model.parent / "hf"
    convert = [sys.executable, "-m", "mesh_transformer", "convert", model, directory, "--to", "huggingface"]
    subprocess.run(convert, check=True, capture_output=True)
    import torch

    from mesh_transformer.bench.hf_server import Generator

    generator = Generator(str(directory), 4)
    plan = Plan(seed=0, n_ids=CFG.n_vocab, prompt_tokens=Span(2, 20), output_tokens=Span(3, 20))
    # A temperature at which only the likeliest is left.
    bodies = [plan.request(i).body(False) | {"temperature": 1e-4} for i in range(4)]
    assert len({len(body["prompt"]) for body in bodies}) > 1
    together = [answer["choices"][0]["tokens"] for answer in generator.complete(bodies)]
    assert [len(tokens) for tokens in together] == [body["max_tokens"] for body in bodies]
    for body, tokens in zip(bodies, together, strict=True):
        assert generator.ask(body)["choices"][0]["tokens"] == tokens
        prompt = torch.tensor([body["prompt"]])
        alone = generator._model.generate(prompt, do_sample=False, max_new_tokens=body["max_tokens"])
        assert alone[0, len(body["prompt"]) :].tolist() == tokens


@pytest.mark.long
def test_a_long_load(model: Path) -> None:
    """64 clients and as many places in the queue: nothing is refused."""
    result = bench_load(model, "--clients", 64, "--max-queue", 64, seconds=300)
    check(result["load"])
    assert result["load"]["refused"] == 0 and result["load"]["memory"]["flat"]


@pytest.mark.long
def test_a_long_load_with_a_short_queue(model: Path) -> None:
    """Some are refused, with the time to come again, and nothing else happens."""
    result = bench_load(model, "--clients", 64, "--max-queue", 8, seconds=60)
    check(result["load"])
    assert result["load"]["refused"] > 0
