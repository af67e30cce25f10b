"""The state that a run goes on from: its newest checkpoint, random parameters, or another model's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.checkpoint.opening import check_model
from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.run import RunConfig
from mesh_transformer.sharding.layout import Layout
from mesh_transformer.train.data import Data
from mesh_transformer.train.init_from import InitFrom, left_aside
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
    state = store.restore(newest, abstract_state(run, layout), model=run.model)
    aside = f"; {left_aside(init_from, metadata.get('init_from'))}" if init_from is not None else ""
    note(f"going on from checkpoint {newest} in {store.directory}{aside}")
    return Start(state, int(metadata["position"]), newest, metadata.get("init_from"))
