"""What a training step changes, and what a checkpoint must hold beside the data position."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mesh_transformer.checkpoint.lora import record_of
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import RunConfig, TrainConfig
from mesh_transformer.config.tuning import LoraConfig
from mesh_transformer.model.lora import adapter_table, init_adapter, map_specs, trained
from mesh_transformer.model.params import Table, init_params, param_table
from mesh_transformer.shapes import Array, Params
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout
from mesh_transformer.train.optimizer import make_optimizer, map_optimizer_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer state and counters.

    params: with [lora], `model.lora.LowRank` in place of every target, and opt_state is of the adapter alone.
    step: int32 scalar, optimizer steps finished. key: uint32 key data of the run's random numbers. The optimizer's
    own counts (Adam's and the schedule's) live in opt_state and may differ from step after fine-tuning.
    """

    step: Array
    params: Params
    opt_state: Any
    key: Array


def initial_state(model: ModelConfig, train: TrainConfig, seed: int) -> TrainState:
    """Step 0: random parameters from the seed, moments zero. Call it under jit: nothing is then held twice."""
    params = init_params(model, jax.random.key(seed), jnp.dtype(train.param_dtype))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(train, model).init(params),
        key=random_key(seed),
    )


def random_key(seed: int) -> Array:
    """uint32 key data of the random numbers of a run with this seed, before its first step."""
    return jax.random.key_data(jax.random.key(seed))


def trained_table(model: ModelConfig, lora: LoraConfig | None) -> Table:
    """The specs of what is trained: the adapter's, or without one every parameter's."""
    record = record_of(lora, model)
    return param_table(model) if record is None else adapter_table(model, record.targets)


def initial_adapter_state(run: RunConfig) -> TrainState:
    """Step 0 of a run with [lora]: its `params` are the adapter alone. Call it under jit."""
    record = record_of(run.lora, run.model)
    assert record is not None
    adapter = init_adapter(run.model, record.targets, record.rank, jax.random.key(run.seed))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=adapter,
        opt_state=make_optimizer(run.train, run.model, run.lora).init(adapter),
        key=random_key(run.seed),
    )


def saved_state(state: TrainState) -> TrainState:
    """What a checkpoint holds of the state: of adapted parameters the adapter alone."""
    return dataclasses.replace(state, params=trained(state.params))


def abstract_state(run: RunConfig, layout: Layout = ONE_DEVICE_LAYOUT) -> TrainState:
    """Shapes, dtypes and shardings of what a checkpoint holds of the state, without arrays."""
    begin = initial_adapter_state if run.lora else lambda run: initial_state(run.model, run.train, run.seed)
    state = jax.eval_shape(lambda: begin(run))
    rules, table = layout.rules, trained_table(run.model, run.lora)

    def laid(leaf: Any, spec: PartitionSpec | None = None) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(spec))

    def moments(tree: Params) -> Params:
        return map_specs(lambda s, leaf: laid(leaf, rules.moment(s.axes)), table, tree)

    return TrainState(
        step=laid(state.step),
        params=map_specs(lambda s, leaf: laid(leaf, rules.param(s.axes)), table, state.params),
        opt_state=map_optimizer_state(state.opt_state, moments, laid),
        key=laid(state.key),
    )
