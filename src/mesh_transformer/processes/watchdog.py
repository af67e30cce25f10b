"""Ends a run that hangs: a process that waits in compiled code for a lost one cannot raise anything by itself."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from mesh_transformer.config.errors import RunError
from mesh_transformer.processes.group import LEFT, Processes, Store

_LONGEST_LOOK = 5.0  # seconds between two looks at the clock
# Seconds without a sign of life after which another process is lost. JAX ends the process from C++ after 100.
_SILENCE = 60.0
_COLLECTING = 10.0  # seconds that asking the coordinator may take before the report goes without it


class Watchdog:
    """A thread that reports and ends the process when no step was finished for too long, or another process is gone.

    While it runs it publishes this process's newest step, so that the report can say how far each one came. A process
    is gone when it called `end_after_error`, or published nothing for a minute before its watchdog was left; that
    counts in pauses too.

    Args:
        processes: those that step together.
        timeout_s: seconds from one `beat` to the next that are too long; 0: none are.
        on_hang: called with the report, on the watchdog's thread; None: the report and the stacks of all Python
            threads go to standard error, and the process ends with exit status 1.
    """

    def __init__(self, processes: Processes, timeout_s: float, on_hang: Callable[[str], None] | None = None) -> None:
        self._processes = processes
        self._timeout = timeout_s
        self._on_hang = on_hang or _end_process
        self._key = processes.fresh_key("heartbeat")
        self._lock = threading.Lock()
        self._step: int | None = None
        self._beaten = time.monotonic()
        self._pauses = 0
        self._heard: dict[int, tuple[str, float]] = {}  # the newest record of each other one, and when it was new here
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._timeout > 0 or self._processes.store is not None:
            self._beaten = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_COLLECTING)  # it may be waiting for a coordinator that has gone

    def beat(self, step: int) -> None:
        """Step `step` is finished. Costs no communication: the thread publishes it."""
        with self._lock:
            self._step = step
            self._beaten = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is too long: for compiling, validating and saving. May be nested."""
        with self._lock:
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                self._beaten = time.monotonic()

    def _watch(self) -> None:
        store = self._processes.store
        left: list[int] = []
        while not self._stopped.wait(min(_LONGEST_LOOK, self._timeout / 4) if self._timeout else _LONGEST_LOOK):
            with self._lock:
                step, silence, is_paused = self._step, time.monotonic() - self._beaten, self._pauses > 0
            if store is not None:
                left_before, lost = left, []
                with contextlib.suppress(RunError):  # without a coordinator JAX itself ends the process
                    self._publish(store, step, is_paused)
                    left, lost = sorted(map(int, store.entries(LEFT))), self._lost(store)
                # The time from one look to the next was this process's chance to end by itself.
                if left_before:
                    return self._on_hang(f"{self._processes.names(left)} ended after an error; see what it printed")
                if lost:
                    return self._on_hang("\n".join([f"{self._processes.names(lost)} is lost", *self._others(store)]))
            if 0 < self._timeout < silence and not is_paused:
                return self._on_hang(self._report(step, silence))

        if store is not None:
            with contextlib.suppress(RunError):
                self._publish(store, self._step, False, is_over=True)

    def _publish(self, store: Store, step: int | None, is_paused: bool, *, is_over: bool = False) -> None:
        record = {"step": step, "time": time.time(), "paused": is_paused, "over": is_over}
        store.set(f"{self._key}/{self._processes.index}", json.dumps(record))

    def _lost(self, store: Store) -> list[int]:
        now = time.monotonic()
        for index, record in store.entries(self._key).items():
            if self._heard.get(int(index), ("", 0.0))[0] != record:
                self._heard[int(index)] = (record, now)
        return [
            index
            for index, (record, since) in sorted(self._heard.items())
            if index != self._processes.index and now - since > _SILENCE and not json.loads(record)["over"]
        ]

    def _report(self, step: int | None, silence: float) -> str:
        what = "the first step" if step is None else f"step {step + 1}"
        own = self._processes.name(self._processes.index)
        lines = [f"{own}: {what} has not finished after {silence:.0f} s"]
        if self._processes.store is not None:
            lines += self._others(self._processes.store)
        return "\n".join(lines)

    def _others(self, store: Store) -> list[str]:
        found: list[dict[str, str]] = []

        def collect() -> None:
            with contextlib.suppress(RunError):
                found.append(store.entries(self._key))

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        thread.join(_COLLECTING)
        if not found:
            return [f"the coordinator, {self._processes.name(0)}, does not answer"]
        others = (index for index in range(self._processes.count) if index != self._processes.index)
        return [f"{self._processes.name(index)} {_heard(found[0].get(str(index)))}" for index in others]


def _heard(text: str | None) -> str:
    if text is None:
        return "was never heard"
    record = json.loads(text)
    # Times are those of the machines' own clocks.
    ago = max(0.0, time.time() - record["time"])
    at = "before any step" if record["step"] is None else f"at step {record['step']}"
    doing = ", compiling, validating or saving" if record["paused"] else ""
    return f"was last heard {at}{doing}, {ago:.0f} s ago"


def _end_process(report: str) -> None:
    print(
        f"error: {report}\nThe process is ended; repeat the command to go on from the newest checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    sys.stdout.flush()
    # The main thread is in compiled code and would never come to an exception, nor to its end.
    os._exit(1)
