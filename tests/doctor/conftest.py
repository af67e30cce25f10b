"""A sound case with and without checkpoints, and a copy of it for each test to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from doctor_cases import Case, add_checkpoints, make_case


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own, which does not exist."""
    monkeypatch.setenv("MESH_TRANSFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """With checkpoints; to be read only."""
    case = make_case(tmp_path_factory.mktemp("doctor"))
    add_checkpoints(case)
    return case


@pytest.fixture
def case(sound: Case, tmp_path: Path) -> Case:
    """A copy of the case, without a run."""
    shutil.copytree(sound.path, tmp_path / "case", ignore=shutil.ignore_patterns("runs", ".*.offsets"))
    return Case(tmp_path / "case")


@pytest.fixture
def begun(sound: Case, tmp_path: Path) -> Case:
    """A copy of the case with its run."""
    shutil.copytree(sound.path, tmp_path / "case")
    return Case(tmp_path / "case")
