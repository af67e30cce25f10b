"""The devices that JAX finds, and whether they exchange what they should."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mesh_transformer import compat
from mesh_transformer.config.errors import RunError
from mesh_transformer.doctor.finding import Finding, failed, ok, warning
from mesh_transformer.doctor.machine import gib

_SECONDS = 180.0
_PROBE = "mesh_transformer.doctor.probe"
_MOST_SAID = 400  # letters of what a process that ended has said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Those of this process.

    memory: bytes of the smallest; None where the platform does not say, as the CPU's. collective: as `probe.look`
    gives it.
    """

    platform: str
    kinds: tuple[str, ...]
    memory: int | None = None
    collective: Mapping[str, Any] | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.kinds)


def look_for_devices(seconds: float = _SECONDS) -> Devices:
    """What JAX finds when it is started, in a process of its own, as this command was.

    Raises:
        RunError: it did not start or did not answer in time; the message has its own words.
    """
    # A run that is under way on the same GPU keeps its memory: no more is taken than is needed.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # nothing is to stay behind
    line = [sys.executable, "-m", _PROBE]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise RunError(
            f"JAX did not find its devices in {seconds:.0f} s\n"
            "Another process may hold them (on a TPU: one process at a time; of a slice: run this on all its hosts at "
            "once); JAX_PLATFORMS=cpu leaves accelerators aside."
        ) from error
    last = next(reversed(done.stdout.splitlines()), "")
    try:
        answer = json.loads(last)
    except ValueError:
        said = " ".join((done.stderr or done.stdout).split())[-_MOST_SAID:]
        raise RunError(f"JAX ended the process in which it started (status {done.returncode}): {said}") from None
    if "error" in answer:
        raise RunError(f"JAX does not start: {' '.join(answer['error'].split())}")
    memory = [device["memory"] for device in answer["devices"] if device["memory"]]
    return Devices(
        platform=answer["platform"],
        kinds=tuple(device["kind"] for device in answer["devices"]),
        memory=min(memory) if memory else None,
        collective=answer["collective"],
    )


def check_devices(devices: Devices, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What there is, and what the sum over all of it took."""
    counted = ", ".join(f"{n} x {kind}" for kind, n in collections.Counter(devices.kinds).items())
    each = f", {gib(devices.memory)} each" if devices.memory else ""
    found = f"{counted} ({devices.platform}){each}"
    if devices.platform == "cpu" and not environment.get("JAX_PLATFORMS") and compat.cuda_plugin() is not None:
        mend = "JAX_PLATFORMS=cuda mesh-transformer doctor says what it lacks"
        yield warning("devices", f"{found}: a plugin for GPUs is installed, and JAX does not use it", mend)
    else:
        yield ok("devices", found)
    yield _of_collective(devices)


def _of_collective(devices: Devices) -> Finding:
    done = devices.collective
    if done is None:
        return ok("collective", "one device: nothing is exchanged")
    n = devices.count
    # What every device must send at the least in a sum over all: 2 (n - 1) / n of what it holds.
    rate = 2 * (n - 1) / n * done["bytes"] / done["seconds"]
    what = f"a sum over {n} devices of {gib(done['bytes'])} each"
    if done["right"]:
        return ok("collective", f"{what}: {done['seconds'] * 1e3:.2f} ms, {rate / 1e9:.2f} GB/s a device")
    return failed(
        "collective",
        f"{what} is wrong: the devices do not receive what the others send",
        "take the machine out of use; on GPUs first try NCCL_P2P_DISABLE=1, which tells a broken link between them",
    )
