"""Rows of a part of benchmarks/gpu.py: written as they come, timed alike, with the facts of the machine."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

Row = Callable[[], dict[str, Any]]


class Rows:
    """The rows of one part, in one file that always holds what has been measured so far."""

    def __init__(self, part: str, out: Path, *, seconds: float, rehearse: bool) -> None:
        self.rehearse = rehearse
        self._begun, self._seconds = time.perf_counter(), seconds
        self._file = out / f"{part}.json"
        self._failed = 0
        self._result: dict[str, Any] = {
            "part": part,
            "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
            "rehearsal": rehearse,
            "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "rows": [],
        }
        out.mkdir(parents=True, exist_ok=True)
        self._write()

    def row(self, name: str, measure: Row) -> dict[str, Any] | None:
        """Measures a row; None if it failed or there was no time left to begin it."""
        if time.perf_counter() - self._begun > self._seconds:
            self._add({"row": name, "not_begun": f"{self._seconds:.0f} s had passed"})
            return None
        began = time.perf_counter()
        try:
            values = measure()
        except Exception as error:
            # A row too large for the memory, or one that this version of JAX refuses, must not cost the others.
            self._failed += 1
            self._add({"row": name, "error": f"{type(error).__name__}: {error}"[:2000]})
            # Frames that a traceback still holds keep their arrays alive.
            error.__traceback__ = None
            gc.collect()
            return None
        self._add({"row": name, **values, "seconds_in_all": round(time.perf_counter() - began, 1)})
        gc.collect()
        return values

    def finish(self) -> int:
        """The exit status: 1 if a row failed."""
        self._result["took_s"] = round(time.perf_counter() - self._begun, 1)
        self._write()
        return int(self._failed > 0)

    def _add(self, row: dict[str, Any]) -> None:
        self._result["rows"].append(row)
        print(json.dumps(row, default=sorted), flush=True)
        self._write()

    def _write(self) -> None:
        fresh = self._file.with_suffix(".part")
        # Sets: the forms of a policy.
        fresh.write_text(json.dumps(self._result, indent=1, default=sorted) + "\n", encoding="utf-8")
        os.replace(fresh, self._file)


def machine() -> dict[str, Any]:
    """The device, its driver and the versions that were run."""
    from mesh_transformer.compat import cudnn_version

    device = jax.devices()[0]
    facts: dict[str, Any] = {
        "device": device.device_kind,
        "platform_version": device.client.platform_version,
        "compute_capability": getattr(device, "compute_capability", None),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "cudnn": cudnn_version(),
        "python": platform.python_version(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy", "optax", "nvidia-cudnn-cu13"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        facts["nvidia-smi"] = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.strip()
    except OSError:
        facts["nvidia-smi"] = None
    return facts


def peak_bytes() -> int | None:
    """The most memory of the device that was ever in use in this process, by the device's own count."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def median_seconds(call: Callable[[], Any], *, at_least_s: float = 0.3, rounds: int = 7) -> dict[str, float]:
    """Median, smallest and largest seconds of a call, over rounds of so many calls that the host does not count.

    The calls of a round are put in the device's queue one after another, and waited for together.
    """
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    n = max(1, math.ceil(at_least_s / rounds / max(time.perf_counter() - began, 1e-6)))
    n = min(n, 1000)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(n - 1):
            call()
        jax.block_until_ready(call())
        seconds.append((time.perf_counter() - began) / n)
    return {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds), "calls": n}


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, dict[str, float]]:
    """`median_seconds` of several contenders, one call of each in turn."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    return {
        name: {"seconds": statistics.median(each), "fastest": min(each), "slowest": max(each)}
        for name, each in seconds.items()
    }
