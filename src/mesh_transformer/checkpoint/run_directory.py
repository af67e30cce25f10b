"""`RUN/`: where each file of a run is, the lock that keeps two processes apart, and the metrics file on resume."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mesh_transformer.checkpoint.opening import CHECKPOINTS
from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.files import make_directories, write_atomically


class RunDirectory:
    """The directory of one run; nothing is made or read before a method is called."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"  # resolved configuration
        self.metrics = self.path / "metrics.jsonl"  # one JSON object a line
        self.checkpoints = self.path / CHECKPOINTS  # STEP/ directories
        self.loss_plot = self.path / "loss.png"
        self.samples = self.path / "samples.txt"
        self.lock_file = self.path / ".lock"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process; makes the directory. The lock ends with the process, however it ends.

        Raises:
            CheckpointError: another process holds it; the message names it.
        """
        make_directories(self.path)
        # The file stays for ever: were it unlinked, two processes could hold locks on two files of one name.
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.path}: the run is in use by {_holder(descriptor)}\n"
                    "Wait for that process or end it, or give this run another name."
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> str | None:
        """The process that holds the lock, in words; None if nobody does. Makes nothing."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(descriptor)
        finally:
            os.close(descriptor)
        return None

    def cut_metrics(self, step: int) -> None:
        """Drops from metrics.jsonl, in one atomic change, lines of steps after `step` and a torn end.

        Raises:
            CheckpointError: a line that is not at the end is no JSON object with a "step"; the file is unchanged.
        """
        if not self.metrics.exists():
            return
        data = self.metrics.read_bytes()
        lines = data.splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        # What a power cut or a kill tore is at the end; after it nothing was written.
        while steps and steps[-1] is None:
            steps.pop()
        kept = []
        for number, (line, at) in enumerate(zip(lines, steps, strict=False), start=1):
            if at is None:
                raise CheckpointError(
                    f'{self.metrics}, line {number}: expected a JSON object with a "step"; mend or delete that line'
                )
            if at <= step:
                kept.append(line if line.endswith(b"\n") else line + b"\n")
        if b"".join(kept) != data:
            write_atomically(self.metrics, b"".join(kept))


def _holder(descriptor: int) -> str:
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {record['pid']} on {record['host']}"
    except (ValueError, KeyError, TypeError):  # it has the lock but has not yet said who it is
        return "another process"


def _step_of(line: bytes) -> int | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    at = record.get("step") if isinstance(record, dict) else None
    return at if isinstance(at, int) else None
