"""What a training step changes, and what a checkpoint must hold beside the data position."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import RunConfig, TrainConfig
from mesh_transformer.model.params import init_params, map_table
from mesh_transformer.shapes import Array, Params
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout
from mesh_transformer.train.optimizer import make_optimizer, map_optimizer_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer state and counters.

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


def abstract_state(run: RunConfig, layout: Layout = ONE_DEVICE_LAYOUT) -> TrainState:
    """Shapes, dtypes and shardings of the state, without arrays."""
    state = jax.eval_shape(lambda: initial_state(run.model, run.train, run.seed))
    rules = layout.rules

    def laid(leaf: Any, spec: PartitionSpec | None = None) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(spec))

    def moments(tree: Params) -> Params:
        return map_table(lambda s, leaf: laid(leaf, rules.moment(s.axes)), run.model, tree)

    return TrainState(
        step=laid(state.step),
        params=map_table(lambda s, leaf: laid(leaf, rules.param(s.axes)), run.model, state.params),
        opt_state=map_optimizer_state(state.opt_state, moments, laid),
        key=laid(state.key),
    )
