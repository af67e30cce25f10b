"""Contenders take one step each in turn, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from mesh_transformer.config.errors import RunError, UserError

# The same allocator for everybody: big buffers are kept instead of returned to the system after every step.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


# Peers that `--against` knows, and the packages that each needs.
_PACKAGES = {
    "hf": ("torch", "transformers"),
    "torch": ("torch", "transformers"),
    "ctranslate2": ("ctranslate2", "torch", "transformers"),
}


class Worker:
    """A contender in its own process; `spec["environment"]` holds variables that it has beside everybody's."""

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        self.name = name
        threads = str(spec["threads"])
        environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        environment |= spec.get("environment", {})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mesh_transformer.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._ask(json.dumps(spec))

    def step(self) -> dict[str, Any]:
        """One step: its seconds and figures."""
        return self._ask("step")

    def describe(self) -> dict[str, Any]:
        """Versions and settings, those included that it chose while it ran."""
        return self._ask("describe")

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RunError(f"contender {self.name} ended with status {self._process.wait()}; its messages are above")
        return json.loads(answer)


def take_turns(
    specs: dict[str, dict[str, Any]], rounds: int, warmup: int, progress: Callable[[str], None]
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Starts every contender, then `warmup` + `rounds` rounds of one step each.

    Returns:
        name -> description, name -> the answers of the counted rounds.
    """
    workers: list[Worker] = []
    # Of torch.compile: one that a process left half written makes every later one fail.
    with tempfile.TemporaryDirectory(prefix="mesh-transformer-bench-") as cache:
        try:
            for name, spec in specs.items():
                progress(f"starting {name}")
                own = {"TORCHINDUCTOR_CACHE_DIR": cache, **spec.get("environment", {})}
                workers.append(Worker(name, {**spec, "environment": own}))
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
            for i in range(warmup + rounds):
                progress(f"round {i + 1} of {warmup + rounds}" + (" (warm-up)" if i < warmup else ""))
                for worker in workers:
                    answer = worker.step()
                    if i >= warmup:
                        answers[worker.name].append(answer)
            return {worker.name: worker.describe() for worker in workers}, answers
        finally:
            for worker in workers:
                worker.close()


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def require_peer(name: str, known: Sequence[str] = ("hf",)) -> None:
    """Returns if the peer is one of `known` and can run here.

    Raises:
        UserError: it is not known, or not installed; the message has the command that installs it.
    """
    if name not in known:
        raise UserError(f"--against {name!r} is not known; expected: {' or '.join(known)}")
    missing = [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--against {name} needs {' and '.join(missing)}: pip install 'mesh-transformer[peers]'")


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile finds, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))
