"""Random damage to every kind of file: one of our errors, or what was there before; never anything else.

The cases run in a process of their own, under a limit of memory; `fuzz_cases` says what is done and what is a fault.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from checkpoint import fuzz_cases
from checkpoint.fuzz_cases import SUBJECTS, Case, Subject
from mesh_transformer.config.errors import CheckpointError

TESTS = Path(__file__).parents[1]
MOST_FAULTS = 5  # shown
SEED, N = 20240, 2 * len(SUBJECTS)
LONG_SEED, LONG_N = 7, 40 * len(SUBJECTS)


def reports(directory: Path, seed: int, count: int) -> list[dict[str, Any]]:
    """One for each case; a process that died or hung leaves a fault, and another goes on after it."""
    ours = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(TESTS)}
    # Few heaps: those of many threads would take much of the address space that is left.
    ours |= {"MESH_TRANSFORMER_CACHE": str(directory / "cache"), "MALLOC_ARENA_MAX": "2"}
    found: list[dict[str, Any]] = []
    while len(found) < count:
        command = [sys.executable, "-m", "checkpoint.fuzz_cases", "--seed", str(seed)]
        command += ["--first", str(len(found)), "--count", str(count - len(found)), str(directory / "models")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ours, timeout=1500, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert lines, done.stderr[-3000:]
        found += [line for line in lines if "outcome" in line]
        if len(found) < count:
            assert "outcome" not in lines[-1], done.stderr[-3000:]
            how = f"the process ended with status {done.returncode}:\n{done.stderr[-3000:]}"
            found.append({**lines[-1], "outcome": "died", "fault": how})
    return found


def check(directory: Path, seed: int, count: int) -> list[dict[str, Any]]:
    found = reports(directory, seed, count)
    assert [report["case"] for report in found] == list(range(count))
    faults = [report for report in found if report["fault"]]
    shown = "\n\n".join(
        f"seed {seed}, case {report['case']}: {report['operation']} of {report['file']}: {report['fault']}"
        for report in faults[:MOST_FAULTS]
    )
    assert not faults, f"{len(faults)} of {count} cases\n{shown}"
    outcomes = Counter(report["outcome"] for report in found)
    assert outcomes["raised"] > count / 2, outcomes
    return found


def test_a_few_cases_of_every_kind(tmp_path: Path) -> None:
    check(tmp_path, SEED, N)


@pytest.mark.long
def test_many_cases(tmp_path: Path) -> None:
    found = check(tmp_path, LONG_SEED, LONG_N)
    raised = {report["case"] % len(SUBJECTS) for report in found if report["outcome"] == "raised"}
    never = [subject for i, subject in enumerate(SUBJECTS) if i not in raised]
    # Where each record begins is noted beside the records, and found anew if the note is damaged.
    assert [subject.files for subject in never] == [".*.offsets"]


# --- That the judge can condemn ---


def verdict(monkeypatch: pytest.MonkeyPatch, outcome: Any, rule: Any = "equal") -> tuple[str, str | None]:
    def read_all(place: Path) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(fuzz_cases, "read_all", read_all)
    case = Case(0, Subject("v1", "*", rule), Path("/some/place/file"), "flip", b"", rule)
    return fuzz_cases.fault_of(case, Path("/some/place"), {"digest": "a", "sequences": [[1], [2]]})


def test_what_counts_as_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = {"digest": "a", "sequences": [[1], [2]]}
    assert verdict(monkeypatch, sound) == ("equal", None)
    assert verdict(monkeypatch, CheckpointError("/some/place/file: damaged\ncopy it again")) == ("raised", None)
    assert verdict(monkeypatch, sound | {"digest": "b"}, "any") == ("other", None)
    assert verdict(monkeypatch, sound | {"sequences": [[2]]}, "part") == ("other", None)
    too_much = CheckpointError("/some/place/file: damaged")
    too_much.__cause__ = MemoryError()
    for outcome, rule, fault in (
        (KeyError("x"), "any", "KeyError"),
        (KeyboardInterrupt(), "any", "KeyboardInterrupt"),
        (CheckpointError("damaged"), "any", "does not name the place"),
        (CheckpointError("/some/place: a\nb\nc"), "any", "too long"),
        (CheckpointError("/some/place" + "x" * 2000), "any", "too long"),
        (too_much, "any", "huge allocation"),
        (sound | {"digest": "b"}, "equal", "went by unseen: digest"),
        (sound | {"sequences": [[3]]}, "part", "went by unseen: sequences"),
        (sound, "length", "another length"),
    ):
        found = verdict(monkeypatch, outcome, rule)[1]
        assert found is not None and fault in found, (outcome, rule, found)
