"""What a run reports: throughput, MFU, metrics.jsonl."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import count_matmul_params

# Dense bfloat16 peak of one device in FLOP/s, from the makers' data sheets, by how the name that JAX reports begins;
# the longest beginning counts.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "TPU v2": 45e12 / 2,  # a device is one of the two cores of a chip
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p's own name
    "TPU v6 lite": 918e12,
}


def flops_per_token(cfg: ModelConfig, sequence_length: int) -> int:
    """Model FLOPs of training on one token, forward and backward, recomputation not counted.

    6 per parameter of every matrix that a token is multiplied with (the embedding is a lookup), and
    12 n_layers sequence_length d_model for the two attention products.
    """
    return 6 * count_matmul_params(cfg) + 12 * cfg.n_layers * sequence_length * cfg.n_heads * cfg.d_head


def peak_flops(n_devices: int) -> float | None:
    """Peak of so many devices together; None where the device is not in the table (a CPU)."""
    kind = jax.devices()[0].device_kind
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] * n_devices if known else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step as it stands in metrics.jsonl."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationMetrics:
    """One validation set at one step; loss in nats a token."""

    step: int
    validation: str
    loss: float
    perplexity: float


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

    def write(self, metrics: StepMetrics | ValidationMetrics) -> None:
        """One line; fields that are None are left out, numbers that JSON has not (inf) are null."""
        fields = {k: v for k, v in dataclasses.asdict(metrics).items() if v is not None}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        line = (json.dumps(finite) + "\n").encode()
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
