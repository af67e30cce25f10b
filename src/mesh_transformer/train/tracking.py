"""What TensorBoard and Weights & Biases are told alike: names of curves, and the value of each."""

from __future__ import annotations

import math
from typing import Any

from mesh_transformer.config.errors import UserError
from mesh_transformer.config.run import RunConfig
from mesh_transformer.train.metrics import AnyMetrics, StepMetrics, ValidationMetrics, fields_of


def curves_for(metrics: AnyMetrics) -> dict[str, float]:
    """Curve -> value: train/loss, noise/scale, validation/SET/loss, evaluation/TASK/METRIC; only what is finite."""
    if isinstance(metrics, StepMetrics):
        curves = {_step_curve(field): value for field, value in fields_of(metrics).items()}
    else:
        kind = "validation" if isinstance(metrics, ValidationMetrics) else "evaluation"
        fields = fields_of(metrics)
        curves = {f"{kind}/{fields[kind]}/{field}": value for field, value in fields.items() if field != kind}
    return {name: float(value) for name, value in curves.items() if not name.endswith("/step") and _is_number(value)}


def _step_curve(field: str) -> str:
    return f"noise/{field.removeprefix('noise_')}" if field.startswith("noise_") else f"train/{field}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_tracking(run: RunConfig) -> None:
    """Returns if what the run is to be logged to is installed; nothing is imported.

    Raises:
        UserError: `log.wandb_project` is set and the package is missing.
    """
    from mesh_transformer.train import wandb

    if run.log.wandb_project and not wandb.is_installed():
        raise UserError(
            f'log.wandb_project = "{run.log.wandb_project}" needs the package wandb, which is not installed\n'
            "install it with: pip install 'mesh-transformer[wandb]'; or leave log.wandb_project out"
        )
