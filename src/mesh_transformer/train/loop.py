"""The training loop, in the open: a batch, a step, a line of metrics; now and then a validation or a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from mesh_transformer.config.errors import RunError
from mesh_transformer.config.run import RunConfig
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.processes import Watchdog
from mesh_transformer.sharding.batches import Batches
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout
from mesh_transformer.train.metrics import (
    EvaluationMetrics,
    StepMetrics,
    ValidationMetrics,
    flops_per_token,
    peak_flops,
    validation_metrics,
)
from mesh_transformer.train.state import TrainState
from mesh_transformer.train.step import StepReport, make_train_step, make_validation_step

# Parameters -> task -> metric -> value.
Evaluate = Callable[[Any], Mapping[str, Mapping[str, float]]]


@runtime_checkable
class Observer(Protocol):
    """Who is told what happens; the terminal and metrics.jsonl listen through this."""

    def note(self, text: str) -> None: ...
    def step(self, metrics: StepMetrics) -> None: ...
    def validation(self, metrics: ValidationMetrics) -> None: ...
    def evaluation(self, metrics: EvaluationMetrics) -> None: ...


class Silence:
    """An observer that says nothing: that of every process but the first."""

    def note(self, text: str) -> None:
        pass

    def step(self, metrics: StepMetrics) -> None:
        pass

    def validation(self, metrics: ValidationMetrics) -> None:
        pass

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run, and for how many devices; compiling consumes no batch and takes no step."""

    step: Callable[[TrainState, Any], tuple[TrainState, StepReport]]
    validate: Callable[[Any, Any], Any]
    n_devices: int


def compile_programs(
    run: RunConfig,
    state: Any,
    policy: ComputePolicy,
    layout: Layout = ONE_DEVICE_LAYOUT,
    separator: int | None = None,
) -> Programs:
    """Compiles for the shapes and shardings of `state` (arrays or abstract) and of the run's batches.

    separator: as for `make_train_step`.
    """
    # The state is donated: the old parameters and moments are overwritten in place.
    train_step = make_train_step(run.model, run.train, policy, layout.rules, lora=run.lora, separator=separator)
    step = jax.jit(train_step, donate_argnums=0)
    validate = jax.jit(make_validation_step(run.model, policy, layout.rules, separator=separator))
    with layout.using():
        return Programs(
            step=step.lower(state, train_batches(run, layout).abstract).compile(),
            validate=validate.lower(state.params, validation_batches_of(run, layout).abstract).compile(),
            n_devices=layout.sizes.n_devices,
        )


def micro_batch_size(run: RunConfig) -> int:
    """Sequences whose activations exist at one time."""
    return run.train.batch_size // run.train.gradient_accumulation


def train_batches(run: RunConfig, layout: Layout) -> Batches:
    """The batches of an optimizer step."""
    return Batches(
        layout=layout,
        batch_size=run.train.batch_size,
        width=run.data.sequence_length + 1,
        parts=run.train.gradient_accumulation,
    )


def validation_batches_of(run: RunConfig, layout: Layout) -> Batches:
    """The batches of validation, as large as what a step computes with at one time."""
    return Batches(layout=layout, batch_size=micro_batch_size(run), width=run.data.sequence_length + 1)


class StopRequest:
    """Set by SIGTERM or SIGINT while active; the loop then saves and leaves after the step in hand.

    Python gives signals to the main thread only: on another thread nothing is caught.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        catches = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT) if catches else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:  # asked twice: leave at once
            raise KeyboardInterrupt
        self.signal = number


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended: the state, the sequences consumed, and the signal that stopped it early, if one did.

    saved: step of the newest checkpoint, 0 if there is none.
    """

    state: TrainState
    position: int
    saved: int
    stopped_by: int | None


def train_loop(
    run: RunConfig,
    state: TrainState,
    position: int,
    programs: Programs,
    *,
    saved: int,
    batches: Iterator[Any],
    validation_sets: Mapping[str, Callable[[], Iterator[Any]]],
    evaluate: Evaluate | None,
    save: Callable[[TrainState, int], None],
    observer: Observer,
    stop: Callable[[int], int | None],
    watchdog: Watchdog,
) -> Outcome:
    """Steps from `state` to `run.train.steps`.

    Args:
        position: sequences consumed so far; `batches` continues from there, each batch as the step takes it.
        saved: step of the newest checkpoint, 0 if there is none.
        evaluate: the tasks of `run.evaluate`.
        save: called with the state and the position after steps that are to be kept.
        stop: asked with the number of steps finished; the signal to stop by now, None to go on.
        watchdog: told of every step; it is paused while anything else is done.

    Raises:
        RunError: the loss of a step, in training or validation, is not finite; nothing of that step is saved.
    """
    meter = _Meter(run, programs.n_devices)
    step = int(state.step)
    # Asked once a step: a signal that comes after the answer has its step saved by the next round.
    stopped_by = stop(step)
    while step < run.train.steps and stopped_by is None:
        state, report = programs.step(state, next(batches))
        step += 1
        position += run.train.batch_size
        metrics = meter.measure(step, position, report)
        watchdog.beat(step)
        if not math.isfinite(metrics.total_loss) or not math.isfinite(metrics.grad_norm):
            raise RunError(
                f"step {step}: loss {metrics.total_loss} and gradient norm {metrics.grad_norm} are not both finite "
                f"(batch of sequences {position - run.train.batch_size} to {position - 1} of the data order); "
                f"{_what_is_left(saved)}"
            )
        observer.step(metrics)
        last = step == run.train.steps
        if _due(step, run.train.validate_every, last):
            with watchdog.paused():
                _validate(step, state.params, programs, validation_sets, observer, saved)
        if evaluate and _due(step, run.evaluate.every, last):
            with watchdog.paused():
                for task, found in evaluate(state.params).items():
                    observer.evaluation(EvaluationMetrics(step=step, evaluation=task, metrics=found))
        stopped_by = stop(step)
        if _due(step, run.train.checkpoint_every, last) or stopped_by is not None:
            with watchdog.paused():
                save(state, position)
            saved = step
        meter.resume()
    return Outcome(state, position, saved, stopped_by)


def _validate(
    step: int,
    params: Any,
    programs: Programs,
    validation_sets: Mapping[str, Callable[[], Iterator[Any]]],
    observer: Observer,
    saved: int,
) -> None:
    for result in validate(step, params, programs, validation_sets):
        if not math.isfinite(result.loss):
            raise RunError(
                f"step {step}: loss {result.loss} on validation set {result.validation!r} is not finite; "
                f"{_what_is_left(saved)}"
            )
        observer.validation(result)


def validate(
    step: int, params: Any, programs: Programs, validation_sets: Mapping[str, Callable[[], Iterator[Any]]]
) -> Iterator[ValidationMetrics]:
    """One ordered pass over each set (at most `validation_batches` batches); gives the mean loss of each."""
    for name, batches in validation_sets.items():
        found = [tuple(map(float, jax.device_get(programs.validate(params, rows)))) for rows in batches()]
        losses, counts = np.array(found).T
        if not counts.any():
            raise RunError(
                f"validation set {name!r}: no token of what is read of it is learned, so it has no loss\n"
                "raise train.validation_batches, or take the set out of data.validation"
            )
        yield validation_metrics(step, name, float(np.average(losses, weights=counts)))


def _due(step: int, every: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


def _what_is_left(saved: int) -> str:
    kept = f"checkpoint {saved} is intact" if saved else "no checkpoint was saved before it"
    return f'{kept}\ntry a lower train.learning_rate, a longer train.warmup_steps or train.compute_dtype = "float32"'


class _Meter:
    """Turns a step's report into metrics; waits for the device, so that times are of finished work."""

    def __init__(self, run: RunConfig, n_devices: int) -> None:
        self._sequence_length = run.data.sequence_length
        self._tokens_a_step = run.train.batch_size * run.data.sequence_length
        self._flops = flops_per_token(run.model, run.data.sequence_length)
        self._peak = peak_flops(n_devices)
        self._start = time.perf_counter()

    def resume(self) -> None:
        """The next step begins now: validation and saving are not counted as its time."""
        self._start = time.perf_counter()

    def measure(self, step: int, position: int, report: StepReport) -> StepMetrics:
        values = {k: float(v) for k, v in jax.device_get(vars(report)).items() if v is not None}
        seconds = time.perf_counter() - self._start
        rate = self._tokens_a_step / seconds
        return StepMetrics(
            step=step,
            **values,
            tokens=position * self._sequence_length,
            tokens_per_second=rate,
            step_time=seconds,
            mfu=rate * self._flops / self._peak if self._peak else None,
        )
