"""A whole training run: opens the data and the run directory, restores or begins, trains, saves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.checkpoint.opening import check_model, complete_steps
from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.load import to_toml
from mesh_transformer.config.run import RunConfig
from mesh_transformer.data.choice import tokenizer_for_data
from mesh_transformer.data.loader import TrainLoader, validation_batches
from mesh_transformer.data.source import RecordSource, open_source
from mesh_transformer.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.files import write_atomically
from mesh_transformer.model.policy import default_policy
from mesh_transformer.train.init_from import InitFrom, first_state, left_aside, open_model, origin
from mesh_transformer.train.loop import Observer, StopRequest, compile_programs, micro_batch_size, train_loop
from mesh_transformer.train.metrics import MetricsFile, StepMetrics, ValidationMetrics, read_metrics
from mesh_transformer.train.plot import plot_loss
from mesh_transformer.train.state import TrainState, abstract_state, initial_state

CHANGES_FILE = "changes.jsonl"
_CHANGED = "put back what it was, or begin again with --new, or give the run another name"


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads: opened, and checked against the configuration."""

    train: RecordSource
    validation: dict[str, RecordSource]
    tokenizer: Tokenizer | None

    @property
    def record(self) -> dict[str, Any]:
        """What must stay the same for a run to go on."""
        return {"fingerprint": self.train.fingerprint, "sequence_length": self.train.sequence_length}


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: step of its newest checkpoint (0: none), and the signal that stopped it early, if one did."""

    step: int
    stopped_by: int | None


@dataclasses.dataclass(frozen=True)
class _Start:
    """What the loop begins with; position: sequences consumed so far.

    checkpoint: the step that was restored; None where the run begins. origin: the model that the run began from, as
    `init_from.origin` describes it.
    """

    state: TrainState
    position: int = 0
    checkpoint: int | None = None
    origin: Mapping[str, Any] | None = None


def train(run: RunConfig, observer: Observer, *, new: bool = False, init_from: InitFrom | None = None) -> Result:
    """Trains to `run.train.steps`, going on from the newest intact checkpoint of the run directory.

    Args:
        new: begin again; whatever an earlier run left in the directory is deleted first.
        init_from: what to begin from in place of random parameters; of no effect while the run has a checkpoint.

    Raises:
        UserError: data, run directory, checkpoint or model cannot be used; raised before anything is written.
        RunError: a loss that is not finite; the newest checkpoint is intact.
    """
    data = open_data(run)
    directory = RunDirectory(run.run_directory)
    begins = new or not complete_steps(directory.checkpoints)
    # Before the lock, which makes the directory: a model that cannot be used leaves nothing behind.
    source = open_model(run, init_from, observer.note, new=new) if init_from and begins else None
    with directory.lock(), StopRequest() as stop, contextlib.ExitStack() as stack:
        begun = None
        if init_from and source and (new or not complete_steps(directory.checkpoints)):
            # Read before the earlier run is deleted: the model's files may prove damaged.
            begun = _Start(first_state(run, init_from, source, observer.note), origin=origin(source))
        del source  # its files are not needed again
        if new:
            _clear(directory)
        store = stack.enter_context(
            CheckpointStore(directory.checkpoints, keep_last=run.train.keep_last, keep_every=run.train.keep_every)
        )
        start = begun or _restore(run, data, store, observer, init_from)
        saved = start.checkpoint or 0
        _record_configuration(run, directory, saved)
        directory.cut_metrics(saved)
        if saved >= run.train.steps:
            observer.note(f"{directory.path}: complete at step {saved}; to go on, raise train.steps above it")
            if not directory.loss_plot.exists():  # a kill came between the last checkpoint and the picture
                plot_loss(read_metrics(directory.metrics), directory.loss_plot, run.name)
            return Result(saved, None)
        return _train_from(start, run, data, directory, store, observer, stop)


def _train_from(
    start: _Start,
    run: RunConfig,
    data: Data,
    directory: RunDirectory,
    store: CheckpointStore,
    observer: Observer,
    stop: StopRequest,
) -> Result:
    with contextlib.ExitStack() as stack:
        observer.note("compiling")
        programs = compile_programs(run, start.state, default_policy(run.train.compute_dtype, run.train.remat))
        loader = TrainLoader(data.train, seed=run.seed, batch_size=run.train.batch_size)
        batches = stack.enter_context(contextlib.closing(loader.batches(start.position)))
        metrics = stack.enter_context(contextlib.closing(MetricsFile(directory.metrics)))
        stack.enter_context(_error_of_the_save(store))
        outcome = train_loop(
            run,
            start.state,
            start.position,
            programs,
            saved=start.checkpoint or 0,
            batches=batches,
            validation_sets=_validation_sets(run, data),
            save=functools.partial(_save, run, data, store, metrics, start.origin),
            observer=_Recorder(observer, metrics),
            stop=stop,
        )
        store.wait()
        plot_loss(read_metrics(directory.metrics), directory.loss_plot, run.name)
        return Result(outcome.saved, outcome.stopped_by)


def open_data(run: RunConfig) -> Data:
    """Opens every data set of the run and checks it against model and batch.

    Raises:
        DataError: one is missing, damaged, does not fit the model, or holds less than a batch.
    """
    open_one = functools.partial(open_source, sequence_length=run.data.sequence_length, n_vocab=run.model.n_vocab)
    data = Data(
        train=open_one(run.data.train),
        validation={name: open_one(where) for name, where in run.data.validation.items()},
        tokenizer=tokenizer_for_data(run.data.tokenizer, run.data.train, run.model.n_vocab),
    )
    TrainLoader(data.train, seed=run.seed, batch_size=run.train.batch_size)
    for source in data.validation.values():
        validation_batches(source, micro_batch_size(run))
    return data


def _validation_sets(run: RunConfig, data: Data) -> dict[str, Callable[[], Iterator[np.ndarray]]]:
    one_pass = functools.partial(
        validation_batches, batch_size=micro_batch_size(run), max_batches=run.train.validation_batches
    )
    return {name: functools.partial(one_pass, source) for name, source in data.validation.items()}


def _restore(
    run: RunConfig, data: Data, store: CheckpointStore, observer: Observer, init_from: InitFrom | None
) -> _Start:
    """What to go on from; where there is no checkpoint, random parameters."""
    newest = store.newest_intact(observer.note)
    if newest is None:
        damaged = store.steps()
        if damaged:
            raise CheckpointError(
                f"{store.directory}: none of the checkpoints {', '.join(map(str, damaged))} is intact\n"
                "restore one from a copy, or begin again with --new"
            )
        if init_from is not None:
            raise CheckpointError(f"{store.directory}: its checkpoints went away just now; repeat the command")
        # Placed as a restored state is, so that both are trained by one and the same compiled program.
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        begin = jax.jit(functools.partial(initial_state, run.model, run.train, run.seed), out_shardings=device)
        return _Start(begin())
    metadata = store.read_metadata(newest)
    try:
        check_model(metadata, run.model, store.path(newest))
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).partition(chr(10))[0]}\n{_CHANGED}") from error
    there, here = metadata.get("data", {}), data.record
    unchanged = {
        "seed": (metadata.get("seed"), run.seed),
        "data.sequence_length": (there.get("sequence_length"), here["sequence_length"]),
        "list of data files (their names, sizes or order)": (there.get("fingerprint"), here["fingerprint"]),
    }
    for name, (before, now) in unchanged.items():
        if before != now:
            raise CheckpointError(
                f"{store.path(newest)}: was trained with another {name}: {before}, now {now}\n{_CHANGED}"
            )
    state = store.restore(newest, abstract_state(run), model=run.model)
    aside = f"; {left_aside(init_from, metadata.get('init_from'))}" if init_from is not None else ""
    observer.note(f"going on from checkpoint {newest} in {store.directory}{aside}")
    return _Start(state, int(metadata["position"]), newest, metadata.get("init_from"))


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
    metrics: MetricsFile,
    began_from: Mapping[str, Any] | None,
    state: TrainState,
    position: int,
) -> None:
    metrics.sync()  # the lines up to this step are part of what a resume finds
    store.save(
        int(state.step),
        state,
        metadata={
            "model": run.model.to_dict(),
            "position": position,
            "seed": run.seed,
            "data": data.record,
            "name": run.name,
            **({"init_from": began_from} if began_from is not None else {}),
        },
        files={TOKENIZER_FILE: data.tokenizer.to_bytes()} if data.tokenizer else {},
    )


def _record_configuration(run: RunConfig, directory: RunDirectory, step: int) -> None:
    """Writes config.toml; what differs from the one that was there is kept in changes.jsonl, with the step."""
    text = to_toml(run)
    try:
        before = tomllib.loads(directory.config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        before = None
    except ValueError as error:  # not TOML, not UTF-8
        raise ConfigError(
            f"{directory.config}: the record of this run's configuration is damaged ({error})\n"
            "delete that file; it is written anew from the configuration that you give"
        ) from error
    if before is not None:
        old, new = _flat(before), _flat(tomllib.loads(text))
        changed = {k: [old.get(k), new.get(k)] for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}
        if changed and step:
            with (directory.path / CHANGES_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "changed": changed}) + "\n")
    write_atomically(directory.config, text.encode())


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _clear(directory: RunDirectory) -> None:
    """Removes what a run writes, and nothing else that may lie there."""
    if directory.checkpoints.exists():
        shutil.rmtree(directory.checkpoints)
    for path in (
        directory.metrics,
        directory.config,
        directory.loss_plot,
        directory.samples,
        directory.path / CHANGES_FILE,
    ):
        path.unlink(missing_ok=True)


def has_run(path: Path) -> bool:
    """Whether an earlier run left something that `new` would delete."""
    directory = RunDirectory(path)
    return directory.checkpoints.exists() or directory.metrics.exists()


class _Recorder:
    """Passes on what happens, and writes metrics.jsonl."""

    def __init__(self, observer: Observer, metrics: MetricsFile) -> None:
        self._observer, self._metrics = observer, metrics

    def note(self, text: str) -> None:
        self._observer.note(text)

    def step(self, metrics: StepMetrics) -> None:
        self._metrics.write(metrics)
        self._observer.step(metrics)

    def validation(self, metrics: ValidationMetrics) -> None:
        self._metrics.write(metrics)
        self._observer.validation(metrics)
