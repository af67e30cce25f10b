"""`bench decode` and `bench serve` measure what they say; how fast anything is, is not tested."""

import importlib
import json
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import mesh_transformer as mt
from mesh_transformer.bench import contenders, decode, export, serve
from mesh_transformer.bench.export import Exported
from mesh_transformer.bench.work import prompts, texts, weight_bytes
from mesh_transformer.config.errors import RunError, UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.kernels import native
from mesh_transformer.model.params import count_matmul_params

TINY = preset("gpt-j-tiny")
BANDWIDTH = {"rows": 32, "columns": 64}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Random weights of the tiny architecture as Hugging Face's, by the module's own command."""
    target = tmp_path_factory.mktemp("weights") / "huggingface"
    before, sys.argv = sys.argv, ["export", json.dumps(TINY.to_dict()), str(target)]
    try:
        export.main()
    finally:
        sys.argv = before
    return target


@pytest.fixture
def here(monkeypatch, directory) -> None:
    """Contenders of this process on weights that are there, so that a test starts none of its own; no native kernels:
    they are chosen once a process.
    """

    @contextmanager
    def exported(model, **how):
        yield Exported(TINY, directory, None)

    def turns(specs, rounds, warmup, progress):
        made = {
            name: importlib.import_module(f"mesh_transformer.bench.{s['module']}").make(s) for name, s in specs.items()
        }
        answers = {name: [each.step() for _ in range(warmup + rounds)][warmup:] for name, each in made.items()}
        return {name: each.describe() for name, each in made.items()}, answers

    monkeypatch.setattr(native, "available", lambda: False)
    for module in (decode, serve):
        monkeypatch.setattr(module, "exported", exported)
        monkeypatch.setattr(module, "take_turns", turns)


def run_decode(**changed) -> dict:
    how = {"batch": 2, "prompt": 5, "tokens": 6, "precisions": ["float32"], "against": [], "rounds": 2, "warmup": 1}
    return decode.bench_decode(TINY, **how | {"progress": lambda line: None, "bandwidth": BANDWIDTH} | changed)


def test_ours_decodes(here) -> None:
    result = run_decode(precisions=["int8"])
    json.dumps(result, allow_nan=False)
    assert result["read_bytes_per_second"]["median"] > 0
    for name, figures in result["contenders"].items():
        assert figures["precision"] in name
        seconds, rate = figures["seconds"], figures["tokens_per_second"]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        assert rate["max"] == pytest.approx(2 * 6 / seconds["min"])
        assert figures["weight_bytes_per_step"] == weight_bytes(TINY, figures["precision"])
    first = next(iter(result["contenders"].values()))
    assert first["same_tokens"] == 2 * 6
    assert result["best"]["ours"] in result["contenders"] and "peers" not in result["best"]
    assert result["ratios"] == {}


def test_figures_come_from_the_turns() -> None:
    """Two turns of known times: 4 steps of 10 and 20 ms after 50 ms, in a program that reads at 1 GB/s."""
    answers = {"a": [{"first": 0.05, "whole": 0.05 + 4 * s, "tokens": [[1, 2, 3, 4, 5]]} for s in (0.01, 0.02)]}
    spec = {"batch": 1, "tokens": 5, "precision": "float32"}
    found = decode._figures(TINY, spec, answers, "a", 1e9)
    assert found["seconds_per_step"] == pytest.approx({"median": 0.015, "min": 0.01, "max": 0.02})
    assert found["decoded_tokens_per_second"] == pytest.approx(1 / 0.015)
    assert found["share_of_bandwidth"] == pytest.approx(4 * count_matmul_params(TINY) / 0.015 / 1e9)
    assert found["tokens_per_second"]["max"] == pytest.approx(5 / 0.09)
    answers["b"] = [{"first": 0.1, "whole": 0.3, "tokens": [[1, 2, 9, 4, 5]]}] * 2
    assert decode._figures(TINY, spec, answers, "b", 1e9)["same_tokens"] == 2
    assert contenders.ratios(answers, ["a"], ["b"])["a over b"]["max"] == pytest.approx(0.3 / 0.09)


def test_times_below_the_clock_have_no_share() -> None:
    """A generation that took no longer than its first token: nothing can be said of a step."""
    answers = {"a": [{"first": 0.05, "whole": 0.04, "tokens": [[1, 2]]}]}
    found = decode._figures(TINY, {"batch": 1, "tokens": 2, "precision": "int8"}, answers, "a", 1e9)
    assert found["decoded_tokens_per_second"] is None and found["share_of_bandwidth"] is None


def test_bytes_of_weights() -> None:
    cfg = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_vocab=96, n_ctx=8)
    matrices = 2 * 12 * 64 * 64 + 64 * 96
    channels = 2 * (4 * 64 + 256 + 64) + 96
    assert weight_bytes(cfg, "float32") == 4 * matrices
    assert weight_bytes(cfg, "bfloat16") == weight_bytes(cfg, "float16") == 2 * matrices
    assert weight_bytes(cfg, "int8") == matrices + 4 * channels
    # The output projection's last contracted axis is a head's width, 16: its groups are as small.
    assert weight_bytes(cfg, "int4") == matrices // 2 + 2 * (matrices - 2 * 64 * 64) // 32 + 2 * 2 * 64 * 64 // 16
    assert weight_bytes(cfg, "int4-128") < weight_bytes(cfg, "int4")


def test_bytes_of_weights_are_those_of_the_arrays(directory) -> None:
    """Of a loaded model: all its arrays but tables, norms and biases."""
    for precision in ("int8", "int4"):
        params = mt.load(directory, quantize=precision).params
        matrices = [*params["layers"]["attn"].values(), params["head"]["w"]]
        matrices += [params["layers"]["mlp"][name] for name in ("w_in", "w_out")]
        n_bytes = sum(w.values.nbytes + w.scale.nbytes for w in matrices)
        assert weight_bytes(TINY, precision) == n_bytes


def test_texts_are_the_same_for_all_and_new_in_every_turn() -> None:
    spec = {"texts": 50, "prompt_tokens": [3, 9], "output_tokens": [2, 8], "n_vocab": 40}
    first, again, second = texts(spec, 0), texts(spec, 0), texts(spec, 1)
    assert first == again != second
    assert [(len(a.prompt), a.n_tokens) for a in first] == [(len(b.prompt), b.n_tokens) for b in second]
    assert {len(text.prompt) for text in first} == set(range(3, 10))
    assert {text.n_tokens for text in first} == set(range(2, 9))
    assert all(0 <= token < 40 for text in first for token in text.prompt)


def test_prompts_differ_row_by_row() -> None:
    rows = prompts(1000, 8, 4)
    assert len({tuple(row) for row in rows}) == 8 and rows == prompts(1000, 8, 4)


def run_serve(**changed) -> dict:
    how = {"texts": 5, "prompt_tokens": (3, 9), "output_tokens": (2, 8), "max_batch": 2, "precisions": ["float32"]}
    how |= {"against": [], "rounds": 1, "warmup": 1, "progress": lambda line: None}
    return serve.bench_serve(TINY, **how | changed)


def test_ours_serves(here) -> None:
    result = run_serve()
    json.dumps(result, allow_nan=False)
    asked = sum(text.n_tokens for text in texts(result | {"n_vocab": TINY.n_vocab}, 0))
    for figures in result["contenders"].values():
        assert figures["tokens_per_second"]["max"] == pytest.approx(asked / figures["seconds"]["min"])
        assert 0 < figures["first_token_seconds"]["median"] <= figures["first_token_seconds"]["max"]
        assert figures["first_token_seconds"]["max"] <= figures["seconds"]["max"]


def test_a_contender_that_writes_too_little_is_found(here, monkeypatch) -> None:
    turn = {"whole": 1.0, "written": 3, "firsts": [0.1] * 5}
    monkeypatch.setattr(serve, "take_turns", lambda specs, *_: ({n: {} for n in specs}, {n: [turn] for n in specs}))
    with pytest.raises(RunError, match=r"wrote 3 tokens of the \d+ that were asked for"):
        run_serve()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": 100, "tokens": 29}, "do not fit the model's context of 128"),
        ({"tokens": 1}, "at least 2 are needed"),
        ({"precisions": ["int5"]}, "int5.*or a quantisation: int8"),
        ({"precisions": []}, "no precision is given"),
        ({"against": ["jax"]}, "'jax' is not known; expected: hf or ctranslate2 or torch"),
    ],
)
def test_what_cannot_be_measured_is_refused(here, changed, message) -> None:
    with pytest.raises(UserError, match=message):
        run_decode(**changed)


def test_texts_that_do_not_fit_are_refused(here) -> None:
    with pytest.raises(UserError, match="--prompt-tokens up to 100 and --output-tokens up to 29 do not fit"):
        run_serve(prompt_tokens=(1, 100), output_tokens=(1, 29))


def test_a_missing_peer_is_named_with_its_mend(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs ctranslate2 and torch and transformers: pip install .*peers"):
        contenders.peers(["ctranslate2"])


def test_native_kernels_and_none(monkeypatch) -> None:
    """Twice where the library is there; once, and so called, where it is not."""
    monkeypatch.setattr(native, "available", lambda: True)
    assert list(contenders.ours(["bf16", "int8"])) == [
        "ours bfloat16", "ours bfloat16 without native kernels", "ours int8", "ours int8 without native kernels"
    ]  # fmt: skip
    assert contenders.ours(["int8"])["ours int8 without native kernels"]["environment"] == {
        "MESH_TRANSFORMER_NATIVE": "off"
    }
    monkeypatch.setattr(native, "available", lambda: False)
    assert list(contenders.ours(["int8"])) == ["ours int8 without native kernels"]


@pytest.mark.long
def test_the_command(tmp_path) -> None:
    """The whole of it in processes of its own: weights written, contenders started, JSON on both ways."""
    command = [sys.executable, "-m", "mesh_transformer", "bench", "decode", "--preset", "gpt-j-tiny", "--tokens", "4"]
    command += ["--prompt", "3", "--precisions", "int8", "--rounds", "1", "--json", "--out", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "r.json").read_text())
    off = result["contenders"]["ours int8 without native kernels"]["described"]["native kernels"]
    assert "MESH_TRANSFORMER_NATIVE = off" in off
    assert all(math.isfinite(c["seconds"]["median"]) for c in result["contenders"].values())
