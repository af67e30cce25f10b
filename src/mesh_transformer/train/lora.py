"""The state of a run with low-rank adaptation: a base that rests, read from where it is, and an adapter that learns.

The base is held as it is stored, whatever `train.param_dtype` says, and is in no checkpoint of the run; those say where
it is and what its digest was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mesh_transformer.checkpoint.lora import BASE, LORA, base_record, open_base, record_of
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.checkpoint.weights import Weights
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.run import RunConfig
from mesh_transformer.model.lora import adapt
from mesh_transformer.sharding.layout import Layout
from mesh_transformer.train.init_from import InitFrom, place_stored, reading
from mesh_transformer.train.state import TrainState, abstract_state, initial_adapter_state


def check_lora(run: RunConfig) -> None:
    """Returns if the run has no adapter, or one that the model and the mesh can have.

    Raises:
        ConfigError: a target is none of the model's matrices, or the mesh has a pipeline.
    """
    if record_of(run.lora, run.model) is not None and run.mesh.pipeline > 1:
        raise ConfigError(
            f"mesh.pipeline = {run.mesh.pipeline}: [lora] is not supported in a pipeline\n"
            "use mesh.fsdp with mesh.zero = 3, or mesh.tensor, to divide the model"
        )


def check_beginning(run: RunConfig, init_from: InitFrom | None) -> None:
    """Returns if a run that begins has what its adapter needs.

    Raises:
        ConfigError: there is no base, or what is asked of it makes no sense for an adapter.
    """
    if run.lora is None:
        return
    if init_from is None:
        raise ConfigError(
            "[lora] adapts a model that is there, and none is given\n"
            "add --init-from MODEL, or leave [lora] out to train all parameters from random ones"
        )
    if init_from.keep_schedule:
        raise ConfigError(
            "--keep-schedule goes on with the optimizer of the model, and [lora] trains other parameters than that had"
            "\nleave --keep-schedule out: step and schedule begin at 0"
        )


def begun(
    run: RunConfig, init_from: InitFrom, base: Weights, note: Callable[[str], None], layout: Layout
) -> tuple[TrainState, dict[str, Any]]:
    """The first state of a run with [lora], and what its checkpoints record of the base.

    Raises:
        CheckpointError: a file of the base is damaged.
        ConfigError: `train.param_dtype` is not the base's.
    """
    which = base.format if base.step is None else f"{base.format}, step {base.step}"
    note(f"adapting {base.where} ({which}), which rests as it is: {_in_words(run)}")
    _check_dtype(run, base, note)
    origin = base_record(base, init_from.model, init_from.config, reading(base, "hashing", note))
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, layout))
    state = jax.jit(lambda: initial_adapter_state(run), out_shardings=where)()
    return _with_base(run, state, base, note, layout), origin


def restored(
    run: RunConfig,
    store: CheckpointStore,
    step: int,
    init_from: InitFrom | None,
    note: Callable[[str], None],
    layout: Layout,
) -> tuple[TrainState, dict[str, Any]]:
    """The state of checkpoint `step` with its base, and what the next checkpoints record of the base.

    The base is looked for where the checkpoint says, and only if it is gone from there where `init_from` says.

    Raises:
        CheckpointError: the base is gone or another model now; or the checkpoint is damaged.
    """
    metadata = store.read_metadata(step)
    origin = dict(metadata.get(BASE) or {})
    base = None
    try:
        base = open_base(metadata, store.path(step), open_weights, note)
    except CheckpointError:
        if init_from is None:
            raise
    if base is None:
        assert init_from is not None
        instead = init_from.model, init_from.step, init_from.config
        base = open_base(metadata, store.path(step), open_weights, note, instead=instead)
        origin |= {"given": init_from.model, "path": str(base.where.absolute()), "config": init_from.config}
        note(f"the base is no longer at {metadata[BASE]['path']}; {base.where} is the same model")
    _check_dtype(run, base, note)
    state = store.restore(step, abstract_state(run, layout), model=run.model)
    return _with_base(run, state, base, note, layout), origin


def lora_metadata(run: RunConfig) -> Mapping[str, Any]:
    """What checkpoint.json says of the adapter; nothing for a run without one."""
    record = record_of(run.lora, run.model)
    return {} if record is None else {LORA: record.to_dict()}


def _with_base(
    run: RunConfig, state: TrainState, base: Weights, note: Callable[[str], None], layout: Layout
) -> TrainState:
    record = record_of(run.lora, run.model)
    assert record is not None
    return dataclasses.replace(state, params=adapt(place_stored(base, layout, note), state.params, record.scale))


def _check_dtype(run: RunConfig, base: Weights, note: Callable[[str], None]) -> None:
    stored, wanted = base.main_dtype.name, run.train.param_dtype
    if stored == "float32" and wanted == "bfloat16":
        raise ConfigError(
            f"train.param_dtype = bfloat16 would round the base, {base.where}, which is stored in float32, and what is "
            "trained on would be another model than the one that is named\n"
            f"leave train.param_dtype out, or round it first: mesh-transformer convert {base.where} TARGET --to native "
            "--dtype bfloat16"
        )
    if stored != wanted:
        note(f"the base stays in {stored}, as it is stored; A and B are float32")


def _in_words(run: RunConfig) -> str:
    record = record_of(run.lora, run.model)
    assert record is not None
    names = ", ".join(path.rsplit("/", 1)[-1] for path in record.targets)
    return f"rank {record.rank}, alpha {record.alpha:g}, targets {names}; Adam, schedule and step begin at 0"
