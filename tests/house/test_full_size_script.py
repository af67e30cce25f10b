"""scripts/full_size.py in miniature: every step is taken, and what the report says of it is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quickly

SCRIPT = Path(__file__).parents[2] / "scripts" / "full_size.py"
STEPS = ["make", "convert v1 to native", "inspect --digest v1", "inspect --digest native"]
STEPS += ["convert native to huggingface", "generate"]


def measure(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    ours = {"JAX_PLATFORMS": "cpu", "MESH_TRANSFORMER_CACHE": str(tmp_path / "cache"), **quickly.variables()}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "models"), "--small", *more]
    command += ["--output", str(tmp_path / "out" / "report.json")]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | ours, timeout=300, check=False)


@pytest.mark.long
def test_every_step_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    done = measure(tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    steps = {step["step"]: step for step in report["steps"]}
    assert list(steps) == STEPS and all(name in done.stdout for name in STEPS)
    for step in steps.values():
        assert step["cpu_seconds"] > 0 and 0 < step["seconds"] < 300
        assert 10e6 < step["peak_resident_bytes"] < 3e9
        assert (
            step["megabytes_per_second"] * step["seconds"] * 1e6 == step["bytes"]
            or abs(step["megabytes_per_second"] * step["seconds"] * 1e6 - step["bytes"]) < 1
        )
    # Two layers of 12 * 64^2 weights, embedding and head of 264 * 64, two bytes each, and the files' own parts.
    assert 2 * (2 * 12 * 64**2 + 2 * 264 * 64) < steps["inspect --digest native"]["bytes"] < 600_000
    assert report["digests_equal"] and report["digests"]["v1"] == report["digests"]["native"] and report["small"]
    native, hf = report["certificates"]["native"], report["certificates"]["huggingface"]
    assert native["digest"] == report["digests"]["v1"] and native["tensors_changed"] == []
    # The embedding bias is folded in and the sum rounded to bfloat16; so are the biases summed over shards.
    assert "transformer.wte.weight" in hf["tensors_changed"] and 0 < hf["largest_error"] < 2**-9
    assert len(report["completion"]["tokens"]) == 8
    assert report["versions"].keys() >= {"python", "jax", "numpy", "mesh-transformer"}
    assert report["machine"]["cores"] >= 1 and report["machine"]["memory_bytes"] > 2**30
    assert report["machine"]["device"].startswith("cpu")
    assert list((tmp_path / "models").iterdir()) == []


def test_what_is_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models" / "native").mkdir(parents=True)
    done = measure(tmp_path, "--keep")
    assert done.returncode == 1 and "native exists" in done.stderr
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["native"]
