"""What a run reports: throughput, MFU, metrics.jsonl."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from mesh_transformer.config.devices import peak_flops_of
from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import count_matmul_params


def flops_per_token(cfg: ModelConfig, sequence_length: int) -> int:
    """Model FLOPs of training on one token, forward and backward, recomputation not counted.

    6 per parameter of every matrix that a token is multiplied with (the embedding is a lookup, unless it is the head
    too), and for the two attention products of every layer 12 n_heads d_head per position that a query has scores
    with.
    """
    sizes = cfg.axis_sizes
    return 6 * count_matmul_params(cfg) + 12 * sizes["heads"] * sizes["head_dim"] * scored_positions(
        cfg, sequence_length
    )


def scored_positions(cfg: ModelConfig, sequence_length: int) -> int:
    """Keys that a query has scores with, summed over layers: the sequence, or the window where that is shorter.

    What the causal mask hides is counted, in a window as in a whole sequence.
    """
    n_windowed = 0 if not cfg.window else cfg.n_layers if cfg.windowed_layers == "all" else cfg.n_layers // 2
    return n_windowed * min(cfg.window, sequence_length) + (cfg.n_layers - n_windowed) * sequence_length


def peak_flops(n_devices: int) -> float | None:
    """Bfloat16 peak of so many devices together; None where the device is not in the table (a CPU)."""
    peak = peak_flops_of(jax.devices()[0].device_kind)
    return None if peak is None else peak * n_devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step as it stands in metrics.jsonl; what is None is undefined and left out.

    mfu: model FLOPs utilisation, `flops_per_token` x `tokens_per_second` / `peak_flops`; None where the peak is not
    known. noise_signal, noise_trace: the step's estimates of |G|^2 and tr(Sigma) of one sequence; ..._average: their
    running averages. noise_scale: B_simple in sequences, noise_scale_tokens: the same in tokens. All None without
    gradient accumulation (train/noise_scale.py).
    """

    step: int
    loss: float
    last_loss: float
    z_loss: float
    total_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    step_time: float
    mfu: float | None = None
    noise_signal: float | None = None
    noise_trace: float | None = None
    noise_signal_average: float | None = None
    noise_trace_average: float | None = None
    noise_scale: float | None = None
    noise_scale_tokens: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationMetrics:
    """One validation set at one step; loss in nats a token."""

    step: int
    validation: str
    loss: float
    perplexity: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationMetrics:
    """One evaluation task at one step: name of a metric -> value, with METRIC_stderr beside METRIC where known.

    The metrics stand in the line itself, beside "step" and "evaluation".
    """

    step: int
    evaluation: str
    metrics: Mapping[str, float]


AnyMetrics = StepMetrics | ValidationMetrics | EvaluationMetrics


def fields_of(metrics: AnyMetrics) -> dict[str, Any]:
    """The line of metrics.jsonl: fields that are None are left out, numbers that JSON has not (inf) are None."""
    fields = {k: v for k, v in vars(metrics).items() if v is not None}
    if isinstance(metrics, EvaluationMetrics):
        # A metric cannot hide which task it is of.
        fields = {"step": metrics.step, "evaluation": metrics.evaluation, **metrics.metrics, **fields}
        del fields["metrics"]
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def validation_metrics(step: int, name: str, loss: float) -> ValidationMetrics:
    """With the perplexity that belongs to the loss (infinite beyond what a float holds)."""
    return ValidationMetrics(
        step=step, validation=name, loss=loss, perplexity=math.exp(loss) if loss < 700 else math.inf
    )


class MetricsFile:
    """Appends one JSON object a line, each handed to the system as it is written.

    Raises:
        CheckpointError: from every method, when the disk is full or the file cannot be written; what was written
            before stands, followed at most by a torn line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, metrics: AnyMetrics) -> None:
        """One line."""
        line = (json.dumps(fields_of(metrics)) + "\n").encode()
        # Unbuffered: after a write that failed, nothing is left behind for closing to fail on once more.
        with self._errors():
            while line:
                line = line[os.write(self._descriptor, line) :]

    def sync(self) -> None:
        """Every line written so far is on the disk when this returns."""
        with self._errors():
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Syncs and closes."""
        try:
            self.sync()
        finally:
            os.close(self._descriptor)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: cannot be written ({error.strerror}); the newest checkpoint is untouched\n"
                "Free space there or make it writable; then repeat the command to go on."
            ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics.jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@dataclasses.dataclass(frozen=True)
class Curves:
    """The lines of metrics.jsonl by what they are of, each list in the order of the steps.

    validation: by set; evaluation: by task; both in the order in which they first appear.
    """

    training: list[dict[str, Any]]
    validation: dict[str, list[dict[str, Any]]]
    evaluation: dict[str, list[dict[str, Any]]]


def curves_of(lines: Iterable[dict[str, Any]]) -> Curves:
    """Sorts the lines that `read_metrics` gives."""
    curves = Curves([], {}, {})
    for line in lines:
        if "validation" in line:
            curves.validation.setdefault(line["validation"], []).append(line)
        elif "evaluation" in line:
            curves.evaluation.setdefault(line["evaluation"], []).append(line)
        else:
            curves.training.append(line)
    return curves
