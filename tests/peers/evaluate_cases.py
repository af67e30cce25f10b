"""The tasks and the model of benchmarks/evaluate_against_hf.py, and the harness kept from what takes long."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mesh_transformer as mt
from quickly import compile_quickly

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evaluate_against_hf.py"


def benchmark() -> ModuleType:
    """The script as a module."""
    name = "evaluate_against_hf"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _SCRIPT)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
    """Programs are compiled meanwhile without what would make them fast."""
    compile_quickly(True)
    yield
    compile_quickly(False)


def answers(results: dict[str, Any], task: str) -> list[Any]:
    """What the model answered to the documents of a task, in their order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


class Unopened:
    """In place of `api.load` where no model may be opened."""

    def __call__(self, *_: Any, **__: Any) -> mt.Model:
        pytest.fail("the model was opened first")
