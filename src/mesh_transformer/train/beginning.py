"""The state that a run goes on from: its newest checkpoint, random parameters, or another model's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from mesh_transformer.checkpoint.lora import LORA, record_of
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.checkpoint.opening import check_model, complete_steps
from mesh_transformer.checkpoint.weights import Weights
from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.run import RunConfig
from mesh_transformer.data.choice import tokenizer_is_said
from mesh_transformer.data.legacy_state import position_of_loader_state
from mesh_transformer.data.source import RecordSource
from mesh_transformer.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from mesh_transformer.data.tokenizer import Tokenizer, load_tokenizer
from mesh_transformer.sharding.layout import Layout
from mesh_transformer.train import lora
from mesh_transformer.train.advice import tuning_advice
from mesh_transformer.train.data import Data
from mesh_transformer.train.init_from import InitFrom, first_state, left_aside, origin
from mesh_transformer.train.state import TrainState, abstract_state, initial_state

_CHANGED = "put back what it was, or begin again with --new, or give the run another name"


@dataclasses.dataclass(frozen=True)
class Start:
    """What the loop begins with; position: sequences consumed so far.

    checkpoint: the step that was restored; None where the run begins. origin: the model that the run began from, as
    `init_from.origin` describes it.
    """

    state: TrainState
    position: int = 0
    checkpoint: int | None = None
    origin: Mapping[str, Any] | None = None


def tokenizer_at_hand(run: RunConfig, checkpoints: Path | None, source: Weights | None) -> Tokenizer | None:
    """What data that do not say their tokenizer are taken to be made with: where the run begins from a model, the
    model's, and where it goes on, the one that its newest checkpoint keeps. None: there is none, or the data do say.

    Args:
        checkpoints: those that the run goes on from.
        source: the model that the run begins from.

    Raises:
        DataError: it cannot be read, or the sets of a mixture were made with different ones.
    """
    return None if tokenizer_is_said(run.data.tokenizer, run.data.train) else _kept_tokenizer(checkpoints, source)


def with_companions(data: Data, checkpoints: Path | None, source: Weights | None) -> Data:
    """The data, whose tokenizer has what the model's own says beside its vocabulary: chat templates, ends of texts.

    Only where the two are one tokenizer, and the data's own says nothing.

    Args:
        checkpoints, source: as `tokenizer_at_hand`.

    Raises:
        DataError: the model's tokenizer cannot be read.
    """
    if data.tokenizer is None or data.tokenizer.companions.files:
        return data
    kept = _kept_tokenizer(checkpoints, source)
    if kept is None or kept.sha256 != data.tokenizer.sha256:
        return data
    return dataclasses.replace(data, tokenizer=dataclasses.replace(data.tokenizer, companions=kept.companions))


def _kept_tokenizer(checkpoints: Path | None, source: Weights | None) -> Tokenizer | None:
    file = source.tokenizer_file() if source is not None else None
    if checkpoints is not None:
        kept = (checkpoints / str(step) / TOKENIZER_FILE for step in reversed(complete_steps(checkpoints)))
        file = next((path for path in kept if path.is_file()), None)
    return load_tokenizer(file) if file is not None else None


def begun_from(
    run: RunConfig, data: Data, init_from: InitFrom, source: Weights, note: Callable[[str], None], layout: Layout
) -> Start:
    """The start of a run that begins from `source`, which `open_model` opened; notes what is unusual in its schedule.

    Raises:
        CheckpointError: a file of the model is damaged.
        ConfigError: the run's adapter cannot be put on it.
        DataError: the original's place in its data, which is to be taken over, is not one in these.
    """
    for line in tuning_advice(run) if not init_from.keep_schedule else ():
        note(line)
    if run.lora:
        state, began_from = lora.begun(run, init_from, source, note, layout)
        return Start(state, origin=began_from)
    position = _position(run, data, init_from, source)
    start = Start(first_state(run, init_from, source, note, layout), position or 0, origin=origin(source))
    if position is not None:
        note(f"the data go on after {position:,} sequences, where the interrupted run stood in them")
    elif init_from.keep_schedule:
        mend = " (the original's place in its files is taken over with data.shuffle = false)" if source.extras else ""
        note(f"the data begin at their start: where the interrupted run stood in its own is not taken over{mend}")
    return start


def check_goes_on(metadata: Mapping[str, Any], run: RunConfig, data: Mapping[str, Any], where: Path) -> None:
    """Returns if the run may go on from the checkpoint at `where`.

    Args:
        data: `Data.record` of the run's data; of a part of it that part alone is compared.

    Raises:
        CheckpointError: it is of another model, seed, adapter or data.
    """
    try:
        check_model(metadata, run.model, where)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).partition(chr(10))[0]}\n{_CHANGED}") from error
    there = metadata.get("data", {})
    adapter = record_of(run.lora, run.model)
    unchanged = {
        "[lora] (rank, alpha or targets)": (metadata.get(LORA), adapter.to_dict() if adapter else None),
        "seed": (metadata.get("seed"), run.seed),
    }
    described = {
        "sequence_length": "data.sequence_length",
        "fingerprint": "list of data files (their names, sizes or order)",
    }
    unchanged |= {name: (there.get(key), data[key]) for key, name in described.items() if key in data}
    for name, (before, now) in unchanged.items():
        if before != now:
            raise CheckpointError(f"{where}: was trained with another {name}: {before}, now {now}\n{_CHANGED}")


def _position(run: RunConfig, data: Data, init_from: InitFrom, source: Weights) -> int | None:
    """Where the interrupted run of the original stood, if the data are read in the order in which it read them."""
    state = source.extras.get("train_loader")
    in_order = not run.data.shuffle and isinstance(data.train, RecordSource)
    if not init_from.keep_schedule or state is None or not in_order:
        return None
    assert isinstance(data.train, RecordSource)
    return position_of_loader_state(state, data.train, run.train.batch_size)


def restored_or_random(
    run: RunConfig,
    data: Data,
    layout: Layout,
    store: CheckpointStore,
    init_from: InitFrom | None,
    note: Callable[[str], None],
) -> Start:
    """What to go on from, laid out as `layout` says wherever it was saved; without a checkpoint, random parameters.

    Random parameters depend on the seed alone, not on the layout.

    Raises:
        CheckpointError: no checkpoint is intact, or the newest is of another model, seed or data.
    """
    newest = store.newest_intact(note)
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
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, layout))
        begin = jax.jit(functools.partial(initial_state, run.model, run.train, run.seed), out_shardings=where)
        return Start(begin())
    metadata = store.read_metadata(newest)
    check_goes_on(metadata, run, data.record, store.path(newest))
    began_from = metadata.get("init_from")
    if run.lora:
        state, began_from = lora.restored(run, store, newest, init_from, note, layout)
    else:
        state = store.restore(newest, abstract_state(run, layout), model=run.model)
    aside = f"; {left_aside(init_from, began_from)}" if init_from is not None else ""
    note(f"going on from checkpoint {newest} in {store.directory}{aside}")
    return Start(state, int(metadata["position"]), newest, began_from)
