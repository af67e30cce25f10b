"""What a run writes down while it trains: metrics.jsonl, and the same for TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Protocol

from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.config.run import RunConfig
from mesh_transformer.train import tensorboard
from mesh_transformer.train.loop import Observer
from mesh_transformer.train.metrics import (
    AnyMetrics,
    EvaluationMetrics,
    MetricsFile,
    StepMetrics,
    ValidationMetrics,
    read_metrics,
)
from mesh_transformer.train.noise_scale import NoiseAverages
from mesh_transformer.train.wandb import WeightsAndBiases

TENSORBOARD = "tensorboard"


class _Tracker(Protocol):
    def write(self, metrics: AnyMetrics) -> None: ...
    def close(self) -> None: ...


class Recorder:
    """Passes on to an observer what happens, after it is written down; close it at the end.

    Args:
        directory: whose metrics.jsonl holds the lines of the steps up to `step` and no others.
        metrics: that file, open.
        step: of the checkpoint that the run goes on from; 0 where it begins.
    """

    def __init__(
        self, run: RunConfig, directory: RunDirectory, observer: Observer, metrics: MetricsFile, step: int
    ) -> None:
        self._observer, self._metrics = observer, metrics
        self._sequence_length = run.data.sequence_length
        self._noise = NoiseAverages(run.train.noise_scale_alpha)
        self._noise.add_lines(read_metrics(directory.metrics))
        self._trackers: list[_Tracker] = []
        if run.log.tensorboard:
            try:
                self._trackers.append(tensorboard.TensorBoard(directory.path / TENSORBOARD, step))
            except ImportError:
                observer.note(tensorboard.MISSING)
        if run.log.wandb_project:
            self._trackers.append(WeightsAndBiases(run, directory.path, step, observer.note))

    def close(self) -> None:
        """Ends what is logged to; every one is told, whatever another of them raises."""
        with contextlib.ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.close)

    def note(self, text: str) -> None:
        """A line between the steps."""
        self._observer.note(text)

    def step(self, metrics: StepMetrics) -> None:
        """One training step; the running averages of the noise scale are added."""
        metrics = self._with_noise_scale(metrics)
        self._write(metrics)
        self._observer.step(metrics)

    def validation(self, metrics: ValidationMetrics) -> None:
        """One validation set."""
        self._write(metrics)
        self._observer.validation(metrics)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """One evaluation task."""
        self._write(metrics)
        self._observer.evaluation(metrics)

    def _write(self, metrics: AnyMetrics) -> None:
        self._metrics.write(metrics)
        for tracker in self._trackers:
            tracker.write(metrics)

    def _with_noise_scale(self, metrics: StepMetrics) -> StepMetrics:
        if metrics.noise_signal is None or metrics.noise_trace is None:
            return metrics
        noise = self._noise.add(metrics.noise_signal, metrics.noise_trace)
        return dataclasses.replace(
            metrics,
            noise_signal_average=noise.signal_average,
            noise_trace_average=noise.trace_average,
            noise_scale=noise.scale,
            noise_scale_tokens=None if noise.scale is None else noise.scale * self._sequence_length,
        )
