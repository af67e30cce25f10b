"""The benchmark measures what it says; how fast anything is, is not tested."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mesh_transformer.bench.rounds import ALLOCATOR, require_peer, spread
from mesh_transformer.bench.train import bench_train
from mesh_transformer.config.errors import UserError
from mesh_transformer.config.presets import preset
from mesh_transformer.train.metrics import flops_per_token

TINY = preset("gpt-j-tiny")


def run(against: list[str], rounds: int = 2, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> dict:
    said: list[str] = []
    result = bench_train(
        TINY,
        batch_size=2,
        sequence_length=32,
        dtypes=dtypes,
        against=against,
        rounds=rounds,
        warmup=1,
        progress=said.append,
    )
    assert said[-1] == f"round {rounds + 1} of {rounds + 1}"
    return result


def check(result: dict, names: list[str]) -> None:
    json.dumps(result, allow_nan=False)
    assert list(result["contenders"]) == names
    tokens = 2 * 32
    for figures in result["contenders"].values():
        seconds, rate = figures["seconds"], figures["tokens_per_second"]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        assert rate["max"] == pytest.approx(tokens / seconds["min"])
        assert figures["model_flops_per_second"]["max"] == pytest.approx(
            tokens * flops_per_token(TINY, 32) / seconds["min"]
        )
        # Untrained models of the same vocabulary on the same rows: near ln(512), and learning.
        assert figures["loss"][0] == pytest.approx(math.log(TINY.n_vocab), abs=0.6)
    assert result["allocator"] == ALLOCATOR


@pytest.mark.long
def test_ours_alone() -> None:
    result = run([])
    check(result, ["ours float32", "ours bfloat16"])
    assert result["ratios"] == {}
    assert all(flops > 1e8 for flops in result["matmul_flops_per_second"].values())


@pytest.mark.peers
def test_against_hugging_face() -> None:
    result = run(["hf"])
    check(result, ["ours float32", "hf float32", "ours bfloat16", "hf bfloat16"])
    described = result["contenders"]["hf bfloat16"]["described"]
    assert "bfloat16 autocast" in described["settings"] and described["threads"] == os.cpu_count()
    assert set(result["ratios"]) == {"ours over hf, float32", "ours over hf, bfloat16"}


@pytest.mark.peers
@pytest.mark.long
def test_against_compiled_hugging_face() -> None:
    result = run(["torch"], dtypes=("float32",))
    check(result, ["ours float32", "torch float32"])
    assert "torch.compile" in result["contenders"]["torch float32"]["described"]["settings"]


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_unknown_peers_are_refused() -> None:
    with pytest.raises(UserError, match="'tensorflow' is not known; expected: hf"):
        require_peer("tensorflow")
    with pytest.raises(UserError, match="'ctranslate2' is not known; expected: hf or torch"):
        run(["ctranslate2"])


def test_compiling_peers_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_transformer.bench.train.require_peer", lambda name, known: None)
    monkeypatch.setattr("mesh_transformer.bench.train.cpp_compiler", lambda: None)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler: install g"):
        run(["torch"])


def test_workers_run_under_one_allocator(tmp_path: Path) -> None:
    """Every contender's process is given the same allocator settings, whatever ours are."""
    from mesh_transformer.bench.rounds import Worker

    (tmp_path / "spy.py").write_text(
        "import os\nclass Spy:\n"
        "    def describe(self): return {k: v for k, v in os.environ.items() if 'MALLOC' in k or 'GLIBC' in k}\n"
        "    def step(self): return {}\n"
        "def make(spec): return Spy()\n"
    )
    script = (
        "import importlib, json, sys; sys.path.insert(0, sys.argv[1])\n"
        "import mesh_transformer.bench as bench, spy; sys.modules['mesh_transformer.bench.spy'] = spy\n"
        "from mesh_transformer.bench.worker import serve\n"
        "serve({'module': 'spy'})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        input="step\n",
        capture_output=True,
        text=True,
        env={**os.environ, **ALLOCATOR},
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == ALLOCATOR
    assert second["seconds"] >= 0
    worker = Worker("ours", {"module": "ours", "kind": "matmul", "dtype": "float32", "threads": 1})
    try:
        environment = Path(f"/proc/{worker._process.pid}/environ")
        if environment.exists():
            assert all(f"{k}={v}".encode() in environment.read_bytes().split(b"\0") for k, v in ALLOCATOR.items())
    finally:
        worker.close()
