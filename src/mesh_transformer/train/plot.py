"""The loss curve of a run as a picture."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.files import write_atomically
from mesh_transformer.train.metrics import curves_of


def plot_loss(
    records: list[dict[str, Any]], target: Path, title: str, baselines: Mapping[str, float] | None = None
) -> None:
    """Draws training and validation loss (nats a token) against steps, and against minutes of training on top.

    Args:
        records: the lines of metrics.jsonl.
        baselines: name -> loss, drawn as level lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = curves_of(records)
    training = curves.training
    if not training:
        return
    steps = np.array([r["step"] for r in training])
    minutes = np.cumsum([r["step_time"] for r in training]) / 60
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, [r["loss"] for r in training], linewidth=0.8, alpha=0.7, label="training")
    for name, points in sorted(curves.validation.items()):
        axes.plot([r["step"] for r in points], [r["loss"] for r in points], marker="o", markersize=3, label=name)
    for i, (name, loss) in enumerate((baselines or {}).items()):
        axes.axhline(loss, linestyle="--", linewidth=1, color=f"0.{3 + 2 * i}", label=f"{name} {loss:.2f}")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    if len(steps) > 1:
        to_minutes = functools.partial(np.interp, xp=steps, fp=minutes)
        to_steps = functools.partial(np.interp, xp=minutes, fp=steps)
        top = axes.secondary_xaxis("top", functions=(to_minutes, to_steps))
        top.set_xlabel("minutes of training")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(target, picture.getvalue())
