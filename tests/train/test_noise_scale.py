"""The gradient noise scale against NumPy, on the gradients of single sequences."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from run_cases import Listener, Toy, lines, terminate, timeless

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import TrainConfig
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.train.noise_scale import NoiseAverages, NoiseScale
from mesh_transformer.train.run import train
from mesh_transformer.train.state import initial_state
from mesh_transformer.train.step import StepReport, make_train_step

MODEL = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_ff=24, n_vocab=40, n_ctx=8, d_rotary=4)
POLICY = ComputePolicy(unroll=False)
BATCH, T = 8, 8
ROWS = np.random.default_rng(0).integers(0, 40, (BATCH, T + 1)).astype(np.int32)


@functools.cache
def gradients_of_sequences() -> np.ndarray:
    """float64 [sequences, parameters]: of the loss of every sequence by itself."""
    params = initial_state(MODEL, TrainConfig(steps=1, learning_rate=1.0), 0).params
    total = lambda p, row: loss_report(p, row[None], MODEL, POLICY).total  # noqa: E731
    loss = jax.jit(jax.grad(total), compiler_options=QUICKLY)
    each = [jax.tree.leaves(loss(params, row)) for row in ROWS]
    return np.array([np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves]) for leaves in each])


# The formulas are the same in machine code that was made with little care, and in a third of the time.
QUICKLY = {"xla_backend_optimization_level": 0}


@functools.cache
def step_of(parts: int) -> tuple[TrainConfig, Any]:
    """A training step in so many parts, and how it trains."""
    how = TrainConfig(steps=4, batch_size=BATCH, gradient_accumulation=parts, learning_rate=1e-3, z_loss=0.0)
    return how, jax.jit(make_train_step(MODEL, how, POLICY), compiler_options=QUICKLY)


def report_of(parts: int, rows: np.ndarray = ROWS) -> StepReport:
    how, step = step_of(parts)
    return step(initial_state(MODEL, how, 0), rows.reshape(parts, BATCH // parts, T + 1))[1]


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_one_step_against_numpy(parts: int) -> None:
    each, small = gradients_of_sequences(), BATCH // parts
    whole = np.sum(each.mean(axis=0) ** 2)
    mean_square = np.mean([np.sum(part.mean(axis=0) ** 2) for part in each.reshape(parts, small, -1)])
    report = report_of(parts)
    assert report.noise_signal is not None and report.noise_trace is not None
    signal = (BATCH * whole - small * mean_square) / (BATCH - small)
    trace = (mean_square - whole) / (1 / small - 1 / BATCH)
    assert float(report.noise_signal) == pytest.approx(signal, rel=1e-4)
    assert float(report.noise_trace) == pytest.approx(trace, rel=1e-4)


def test_with_parts_of_one_sequence_the_trace_is_the_variance_that_numpy_computes() -> None:
    """By another formula, that of the sample covariance."""
    trace = np.sum(np.var(gradients_of_sequences(), axis=0, ddof=1))
    assert float(report_of(8).noise_trace) == pytest.approx(trace, rel=1e-4)  # type: ignore[arg-type]


def test_both_estimates_are_unbiased() -> None:
    """Their mean over every way to draw a batch of four out of the eight, in two parts, is that of the population."""
    each = gradients_of_sequences()
    random = np.random.default_rng(1)
    found = []
    for _ in range(4000):
        drawn = each[random.integers(0, BATCH, 4)][:, :300]
        whole = np.sum(drawn.mean(axis=0) ** 2)
        mean_square = np.mean(np.sum(drawn.reshape(2, 2, -1).mean(axis=1) ** 2, axis=-1))
        found.append(((4 * whole - 2 * mean_square) / 2, (mean_square - whole) / (1 / 2 - 1 / 4)))
    signal, trace = np.mean(found, axis=0)
    error = np.std(found, axis=0) / math.sqrt(len(found))
    assert abs(signal - np.sum(each[:, :300].mean(axis=0) ** 2)) < 5 * error[0]
    assert abs(trace - np.sum(np.var(each[:, :300], axis=0))) < 5 * error[1]


def test_sequences_all_alike_have_no_noise() -> None:
    report = report_of(4, np.repeat(ROWS[:1], BATCH, axis=0))
    assert float(report.noise_signal) == pytest.approx(float(report.grad_norm) ** 2, rel=1e-5)  # type: ignore[arg-type]
    assert abs(float(report.noise_trace)) < 1e-5 * float(report.noise_signal)  # type: ignore[arg-type]


def test_without_accumulation_nothing_is_known() -> None:
    report = report_of(1)
    assert report.noise_signal is None and report.noise_trace is None


def test_averages_are_unbiased_from_the_first_step_on() -> None:
    averages = NoiseAverages(0.1)
    signals, traces = [2.0, -1.0, 4.0, 3.0], [30.0, 10.0, 20.0, 5.0]
    for n, (signal, trace) in enumerate(zip(signals, traces, strict=True), start=1):
        found = averages.add(signal, trace)
        weights = 0.9 ** np.arange(n)[::-1]
        assert found.signal_average == pytest.approx(np.average(signals[:n], weights=weights))
        assert found.trace_average == pytest.approx(np.average(traces[:n], weights=weights))
        assert found.scale == pytest.approx(found.trace_average / found.signal_average)


def test_averages_of_a_run_that_goes_on_are_the_same_to_the_last_bit() -> None:
    random = np.random.default_rng(2)
    estimates: list[Any] = [{"noise_signal": s, "noise_trace": t} for s, t in random.normal(1, 3, (50, 2)).tolist()]
    whole = NoiseAverages(0.01)
    expected = [whole.add(**{k.removeprefix("noise_"): v for k, v in line.items()}) for line in estimates]
    for cut in (0, 1, 30):
        resumed = NoiseAverages(0.01)
        resumed.add_lines([{"step": 1, "loss": 2.0}, *estimates[:cut], {"step": 1, "validation": "x"}])
        assert [resumed.add(line["noise_signal"], line["noise_trace"]) for line in estimates[cut:]] == expected[cut:]


def test_a_run_that_goes_on_writes_the_lines_of_one_that_was_never_stopped(
    tmp_path: Path, toy: Toy, quick_compile: None
) -> None:
    whole = toy.run(tmp_path / "whole", gradient_accumulation=2)
    train(whole, Listener())
    stopped = toy.run(tmp_path / "stopped", gradient_accumulation=2)
    train(stopped, Listener(on_step={7: terminate}))
    train(stopped, Listener())
    assert timeless(stopped) == timeless(whole)
    last = lines(whole)[-3]
    assert last["step"] == 12 and last["noise_scale_tokens"] == 16 * last["noise_scale"]
    averages = NoiseAverages(whole.train.noise_scale_alpha)
    averages.add_lines(lines(whole)[:-3])
    again = averages.add(last["noise_signal"], last["noise_trace"])
    assert (again.signal_average, again.trace_average) == (last["noise_signal_average"], last["noise_trace_average"])


@pytest.mark.parametrize(("signal", "trace"), [(0.0, 1.0), (-1.0, 2.0), (1.0, -2.0), (5e-324, 1e308)])
def test_no_scale_where_there_is_no_positive_ratio(signal: float, trace: float) -> None:
    assert NoiseAverages(1.0).add(signal, trace) == NoiseScale(signal, trace, None)
