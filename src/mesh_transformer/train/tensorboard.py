"""The curves of a run for TensorBoard, as event files under RUN/tensorboard."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.train.metrics import AnyMetrics
from mesh_transformer.train.tracking import curves_for

MISSING = (
    "no curves for TensorBoard: the package tensorboardX is not installed (pip install tensorboardX, or "
    "log.tensorboard = false); metrics.jsonl has every value"
)


class TensorBoard:
    """Writes event files, each step handed to the system as it is written.

    Args:
        directory: made if it is missing. What an earlier process wrote there stays; of its steps after `step` a reader
            is told that they do not count.
        step: of the checkpoint that the run goes on from, 0 where it begins.

    Raises:
        ImportError: tensorboardX is not installed.
        CheckpointError: from every method, when the disk is full or the directory cannot be written.
    """

    def __init__(self, directory: Path, step: int) -> None:
        # Its SummaryWriter writes on another thread, where an error would be lost and the queue to it would fill up.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._directory, self._event, self._summary = directory, Event, Summary
        with self._errors():
            directory.mkdir(exist_ok=True)
            # Its names have seconds: two processes that follow one another quickly must not share one.
            self._writer: Any = EventsWriter(str(directory / "events"), f".{step}.{os.getpid()}")
        self._put(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, metrics: AnyMetrics) -> None:
        """Every curve's value at the step."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in curves_for(metrics).items()]
        self._put(step=metrics.step, summary=self._summary(value=values))

    def close(self) -> None:
        """Closes the file."""
        with self._errors():
            self._writer.close()

    def _put(self, **fields: Any) -> None:
        with self._errors():
            self._writer.write_event(self._event(wall_time=time.time(), **fields))
            self._writer.flush()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._directory}: cannot be written ({error.strerror}); the newest checkpoint is untouched\n"
                "Free space there or make it writable; then repeat the command to go on."
            ) from error
