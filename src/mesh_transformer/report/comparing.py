"""Before against after, in numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mesh_transformer.report.observing import Material, Observation, ids_of

_CONTEXT = 14  # tokens shown before one that moved
_AFTER = 4
# Change in nats, set, row, position.
_Entry = tuple[float, str, int, int]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; the error is None where it is not known."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        """Of independent values, those that are NaN left out."""
        values = values[np.isfinite(values)]
        if not values.size:
            return cls(math.nan, None)
        error = float(np.std(values, ddof=1) / math.sqrt(values.size)) if values.size > 1 else None
        return cls(float(np.mean(values)), error)


@dataclasses.dataclass(frozen=True)
class Compared:
    """One figure before and after; change: their difference where it is known better than from the two alone."""

    name: str
    before: Estimate | None
    after: Estimate
    change: Estimate | None = None


def compare_losses(before: Observation | None, after: Observation) -> list[Compared]:
    """Loss of each held-out set over its sequences, in nats a token; the change is over pairs of the same sequence."""
    found = []
    for name in after.log_probs:
        now = after.losses(name)
        then = before.losses(name) if before else None
        found.append(
            Compared(
                name,
                None if then is None else Estimate.of(then),
                Estimate.of(now),
                None if then is None else Estimate.of(now - then),
            )
        )
    return found


def compare_evaluations(evaluation: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, int, int, Compared]]:
    """(task, first step, last step, metric) from the lines of metrics.jsonl; before is None where there is one line."""
    found = []
    for task, lines in evaluation.items():
        first, last = lines[0], lines[-1]
        for metric, value in last.items():
            if metric in ("step", "evaluation") or "_stderr" in metric or not isinstance(value, int | float):
                continue
            after = Estimate(float(value), _error(last, metric))
            then = first.get(metric)
            before = Estimate(float(then), _error(first, metric)) if len(lines) > 1 and then is not None else None
            found.append((task, int(first["step"]), int(last["step"]), Compared(metric, before, after)))
    return found


def _error(line: Mapping[str, Any], metric: str) -> float | None:
    name, _, rest = metric.partition(",")  # a filter of lm-evaluation-harness follows a comma
    error = line.get(f"{name}_stderr{',' + rest if rest else ''}")
    return float(error) if isinstance(error, int | float) and math.isfinite(error) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    """A token whose probability changed. before, after: log-probabilities in nats; the rest: token ids around it."""

    before: float
    after: float
    context: list[int]
    token: int
    rest: list[int]

    @property
    def change(self) -> float:
        """Nats; positive where the token became more likely."""
        return self.after - self.before


def most_moved(material: Material, before: Observation, after: Observation, n: int) -> tuple[list[Moved], list[Moved]]:
    """The `n` tokens of all held-out rows that gained most, and the `n` that lost most, both from the most on."""
    found: list[_Entry] = []
    for name in material.held_out:
        change = after.log_probs[name] - before.log_probs[name]
        for row, t in zip(*np.nonzero(np.isfinite(change)), strict=True):
            found.append((float(change[row, t]), name, int(row), int(t)))
    found.sort()

    def told(entry: _Entry) -> Moved:
        _, name, row, t = entry
        ids = ids_of(material.held_out[name][row]).tolist()
        return Moved(
            before=float(before.log_probs[name][row, t]),
            after=float(after.log_probs[name][row, t]),
            context=ids[max(0, t + 1 - _CONTEXT) : t + 1],
            token=ids[t + 1],
            rest=ids[t + 2 : t + 2 + _AFTER],
        )

    def first(entries: Iterable[_Entry]) -> list[Moved]:
        """`n` of them; a token in a context that was there before is the same token."""
        different: dict[tuple[int, ...], Moved] = {}
        for one in map(told, entries):
            different.setdefault((*one.context, one.token), one)
            if len(different) == n:
                break
        return list(different.values())

    return first(e for e in reversed(found) if e[0] > 0), first(e for e in found if e[0] < 0)
