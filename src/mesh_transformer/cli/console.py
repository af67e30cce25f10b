"""What a run looks like on a terminal, and as plain lines where there is none. Everything goes to standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesh_transformer.train.metrics import EvaluationMetrics, StepMetrics, ValidationMetrics

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_WITHOUT_BAR = 1.0  # what takes no longer shows none


def note(text: str) -> None:
    """One line to the person who runs it."""
    print(text, file=sys.stderr, flush=True)


def stopped_note(step: int, by: int) -> str:
    """What to say when signal `by` ended a run after `step` steps."""
    if step == 0:
        return f"stopped by signal {by} before the first step; there was nothing to save"
    return f"stopped by signal {by}; step {step} is saved; the same command goes on from it"


class TrainingDisplay:
    """A progress bar on a terminal, a line every ten seconds elsewhere. Use as a context manager."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._bar: Any = None
        self._task: Any = None
        self._printed = 0.0
        self._begun = time.monotonic()

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """A line between the steps."""
        self._line(text)

    def step(self, metrics: StepMetrics) -> None:
        """One training step."""
        if sys.stderr.isatty():
            self._show(metrics)
            return
        now = time.monotonic()
        if metrics.step in (1, self._steps) or now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            self._line(f"{self._clock()} step {metrics.step}/{self._steps}  {_figures(metrics)}")

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """One evaluation task."""
        shown = []
        for name, value in metrics.metrics.items():
            error = metrics.metrics.get(f"{name}_stderr")
            if not name.endswith("_stderr"):
                shown.append(f"{name} {value:.4f}" + (f" ± {error:.4f}" if error else ""))
        self._line(f"{self._clock()} step {metrics.step}/{self._steps}  {metrics.evaluation}: {', '.join(shown)}")

    def validation(self, metrics: ValidationMetrics) -> None:
        """One validation set."""
        self._line(
            f"{self._clock()} step {metrics.step}/{self._steps}  {metrics.validation}: "
            f"loss {metrics.loss:.4f}  perplexity {metrics.perplexity:.2f}"
        )

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._begun)
        return f"[{seconds // 60:3d}:{seconds % 60:02d}]"

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            note(text)

    def _show(self, metrics: StepMetrics) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._steps, completed=metrics.step, figures="")
            self._bar.start()
        self._bar.update(self._task, completed=metrics.step, figures=_figures(metrics))


def _figures(metrics: StepMetrics) -> str:
    return (
        f"loss {metrics.loss:.4f}  rate {metrics.learning_rate:.2e}  norm {metrics.grad_norm:.2f}  "
        f"{metrics.tokens_per_second:,.0f} tokens/s"
    )


class StageDisplay:
    """Progress of work in stages: a bar on a terminal, a line every ten seconds elsewhere. A context manager.

    Args:
        in_bytes: the units are bytes; their rate is shown.
    """

    def __init__(self, *, in_bytes: bool = False) -> None:
        self._in_bytes = in_bytes
        self._begun: dict[str, float] = {}
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._printed = time.monotonic()

    def __enter__(self) -> StageDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _start_bar(self) -> None:
        from rich import progress
        from rich.console import Console

        columns = progress.Progress.get_default_columns()
        if self._in_bytes:
            columns = (*columns, progress.DownloadColumn(), progress.TransferSpeedColumn())
        self._bar = progress.Progress(*columns, console=Console(stderr=True))
        self._bar.start()

    def progress(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` units of a stage are finished."""
        now = time.monotonic()
        self._begun.setdefault(stage, now)
        if sys.stderr.isatty():
            if self._bar is None and now - min(self._begun.values()) > _SECONDS_WITHOUT_BAR:
                self._start_bar()
            if self._bar is None:
                return
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total)
            self._bar.update(self._tasks[stage], completed=done)
        elif now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            if self._in_bytes:
                rate = done / max(1e-3, now - self._begun[stage])
                note(f"{stage}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:,.0f} MB/s")
            else:
                note(f"{stage}: {done:,} of {total:,}")
