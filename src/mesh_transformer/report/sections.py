"""The sections of a report that come from the run directory alone, and what all sections share."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mesh_transformer.report.charts import Line, interval, line_chart, number
from mesh_transformer.report.comparing import Compared, Estimate, compare_evaluations
from mesh_transformer.report.facts import Facts

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def text(value: str) -> str:
    """Text as HTML: nothing of it is markup, and what cannot be seen or would turn the page around can be seen."""
    shown = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", value)
    return f'<bdi dir="auto">{html.escape(shown)}</bdi>'


def section(title: str, *parts: str) -> str:
    """A section with a heading."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(words: str, *, quiet: bool = False) -> str:
    """A paragraph of plain words."""
    return f"<p{' class=quiet' if quiet else ''}>{html.escape(words)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Cells are HTML already; numbers: columns that stand on the right."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td{' class=n' if i in numbers else ''}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def estimate(value: Estimate | None, *, signed: bool = False) -> str:
    """A mean with its standard error."""
    if value is None or not math.isfinite(value.mean):
        return "&ndash;"
    mean = f"{value.mean:+.4f}" if signed else f"{value.mean:.4f}"
    return mean if value.error is None else f"{mean} &plusmn; {value.error:.4f}"


def compared_rows(found: Sequence[Compared]) -> list[list[str]]:
    """Cells: before, after, change, picture."""
    return [
        [
            estimate(one.before),
            estimate(one.after),
            estimate(_change(one), signed=True),
            interval(one.before, one.after),
        ]
        for one in found
    ]


def _change(one: Compared) -> Estimate | None:
    if one.change is not None or one.before is None:
        return one.change
    errors = one.before.error, one.after.error
    error = math.hypot(errors[0], errors[1]) if errors[0] is not None and errors[1] is not None else None
    return Estimate(one.after.mean - one.before.mean, error)


def beginning(facts: Facts) -> str:
    """Heading, what the run is, and the command that repeats it."""
    run, training = facts.run, facts.curves.training
    steps = training[-1]["step"] if training else 0
    began = facts.began_from
    origin = "random parameters" if began is None else str(began.get("path"))
    how = "LoRA" if run.lora else "all parameters"
    rows = [
        ["model", text(f"{run.model.n_layers} layers, width {run.model.d_model}, {run.model.n_vocab} ids")],
        ["began from", text(origin)],
        ["trained", text(how)],
        ["steps", text(f"{steps:,} of {run.train.steps:,}" if run.train.steps else f"{steps:,}")],
        ["sequences a step", text(f"{run.train.batch_size:,} of {run.data.sequence_length:,} tokens")],
        *_time_rows(training),
        ["checkpoints kept", text(", ".join(map(str, facts.steps)) or "none")],
        *[[name.replace("_", " "), text(str(facts.metadata[name]))] for name in _VERSIONS if name in facts.metadata],
    ]
    return "".join(
        [
            f"<h1>{text(run.name)}</h1><p class=quiet>{text(str(facts.path))}</p>",
            table(["", ""], rows),
            f"<h3>To repeat it</h3><pre>{html.escape(facts.command)}</pre>",
            _repeat_note(facts),
        ]
    )


_VERSIONS = ("project_version", "jax_version")


def _repeat_note(facts: Facts) -> str:
    words = "config.toml holds every value, defaults included. "
    if facts.began_from is not None:
        words += (
            "Whether --fresh-optimizer, --keep-schedule or --init-step was given is not recorded; add what was. "
            "The model that the run began from must be what it was then."
        )
    return paragraph(words, quiet=True)


def _time_rows(training: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    if not training:
        return [["time", text("no step has been taken")]]
    seconds = sum(line["step_time"] for line in training)
    rates = [line["tokens_per_second"] for line in training]
    rows = [
        ["time in steps", text(f"{duration(seconds)} (validation, evaluation, saving and compiling not counted)")],
        ["tokens", text(f"{training[-1]['tokens']:,}")],
        ["speed", text(f"{np.median(rates):,.0f} tokens a second (median of the steps)")],
    ]
    shares = [line["mfu"] for line in training if line.get("mfu") is not None]
    if shares:
        rows.append(["share of the peak (MFU)", text(f"{np.median(shares):.1%} (median of the steps)")])
    return rows


def duration(seconds: float) -> str:
    """As a person says it."""
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{hours:.1f} hours" if hours >= 2 else f"{minutes:.1f} minutes" if minutes >= 2 else f"{seconds:.1f} seconds"
    )


def configuration(facts: Facts) -> str:
    """config.toml, and how it was changed on the way."""
    parts = [f"<details><summary>config.toml</summary><pre>{html.escape(facts.config_text)}</pre></details>"]
    rows = [
        [str(change["step"]), text(key), text(json.dumps(old)), text(json.dumps(new))]
        for change in facts.changes
        for key, (old, new) in change["changed"].items()
    ]
    if rows:
        parts.append("<h3>Changed on the way</h3>" + table(["from step", "key", "before", "since"], rows))
    return section("Configuration", *parts)


def curves(facts: Facts) -> str:
    """Loss, rate, norm, speed, noise scale."""
    training = facts.curves.training
    if not training:
        return section("Curves", paragraph("metrics.jsonl holds no training step."))

    def points(field: str, lines: Sequence[Mapping[str, Any]] = training) -> list[tuple[float, float]]:
        return [(line["step"], line[field]) for line in lines if line.get(field) is not None]

    sets = facts.curves.validation.items()
    steps = "optimizer steps"
    charts = [
        line_chart(
            "Loss",
            [Line("training", points("loss")), *(Line(n, points("loss", lines), marks=True) for n, lines in sets)],
            x=steps,
            y="nats a token",
        ),
        line_chart("Learning rate", [Line("learning rate", points("learning_rate"))], x=steps, y="rate"),
        line_chart(
            "Norm of the gradient, before clipping",
            [Line("norm", points("grad_norm"))],
            x=steps,
            y="norm",
            logarithmic=True,
        ),
        line_chart("Speed", [Line("speed", points("tokens_per_second"))], x=steps, y="tokens a second"),
        line_chart(
            "Gradient noise scale",
            [Line("B_simple", points("noise_scale"))],
            x=steps,
            y="sequences",
            logarithmic=True,
        ),
    ]
    return section("Curves", f"<div class=charts>{''.join(charts)}</div>", _noise_words(facts))


def _noise_words(facts: Facts) -> str:
    last = next((line for line in reversed(facts.curves.training) if line.get("noise_scale") is not None), None)
    if last is not None:
        return paragraph(
            f"Gradient noise scale at the end: {number(last['noise_scale'])} sequences, "
            f"{number(last['noise_scale_tokens'])} tokens; a step had {facts.run.train.batch_size}. Far below it, a "
            "larger batch saves steps; far above it, it saves little."
        )
    if facts.run.train.gradient_accumulation == 1:
        why = "it is estimated from the parts of a batch, and train.gradient_accumulation is 1."
    else:
        why = "its running averages had no positive ratio yet."
    return paragraph(f"No gradient noise scale: {why}", quiet=True)


def validation(facts: Facts) -> str:
    """Every validation set at its first, best and last pass."""
    if not facts.curves.validation:
        return section("Validation", paragraph("No validation set was read: data.validation or train.validate_every."))
    rows = []
    for name, lines in facts.curves.validation.items():
        finite = [line for line in lines if line["loss"] is not None]
        if finite:
            best = min(finite, key=lambda line: line["loss"])
            rows.append([text(name), *(_validation_cell(line) for line in (finite[0], best, finite[-1]))])
    words = "Mean cross-entropy in nats a token, with its perplexity, over the batches that validation reads."
    return section("Validation", paragraph(words), table(["set", "first", "best", "last"], rows))


def _validation_cell(line: Mapping[str, Any]) -> str:
    perplexity = line.get("perplexity")
    shown = "" if perplexity is None else f" (perplexity {number(perplexity)})"
    return f"{line['loss']:.4f}{shown}<br><span class=quiet>step {line['step']:,}</span>"


def evaluation(facts: Facts) -> str:
    """The tasks that were evaluated during the run."""
    lines = facts.curves.evaluation
    if not lines:
        asked = facts.run.evaluate
        why = (
            "No task was evaluated during the run: evaluate.tasks is empty or evaluate.every is 0."
            if not asked.tasks or not asked.every
            else "No task has been evaluated yet."
        )
        return section("Evaluation", paragraph(f"{why} `mesh-transformer evaluate` evaluates a model by itself."))
    found = compare_evaluations(lines)
    rows = [
        [text(task), text(one.name), f"{first:,} to {last:,}", *cells]
        for (task, first, last, one), cells in zip(found, compared_rows([one for *_, one in found]), strict=True)
    ]
    head = ["task", "metric", "steps", "first", "last", "change", "first above last"]
    words = "The first and the last evaluation during the run, with one standard error as the harness gives it."
    return section(
        "Evaluation",
        paragraph(words),
        table(head, rows, numbers=(3, 4, 5)),
        f"<div class=charts>{''.join(_task_chart(task, of_task) for task, of_task in lines.items())}</div>",
    )


def _task_chart(task: str, lines: Sequence[Mapping[str, Any]]) -> str:
    if len(lines) < 2:
        return ""
    found = []
    for metric in lines[-1]:
        if metric in ("step", "evaluation") or "_stderr" in metric:
            continue
        points = [(line["step"], line[metric]) for line in lines if isinstance(line.get(metric), int | float)]
        errors = [line.get(f"{metric}_stderr") for line in lines if isinstance(line.get(metric), int | float)]
        found.append(Line(metric, points, marks=True, errors=errors))
    return line_chart(task, found, x="optimizer steps", y="metric")
