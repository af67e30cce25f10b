"""The command killed with SIGKILL and started again, compared bit for bit with one that was left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import quickly

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_and_resume.py"


def prove(tmp_path: Path, compiled: dict[str, str], *arguments: str) -> str:
    ours = {"JAX_PLATFORMS": "cpu", "MESH_TRANSFORMER_CACHE": str(tmp_path / "cache"), **compiled}
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "runs"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ours, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal: digest" in done.stdout
    return done.stdout


def test_two_kills_one_of_them_inside_a_save(tmp_path: Path) -> None:
    told = prove(tmp_path, quickly.variables(), "--kills", "2", "--steps", "14", "--seed", "1")
    assert "inside the save of checkpoint" in told


@pytest.mark.long
def test_ten_kills_three_of_them_inside_a_save(tmp_path: Path) -> None:
    told = prove(tmp_path, {"XLA_FLAGS": ""}, "--kills", "10", "--steps", "60", "--seed", "0")
    assert told.count("inside the save of checkpoint") >= 3
