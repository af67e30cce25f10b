"""Several real Python processes on this machine that join in one run; each its own CPU devices, Gloo between them."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import quickly

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended; a negative `status` is the signal that killed it."""

    status: int
    stdout: str
    stderr: str


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment(index: int | None, count: int, port: int, devices: int, **more: str) -> dict[str, str]:
    """What a process with that index is started with; index None: alone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "OMPI_", "XLA_"))}
    place = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    return (
        kept
        | {"JAX_PLATFORMS": "cpu"}
        | quickly.variables(f"--xla_force_host_platform_device_count={devices}")  # no test here is about speed
        | {"PYTHONPATH": str(HERE), "MESH_TRANSFORMER_JOIN_TIMEOUT": "60"}
        | (place if index is not None else {})
        | more
    )


def run_processes(
    script: str,
    count: int = 2,
    *,
    devices: int = 2,
    arguments: Sequence[object] = (),
    only: Sequence[int] | None = None,
    variables: Mapping[int, Mapping[str, str]] | None = None,
    timeout: float = 120,
) -> list[Ended]:
    """Runs the script in `count` processes at the same time, and waits for all.

    Args:
        devices: CPU devices of each.
        arguments: sys.argv[1:] of each.
        only: the indices to start; None: all.
        variables: index -> environment variables of that process alone.
        timeout: seconds after which all are killed and an AssertionError tells what they wrote.
    """
    port = free_port()
    started: list[tuple[subprocess.Popen[bytes], Path]] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            for index in range(count) if only is None else only:
                own = environment(index, count, port, devices, **(variables or {}).get(index, {}))
                command = [sys.executable, "-c", script, *map(str, arguments)]
                written = Path(directory, str(index))
                # Files, not pipes: nobody reads while they run.
                with written.with_suffix(".out").open("wb") as out, written.with_suffix(".err").open("wb") as err:
                    started.append((subprocess.Popen(command, stdout=out, stderr=err, env=own), written))
            deadline = time.monotonic() + timeout
            for process, _ in started:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError("\n".join(each.stdout + each.stderr for each in _end(started))) from None
        finally:
            ended = _end(started)
    return ended


def _end(started: list[tuple[subprocess.Popen[bytes], Path]]) -> list[Ended]:
    for process, _ in started:
        process.kill()
    return [
        Ended(process.wait(), *(written.with_suffix(f".{name}").read_text() for name in ("out", "err")))
        for process, written in started
    ]
