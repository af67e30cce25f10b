"""One contender of a benchmark in a process of its own: stays resident and takes a step when told.

Reads lines on standard input (the first, JSON, says what to be; each later one is "step" or "describe") and answers
each with one JSON line on standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any, Protocol


class Contender(Protocol):
    """What a contender's module provides through `make(spec)`."""

    def step(self) -> dict[str, Any]:
        """One unit of work, finished when this returns; the figures that go with it."""
        ...

    def describe(self) -> dict[str, Any]:
        """Versions and settings, for the record."""
        ...


def serve(spec: dict[str, Any]) -> None:
    """Builds the contender of `spec["module"]` and takes steps until standard input ends."""
    # Only answers may go to standard output; whatever a library prints goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    contender: Contender = importlib.import_module(f"mesh_transformer.bench.{spec['module']}").make(spec)
    answer(contender.describe())
    for line in sys.stdin:
        if line.strip() == "describe":
            answer(contender.describe())
            continue
        start = time.perf_counter()
        figures = contender.step()
        answer({"seconds": time.perf_counter() - start, **figures})


if __name__ == "__main__":
    serve(json.loads(sys.stdin.readline()))
