"""A whole training run: opens the data and the run directory, restores or begins, trains, saves.

Of several processes each runs this function. Process 0 does what is done once: it locks the run directory, writes the
metrics and the picture, and speaks to the user.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.checkpoint.opening import complete_steps
from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.checkpoint.weights import Weights
from mesh_transformer.config.errors import CheckpointError, RunError
from mesh_transformer.config.load import to_toml
from mesh_transformer.config.run import RunConfig
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.model.policy import ComputePolicy, default_policy
from mesh_transformer.processes import ONE, Processes, StopAgreement, Watchdog, check_same, version_facts
from mesh_transformer.sharding.layout import Layout, describe, layout_for
from mesh_transformer.train.beginning import (
    Start,
    begun_from,
    restored_or_random,
    tokenizer_at_hand,
    with_companions,
)
from mesh_transformer.train.data import (
    Data,
    count_steps,
    open_data,
    separator_of,
    training_stream,
    validation_streams,
)
from mesh_transformer.train.init_from import InitFrom, open_model
from mesh_transformer.train.loop import Evaluate, Observer, Silence, StopRequest, compile_programs, train_loop
from mesh_transformer.train.lora import check_beginning, check_lora, lora_metadata
from mesh_transformer.train.metrics import MetricsFile, read_metrics
from mesh_transformer.train.plot import plot_loss
from mesh_transformer.train.record import clear, record_configuration
from mesh_transformer.train.recorder import Recorder
from mesh_transformer.train.state import TrainState, saved_state
from mesh_transformer.train.tracking import check_tracking

# Where a configuration does not say: seconds that a step of several processes may take before the run is given up.
_STEP_TIMEOUT = 600.0
_COMPILING = 3600.0  # seconds that the slowest process may need beyond the fastest


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: step of its newest checkpoint (0: none), and the signal that stopped it early, if one did."""

    step: int
    stopped_by: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a run takes place, and who is told."""

    run: RunConfig
    data: Data
    layout: Layout
    processes: Processes
    directory: RunDirectory
    observer: Observer
    separator: int | None
    policy: ComputePolicy
    evaluate: Evaluate | None


# Makes ready what evaluates parameters during the run; `evaluate.in_loop` has one.
MakeEvaluate = Callable[[RunConfig, ComputePolicy, Tokenizer | None, Layout, Processes], Evaluate]


def train(
    run: RunConfig,
    observer: Observer,
    *,
    new: bool = False,
    init_from: InitFrom | None = None,
    processes: Processes = ONE,
    stop: StopRequest | None = None,
    evaluate: MakeEvaluate | None = None,
) -> Result:
    """Trains to `run.train.steps`, going on from the newest intact checkpoint of the run directory.

    Args:
        observer: of several processes only the first one's is told anything.
        new: begin again; whatever an earlier run left in the directory is deleted first.
        init_from: what to begin from in place of random parameters; of no effect while the run has a checkpoint.
        processes: that run this together, from `processes.join`.
        stop: what to look at after each step; by default what signals to this process set.
        evaluate: makes ready the tasks of `run.evaluate`; where there are none, or no steps between, it is not called.

    Raises:
        UserError: mesh, data, run directory, checkpoint or model cannot be used; raised before anything is written.
        RunError: a loss that is not finite, or a process that was lost; the newest checkpoint is intact.
    """
    observer = observer if processes.is_first else Silence()
    if processes.count > 1:
        options = {"options": repr((new, init_from))}
        check_same(processes, {"configuration": to_toml(run), **options, **version_facts()})
    place, source = _opened(run, observer, processes, evaluate, new=new, init_from=init_from)
    with _lost_processes(processes):
        return _train_at(place, stop or StopRequest(), new=new, init_from=init_from, source=source)


def _opened(
    run: RunConfig,
    observer: Observer,
    processes: Processes,
    evaluate: MakeEvaluate | None,
    *,
    new: bool,
    init_from: InitFrom | None,
) -> tuple[_Place, Weights | None]:
    """Where the run takes place, and the model that it begins from if it does; opened and checked, nothing written."""
    directory = RunDirectory(run.run_directory)
    with processes.agree("length and mesh"):
        check_tracking(run)
        check_lora(run)
        run = count_steps(run)
        layout = layout_for(run, n_processes=processes.count)
    begins = _begins(directory, processes, new)
    source = None
    with processes.agree("opening of the model"):
        if begins:
            check_beginning(run, init_from)
        if init_from and begins:
            source = open_model(run, init_from, observer.note, new=new)
    with processes.agree("data"):
        kept = tokenizer_at_hand(run, None if begins else directory.checkpoints, source)
        data = open_data(run, observer.note, kept)
        if source is not None and kept is not None and data.tokenizer is kept:
            observer.note(f"the data do not say what tokenizer made them; taken to be the model's: {kept.name}")
        data = with_companions(data, None if begins else directory.checkpoints, source)
        separator = separator_of(run, data)
        policy = default_policy(run.train.compute_dtype, run.train.remat)
        ready = None
        if run.evaluate.every:
            if evaluate is None:
                raise ValueError("run.evaluate has tasks, and nothing was given to evaluate them with")
            ready = evaluate(run, policy, data.tokenizer, layout, processes)
    place = _Place(
        run=run,
        data=data,
        layout=layout,
        processes=processes,
        directory=directory,
        observer=observer,
        separator=separator,
        policy=policy,
        evaluate=ready,
    )
    return place, source


def _train_at(
    place: _Place, stop: StopRequest, *, new: bool, init_from: InitFrom | None, source: Weights | None
) -> Result:
    run, directory, processes, note = place.run, place.directory, place.processes, place.observer.note
    with stop as request, contextlib.ExitStack() as stack:
        with processes.agree("run directory"):
            if processes.is_first:
                stack.enter_context(directory.lock())
        begun = None
        if init_from and source and _begins(directory, processes, new):
            # Read before the earlier run is deleted: the model's files may prove damaged.
            with processes.agree("reading of the model"):
                begun = begun_from(run, place.data, init_from, source, note, place.layout)
        with processes.agree("clearing of the run directory"):
            if new and processes.is_first:
                clear(directory)
        store = stack.enter_context(
            CheckpointStore(
                directory.checkpoints,
                keep_last=run.train.keep_last,
                keep_every=run.train.keep_every,
                processes=processes,
            )
        )
        start = begun or restored_or_random(run, place.data, place.layout, store, init_from, note)
        saved = start.checkpoint or 0
        with processes.agree("records of the run"):
            if processes.is_first:
                record_configuration(run, directory, saved)
                directory.cut_metrics(saved)
        if saved >= run.train.steps:
            note(f"{directory.path}: complete at step {saved}; to go on, raise train.steps above it")
            if processes.is_first and not directory.loss_plot.exists():
                # A kill came between the last checkpoint and the picture.
                plot_loss(read_metrics(directory.metrics), directory.loss_plot, run.name)
            return Result(saved, None)
        return _train_from(start, place, store, request)


def _begins(directory: RunDirectory, processes: Processes, new: bool) -> bool:
    """Whether the run begins, as process 0 sees it."""
    begins = new or not complete_steps(directory.checkpoints)
    return bool(json.loads(processes.from_first("beginning", json.dumps(begins))))


def _train_from(start: Start, place: _Place, store: CheckpointStore, request: StopRequest) -> Result:
    run, layout, processes = place.run, place.layout, place.processes
    with contextlib.ExitStack() as stack:
        if jax.device_count() > 1:
            place.observer.note(describe(layout, jax.device_count()))
        place.observer.note("compiling")
        programs = compile_programs(run, start.state, place.policy, layout, place.separator)
        batches = stack.enter_context(contextlib.closing(training_stream(run, place.data, layout, start.position)))
        metrics, observer = None, place.observer
        if processes.is_first:
            metrics = stack.enter_context(contextlib.closing(MetricsFile(place.directory.metrics)))
            recorder = Recorder(run, place.directory, place.observer, metrics, start.checkpoint or 0)
            observer = stack.enter_context(contextlib.closing(recorder))
        stack.enter_context(_error_of_the_save(store))
        agreement = StopAgreement(processes)
        processes.barrier("beginning of the steps", _COMPILING)  # nobody is timed for another's compiling
        outcome = train_loop(
            run,
            start.state,
            start.position,
            programs,
            saved=start.checkpoint or 0,
            batches=batches,
            validation_sets=validation_streams(run, place.data, layout),
            evaluate=place.evaluate,
            save=functools.partial(_save, run, place.data, store, metrics, start.origin),
            observer=observer,
            stop=lambda step: agreement.stop_after(step, request.signal),
            watchdog=stack.enter_context(Watchdog(processes, _step_timeout(run, processes))),
        )
        store.wait()
        if processes.is_first:
            plot_loss(read_metrics(place.directory.metrics), place.directory.loss_plot, run.name)
        return Result(outcome.saved, outcome.stopped_by)


def _step_timeout(run: RunConfig, processes: Processes) -> float:
    """Seconds; 0: for ever. A process alone waits for nobody, and on a slow machine its steps may be long."""
    if run.train.step_timeout is not None:
        return run.train.step_timeout
    return _STEP_TIMEOUT if processes.count > 1 else 0.0


@contextlib.contextmanager
def _lost_processes(processes: Processes) -> Iterator[None]:
    """What JAX raises where devices of another process no longer answer, as one of our errors."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if processes.count == 1:
            raise
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"{processes.name(processes.index)}: what all processes compute together failed, so one of them has "
            f"probably ended: {reason}\nThe newest checkpoint is intact; repeat the command to go on from it."
        ) from error


@contextlib.contextmanager
def _error_of_the_save(store: CheckpointStore) -> Iterator[None]:
    """When a save fills the disk and metrics.jsonl is the first to feel it, the error of the save is raised."""
    try:
        yield
    except CheckpointError:
        store.wait()
        raise


def _save(
    run: RunConfig,
    data: Data,
    store: CheckpointStore,
    metrics: MetricsFile | None,
    began_from: Mapping[str, Any] | None,
    state: TrainState,
    position: int,
) -> None:
    if metrics:
        metrics.sync()  # the lines up to this step are part of what a resume finds
    store.save(
        int(state.step),
        saved_state(state),
        metadata={
            "model": run.model.to_dict(),
            "position": position,
            "seed": run.seed,
            "data": data.record,
            "name": run.name,
            **({"init_from": began_from} if began_from is not None else {}),
            **lora_metadata(run),
        },
        files=data.tokenizer.files() if data.tokenizer else {},
    )


def has_run(path: Path) -> bool:
    """Whether an earlier run left something that `new` would delete."""
    directory = RunDirectory(path)
    return directory.checkpoints.exists() or directory.metrics.exists()
