"""Named meshes of eight CPU devices, and what a test needs to train on one: layout, state, program.

Between them the meshes use every axis, every feature of a layout, and every pair of axes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.layout import Layout, layout_for, place_array
from mesh_transformer.train.state import TrainState, abstract_state, initial_state
from mesh_transformer.train.step import StepReport, make_train_step

# Sizes that tell the axes apart in the shapes of a compiled program; eight ways divide every axis that may be divided.
MODEL = ModelConfig(n_layers=8, d_model=32, n_heads=16, d_ff=48, n_vocab=88, n_ctx=20, d_rotary=2)
BATCH, SEQUENCE = 16, 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A mesh and what `[train]` says beside it."""

    mesh: MeshConfig
    train: Mapping[str, Any]


def _case(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    pipeline: int = 1,
    zero: int = 1,
    shard_sequence: bool = False,
    **train: Any,
) -> Case:
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, pipeline=pipeline, zero=zero, shard_sequence=shard_sequence)
    return Case(mesh=mesh, train=train)


CASES = {
    "one device": _case(),
    "data": _case(data=8),
    "fsdp, zero 1": _case(fsdp=8),
    "fsdp, zero 3": _case(fsdp=8, zero=3),
    "fsdp, zero 3, remat dots": _case(fsdp=8, zero=3, remat="dots"),
    "fsdp, zero 3, remat full": _case(fsdp=8, zero=3, remat="full"),
    "fsdp, zero 3, gathered once": _case(fsdp=8, zero=3, gather="per_step"),
    "tensor": _case(tensor=8),
    "tensor, remat full": _case(tensor=8, remat="full"),
    "data x tensor": _case(data=2, tensor=4),
    "data, accumulation": _case(data=4, gradient_accumulation=2),
    "data x tensor, accumulation": _case(data=2, tensor=4, gradient_accumulation=4),
    "data x tensor, sequence": _case(data=2, tensor=4, shard_sequence=True),
    "fsdp x tensor": _case(fsdp=2, tensor=4),
    "fsdp x tensor, zero 3": _case(fsdp=2, tensor=4, zero=3, remat="full"),
    "data x fsdp, zero 3, accumulation": _case(data=2, fsdp=4, zero=3, gather="per_step", gradient_accumulation=2),
    "data x fsdp x tensor, zero 3": _case(data=2, fsdp=2, tensor=2, zero=3),
    "pipeline": _case(pipeline=8),
    "pipeline x tensor": _case(pipeline=4, tensor=2),
    "pipeline x data, few microbatches": _case(pipeline=4, data=2, pipeline_microbatches=4),
    "pipeline x tensor, interleaved": _case(pipeline=2, tensor=4, pipeline_interleave=2, pipeline_microbatches=4),
    "pipeline x data, interleaved in four rounds": _case(pipeline=2, data=2, pipeline_interleave=4, remat="full"),
    "pipeline x data x tensor": _case(pipeline=2, data=2, tensor=2),
    "pipeline x data x tensor, sequence": _case(pipeline=2, data=2, tensor=2, shard_sequence=True, remat="full"),
    "pipeline x fsdp, zero 3, accumulation": _case(pipeline=2, fsdp=4, zero=3, gradient_accumulation=2, remat="dots"),
    "pipeline x fsdp x tensor, zero 3": _case(pipeline=2, fsdp=2, tensor=2, zero=3),
}


def run_of(
    case: Case, model: ModelConfig = MODEL, *, batch: int = BATCH, sequence: int = SEQUENCE, steps: int = 20
) -> RunConfig:
    """A run of `case`; the learning rate is high enough for `learnable_rows` to be learned in twenty steps."""
    train = TrainConfig(steps=steps, batch_size=batch, learning_rate=2e-2, warmup_steps=2, **case.train)
    data = DataConfig(train="unread", sequence_length=sequence)
    return RunConfig(name="mesh", model=model, data=data, train=train, mesh=case.mesh)


@functools.cache
def _initial_state(model: ModelConfig, seed: int) -> TrainState:
    """On the host; nothing of it depends on how it is trained."""
    start = functools.partial(initial_state, model, TrainConfig(steps=1, learning_rate=1.0), seed)
    return jax.tree.map(np.asarray, jax.jit(start)())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled training step and where it takes its arguments."""

    run: RunConfig
    layout: Layout
    step: jax.stages.Compiled

    def initial_state(self) -> TrainState:
        """Step 0 of one device, laid out."""
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(self.run, self.layout))
        return jax.tree.map(place_array, _initial_state(self.run.model, self.run.seed), where)

    def __call__(self, state: TrainState, rows: np.ndarray) -> tuple[TrainState, StepReport]:
        """One step on rows [batch, sequence + 1]; `state` is donated."""
        parts = self.run.train.gradient_accumulation
        return self.step(state, place_array(rows.reshape(parts, -1, rows.shape[1]), self.layout.rows(1)))


# Halves the time to compile: passes over the program as a whole are the same, machine code is not optimised.
QUICKLY = {"xla_backend_optimization_level": 0}


@functools.cache
def program_of(name: str) -> Program:
    """The program of one of `CASES`."""
    return compile_step(run_of(CASES[name]))


def compile_step(run: RunConfig) -> Program:
    """The training step of a run, the loop over layers kept as a loop."""
    layout = layout_for(run)
    parts = run.train.gradient_accumulation
    shape = (parts, run.train.batch_size // parts, run.data.sequence_length + 1)
    rows = jax.ShapeDtypeStruct(shape, np.int32, sharding=layout.rows(1))
    policy = ComputePolicy(remat=run.train.remat, unroll=False)
    with layout.using():
        step = make_train_step(run.model, run.train, policy, layout.rules)
        lowered = jax.jit(step, donate_argnums=0).lower(abstract_state(run, layout), rows)
        return Program(run=run, layout=layout, step=lowered.compile(compiler_options=QUICKLY))


def learnable_rows(run: RunConfig, step: int) -> np.ndarray:
    """int32 [batch, sequence + 1]: counting upwards by a stride of each row's own, from anywhere."""
    random = np.random.default_rng(step)
    shape = (run.train.batch_size, 1)
    start, stride = random.integers(0, run.model.n_vocab, shape), random.integers(1, 4, shape)
    return ((start + stride * np.arange(run.data.sequence_length + 1)) % run.model.n_vocab).astype(np.int32)
