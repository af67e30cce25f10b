"""A server under load in a process of its own: started, waited for, watched from outside, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from mesh_transformer.bench.load_client import Address, get
from mesh_transformer.bench.rounds import ALLOCATOR
from mesh_transformer.config.errors import RunError

READY_SECONDS = 1800.0  # for loading a model and compiling
STOP_SECONDS = 60.0
SECONDS_BETWEEN_NOTES = 10.0
_LAST_LINES = 15
# What the server calls its figures (docs/serving.md).
_PREFIX = "mesh_transformer_"
_COUNTERS = (
    "generated_tokens",
    "prompt_tokens",
    "cached_prompt_tokens",
    "engine_steps",
    "engine_step_failures",
    "compilations",
)


class ServerProcess:
    """A command that serves on a loopback port; a context manager.

    Args:
        arguments: the command line, to which "--port N" is added.
        threads: of its arithmetic, where a setting in the environment decides.
    """

    def __init__(self, name: str, arguments: Sequence[str], *, threads: int, key: str | None = None) -> None:
        self.name = name
        self.address = Address("127.0.0.1", _free_port(), key=key)
        self.status: int | None = None  # how it ended, once it has
        # Closed by __exit__.
        self._messages = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if key is not None:
            environment["MESH_TRANSFORMER_API_KEY"] = key
        self._process = subprocess.Popen(
            [*arguments, "--port", str(self.address.port)],
            stdin=subprocess.DEVNULL,
            stdout=self._messages,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self._messages.close()

    async def wait_ready(self, timeout: float = READY_SECONDS, progress: Callable[[str], None] | None = None) -> None:
        """Returns when GET /health answers 200. `progress` is told every ten seconds what is waited for.

        Raises:
            RunError: the process ended, or did not get ready in time; its last lines are in the message.
        """
        begun = told = time.monotonic()
        while time.monotonic() < begun + timeout:
            if progress is not None and time.monotonic() - told >= SECONDS_BETWEEN_NOTES:
                told = time.monotonic()
                said = (self.last_lines().splitlines() or ["nothing yet"])[-1]
                progress(f"{self.name} is not ready after {told - begun:.0f} s; it said last: {said}")
            if self._process.poll() is not None:
                raise RunError(f"{self.name} ended with status {self._process.returncode}:\n{self.last_lines()}")
            with contextlib.suppress(OSError, EOFError):
                status, _ = await get(self.address, "/health")
                if status == 200:
                    return
            await asyncio.sleep(0.1)
        raise RunError(f"{self.name} was not ready after {timeout:.0f} seconds:\n{self.last_lines()}")

    def resident_bytes(self) -> int | None:
        """Resident memory now; None where the system does not tell, or the process has ended."""
        with contextlib.suppress(OSError):
            found = re.search(
                r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{self._process.pid}/status").read_text(), re.MULTILINE
            )
            return int(found[1]) * 1024 if found else None
        return None

    def stop(self) -> int:
        """Asks it to end, makes it end if it does not, and returns its exit status (negative: a signal)."""
        if self.status is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self.status = self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self.status = self._process.wait()
        return self.status

    def last_lines(self) -> str:
        """The end of what it printed."""
        self._messages.seek(0)
        return "".join(self._messages.readlines()[-_LAST_LINES:]).rstrip()


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit here, so that servers which were started are stopped and not left behind."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


async def metrics(address: Address) -> dict[str, float]:
    """The samples of GET /metrics: name, or name{labels} as written, -> value; empty if there is no such page.

    Raises:
        OSError, EOFError: the server cannot be reached.
    """
    status, text = await get(address, "/metrics")
    if status != 200:
        return {}
    samples = re.findall(r"^([A-Za-z_:][\w:]*(?:\{.*\})?) (\S+)", text.decode(), re.MULTILINE)
    return {name: float(value) for name, value in samples}


def idle(samples: Mapping[str, float]) -> bool | None:
    """Whether nothing waits and every slot is free; None if the samples do not say."""
    found = [samples.get(_PREFIX + name) for name in ("slots_used", "queue_length", "streams")]
    return None if None in found else not any(found)


def watched_counters(samples: Mapping[str, float]) -> dict[str, float]:
    """Those counters of the engine that the samples have."""
    return {name: samples[_PREFIX + name + "_total"] for name in _COUNTERS if _PREFIX + name + "_total" in samples}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
