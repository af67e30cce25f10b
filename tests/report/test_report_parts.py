"""The parts of a report by themselves: numbers, pictures, what is compared with what."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest

from mesh_transformer.report.charts import Line, interval, line_chart, number
from mesh_transformer.report.comparing import Compared, Estimate, compare_evaluations, compare_losses, most_moved
from mesh_transformer.report.observing import (
    Material,
    Observation,
    halves_of,
    log_probabilities,
    longest_shared_run,
    prompt_of,
)
from mesh_transformer.report.sections import text


def test_the_longest_shared_run_against_every_pair_of_slices() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        a, b = random.integers(0, 3, 9).tolist(), random.integers(0, 3, 7).tolist()
        slices = {tuple(b[i:j]) for i in range(8) for j in range(i, 8)}
        expected = max(j - i for i in range(10) for j in range(i, 10) if tuple(a[i:j]) in slices)
        assert longest_shared_run(a, b) == expected
    assert longest_shared_run([], [1]) == longest_shared_run([1], []) == 0


def test_a_row_is_cut_where_its_prompt_ends() -> None:
    assert halves_of(np.arange(7)) == ([0, 1, 2], [3, 4, 5, 6])
    supervised = np.array([~5, ~6, ~7, 8, 9, ~0, ~0])  # a prompt, what is learned, padding
    assert halves_of(supervised) == ([5, 6, 7], [8, 9])
    assert prompt_of(supervised) == [5, 6, 7]
    assert halves_of(np.array([~1, ~2, 3])) is None
    assert len(halves_of(np.arange(300))[1]) == 64  # type: ignore[index]


class _Model:
    """Logits that are a function of the token and its place."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        place = np.arange(tokens.shape[1])[None, :, None]
        return np.sin(tokens[..., None] * 1.7 + place + np.arange(5)).astype(np.float32) * 30


def test_log_probabilities_of_what_is_learned() -> None:
    rows = np.array([[1, 2, ~3, 0], [4, ~0, 1, 2]])
    found = log_probabilities(_Model(), rows)  # type: ignore[arg-type]
    ids = np.array([[1, 2, 3, 0], [4, 0, 1, 2]])
    for row, t in np.ndindex(2, 3):
        if rows[row, t + 1] < 0:
            assert math.isnan(found[row, t])
            continue
        logits = 30 * np.sin(ids[row, t] * 1.7 + t + np.arange(5))
        expected = logits[ids[row, t + 1]] - math.log(sum(math.exp(x) for x in logits))
        assert found[row, t] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def observation(log_probs: list[list[float]]) -> Observation:
    return Observation(samples=[], log_probs={"set": np.array(log_probs)}, copied={})


def test_losses_are_compared_over_pairs() -> None:
    before = observation([[-2.0, math.nan], [-3.0, -5.0], [-1.0, -1.0]])
    after = observation([[-1.0, math.nan], [-2.5, -4.5], [-1.0, -0.0]])
    (found,) = compare_losses(before, after)
    assert found.before is not None and found.change is not None
    assert found.before.mean == pytest.approx((2 + 4 + 1) / 3)
    changes = [-1.0, -0.5, -0.5]
    assert found.change.mean == pytest.approx(np.mean(changes))
    assert found.change.error == pytest.approx(np.std(changes, ddof=1) / math.sqrt(3))
    assert compare_losses(None, after)[0].before is None


def test_the_tokens_that_moved_most_in_their_places() -> None:
    rows = np.array([[10, 11, 12, 13, 14], [20, 21, ~22, 23, 24], [10, 11, 12, 13, 14]])
    before = observation([[-1.0, -2.0, -3.0, -4.0], [-1.0, math.nan, -1.0, -1.0], [-1.0, -2.0, -3.0, -4.0]])
    after = observation([[-1.5, -2.0, -0.5, -3.9], [-5.0, math.nan, -1.0, -0.2], [-1.4, -2.0, -0.4, -3.9]])
    gained, lost = most_moved(Material(prompts=[], held_out={"set": rows}, training=rows), before, after, 2)
    assert [(one.token, one.context) for one in gained] == [(13, [10, 11, 12]), (24, [20, 21, 22, 23])]
    assert gained[0].change == pytest.approx(2.6) and gained[0].rest == [14]
    assert [one.token for one in lost] == [21, 11]


def test_evaluations_first_against_last() -> None:
    lines: dict[str, list[dict[str, Any]]] = {
        "a": [
            {"step": 5, "evaluation": "a", "acc": 0.25, "acc_stderr": 0.03},
            {
                "step": 9,
                "evaluation": "a",
                "acc": 0.5,
                "acc_stderr": None,
                "exact,strict": 1,
                "exact_stderr,strict": 0.1,
            },
        ],
        "once": [{"step": 9, "evaluation": "once", "acc": 0.75}],
    }
    assert compare_evaluations(lines) == [
        ("a", 5, 9, Compared("acc", Estimate(0.25, 0.03), Estimate(0.5, None))),
        ("a", 5, 9, Compared("exact,strict", None, Estimate(1.0, 0.1))),
        ("once", 9, 9, Compared("acc", None, Estimate(0.75, None))),
    ]


def numbers_of(path: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?[\d.]+", path)]


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [3.0, 2.0, 1.0],
        [5.0],
        [2.0, 2.0],
        [1e-9, 1e9],
        [float("nan"), 1.0, float("inf"), 2.0],
        [1e-5 * n for n in range(1, 5000)],
        [-1.0, 4.0],
        [0.0, 0.0],
    ],
    ids=["falling", "one", "alike", "far apart", "not finite", "many", "below zero", "zero"],
)
def test_a_chart_is_well_formed_and_within_its_picture(values: list[float], logarithmic: bool) -> None:
    points = list(enumerate(values, start=1))
    chart = line_chart("a < b", [Line("<&>", points)], x="steps", y="y", logarithmic=logarithmic)
    if logarithmic and not any(v > 0 for v in values):
        assert chart == ""
        return
    lines = ElementTree.fromstring(chart).findall(".//path[@class='line']")
    assert len(lines) == 1 and len(lines[0].get("d", "")) < 20_000
    places = numbers_of(lines[0].get("d", ""))
    assert all(66 <= x <= 640 for x in places[::2]) and all(0 <= y <= 280 for y in places[1::2])
    n_drawn = sum(math.isfinite(v) and (v > 0 or not logarithmic) for v in values)
    assert len(places) // 2 == min(n_drawn, len(places) // 2) > 0


def test_a_lower_value_is_drawn_lower() -> None:
    chart = ElementTree.fromstring(line_chart("t", [Line("l", [(0, 1.0), (10, 3.0)])], x="x", y="y"))
    left, low, right, high = numbers_of(chart.find(".//path[@class='line']").get("d", ""))  # type: ignore[union-attr]
    assert left < right and low > high  # pictures count downwards


def test_nothing_to_draw_draws_nothing() -> None:
    assert line_chart("t", [Line("a", []), Line("b", [(1, math.nan)])], x="x", y="y") == ""
    assert interval(None, Estimate(math.nan, None)) == ""
    ElementTree.fromstring(interval(Estimate(1.0, None), Estimate(1.0, None)))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1234567, "1.23e+06"), (1500, "1,500"), (0.25, "0.25"), (2.0, "2"), (1e-5, "1e-05"), (100, "100")],
)
def test_numbers_are_short(value: float, shown: str) -> None:
    assert number(value) == shown


def test_text_is_text() -> None:
    assert text("<b>&\x00\x1b\u202e") == '<bdi dir="auto">&lt;b&gt;&amp;\ufffd\ufffd\u202e</bdi>'
