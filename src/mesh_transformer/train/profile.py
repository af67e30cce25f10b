"""A trace of some training steps: what the devices and the host did when, to be opened in Perfetto."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import jax

from mesh_transformer.train.loop import Observer
from mesh_transformer.train.metrics import EvaluationMetrics, StepMetrics, ValidationMetrics

# Steps that are not traced: what is done once, such as the first touch of memory, says nothing of the others.
_STEPS_BEFORE = 2
PROFILE = "profile"


class Profiler:
    """An observer that traces `steps` steps after the first two of this process and passes everything on.

    Use as a context manager, so that a run that ends earlier leaves a trace of what there was.

    Args:
        directory: where the trace goes, in the layout that TensorBoard's profile plugin reads too.
    """

    def __init__(self, observer: Observer, directory: Path, steps: int) -> None:
        self._observer, self._directory, self._steps = observer, directory, steps
        self._seen = 0
        self._tracing = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tracing:
            self._stop()
        elif kind is None and self._seen < _STEPS_BEFORE:
            self.note(f"no profile: the first {_STEPS_BEFORE} steps are not traced, and there were {self._seen}")

    def note(self, text: str) -> None:
        """A line between the steps."""
        self._observer.note(text)

    def step(self, metrics: StepMetrics) -> None:
        """One training step."""
        self._observer.step(metrics)
        self._seen += 1
        if self._tracing and self._seen == _STEPS_BEFORE + self._steps:
            self._stop()
        elif self._seen == _STEPS_BEFORE:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._tracing = True

    def validation(self, metrics: ValidationMetrics) -> None:
        """One validation set."""
        self._observer.validation(metrics)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """One evaluation task."""
        self._observer.evaluation(metrics)

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        traces = sorted(self._directory.glob("plugins/profile/*/perfetto_trace.json.gz"))
        self.note(f"profile: {traces[-1]}; open it at https://ui.perfetto.dev, or the directory in TensorBoard")
