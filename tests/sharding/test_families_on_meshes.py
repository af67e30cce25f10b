"""One model of every family on meshes: loss, gradients and a step are those of one device; what cannot be divided."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
import pytest
from mesh_cases import Case, compile_step, learnable_rows, run_of
from test_mesh_losses import assert_close

from mesh_transformer.checkpoint.families import family_of
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import MeshConfig, mesh_from_text
from mesh_transformer.model.lora import adapt, adaptable, adapter_table, init_adapter, map_specs
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import map_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.layout import inference_layout, layout_for, place_array
from mesh_transformer.train.state import abstract_state
from small_families import NAMES, params_of, small

ONE = "one device"
MESHES: Mapping[str, Case] = {
    ONE: Case(mesh=MeshConfig(data=1), train={}),
    "data": Case(mesh=MeshConfig(data=2), train={}),
    "fsdp": Case(mesh=MeshConfig(data=1, fsdp=2, zero=3), train={"remat": "full"}),
    "tensor": Case(mesh=MeshConfig(data=1, tensor=2), train={"remat": "dots"}),
    "data x fsdp x tensor": Case(mesh=MeshConfig(data=2, fsdp=2, tensor=2, zero=3), train={"gradient_accumulation": 2}),
    "pipeline": Case(mesh=MeshConfig(data=1, pipeline=2), train={}),
    "pipeline x tensor": Case(mesh=MeshConfig(data=1, pipeline=2, tensor=2), train={}),
    "pipeline x fsdp x tensor": Case(mesh=MeshConfig(data=1, pipeline=2, fsdp=2, tensor=2, zero=3), train={}),
    "a key head each": Case(mesh=MeshConfig(data=1, tensor=4), train={}),
    "sequence": Case(mesh=MeshConfig(data=2, tensor=2, shard_sequence=True), train={}),
    "interleaved": Case(mesh=MeshConfig(data=1, pipeline=2), train={"pipeline_interleave": 2, "remat": "full"}),
}
_OF_ALL = ("data", "fsdp", "tensor", "data x fsdp x tensor", "pipeline", "pipeline x tensor")
QUICK = ("shared", "pipeline x fsdp x tensor")
LONG = [
    *((name, mesh) for name in NAMES for mesh in _OF_ALL),
    *((name, "a key head each") for name in ("llama", "qwen3")),
    *((name, "sequence") for name in ("gpt2", "gpt_neox", "llama")),
    ("gpt_neo", "interleaved"),
]
CASES = [pytest.param(*QUICK, id=" on ".join(QUICK))]
CASES += [pytest.param(*pair, marks=pytest.mark.long, id=" on ".join(pair)) for pair in LONG]


def model(name: str, mesh: str) -> ModelConfig:
    """Every stage of a pipeline, and every round of one, has two layers where they alternate: an even number."""
    return small(name, n_layers=8 if "pipeline_interleave" in MESHES[mesh].train else 4)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step says and leaves; mu: a tenth of the gradient, clipped. moved: by how much parameters changed."""

    loss: float
    norm: float
    mu: Any
    nu: Any
    moved: Any


@functools.cache
def step_on(mesh: str, cfg: ModelConfig) -> Step:
    """One step from the same parameters, none of which is zero or one as at the start of training."""
    run = run_of(MESHES[mesh], cfg, batch=8, sequence=12)
    program = compile_step(dataclasses.replace(run, train=dataclasses.replace(run.train, warmup_steps=0)))
    start, described = params_of(cfg, weight=0.7), abstract_state(program.run, program.layout)
    begun = dataclasses.replace(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), described), params=start)
    state = jax.tree.map(lambda values, leaf: place_array(values, leaf.sharding), begun, described)
    state, report = program(state, learnable_rows(program.run, 0))
    (adam,) = (part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState))
    mu, nu, params = jax.tree.map(np.asarray, (adam.mu, adam.nu, state.params))
    moved = jax.tree.map(lambda w, before: w - before, params, start)
    return Step(float(report.loss), float(report.grad_norm), *(_with_gradient(tree, cfg) for tree in (mu, nu, moved)))


def test_each_is_of_its_family() -> None:
    for name in NAMES:
        family = family_of(small(name))
        assert family is not None and family.model_type == name


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_step_is_that_of_one_device(name: str, mesh: str) -> None:
    cfg = model(name, mesh)
    alone, here = step_on(ONE, cfg), step_on(mesh, cfg)
    assert here.loss == pytest.approx(alone.loss, rel=1e-5)
    assert here.norm == pytest.approx(alone.norm, rel=1e-4)
    assert_close(here.mu, alone.mu, 1e-5)
    assert_close(here.nu, alone.nu, 2e-5)
    leaves = zip(*(jax.tree.leaves(tree) for tree in (here.moved, alone.moved, alone.mu)), strict=True)
    for got, expected, gradient in leaves:
        # Adam's first step has the size of the rate however small a gradient is, and with those that are all but zero
        # rounding decides its sign.
        counts = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
        largest = np.abs(expected).max()
        assert largest > 0 and np.abs(got - expected)[counts].max() <= 1e-2 * largest


def _with_gradient(tree: Any, cfg: ModelConfig) -> Any:
    """Without b_k where keys are not turned: it adds the same to all scores of a query, so that its gradient is zero
    but for rounding.
    """
    if cfg.position == "rotary" or "qkv" not in cfg.biases:
        return tree
    attn = {name: leaf for name, leaf in tree["layers"]["attn"].items() if name != "b_k"}
    return tree | {"layers": tree["layers"] | {"attn": attn}}


def adapter_gradients(name: str, mesh: str) -> Any:
    """Of A and B of every matrix, none of which is zero."""
    cfg = small(name)
    layout = layout_for(run_of(MESHES[mesh], cfg, batch=8, sequence=12))
    paths = tuple(adaptable(cfg))
    adapter = jax.tree.map(np.asarray, init_adapter(cfg, paths, 2, jax.random.key(1)))
    adapter = jax.tree.map(lambda w: w + 0.1 * np.cos(np.arange(w.size, dtype=w.dtype)).reshape(w.shape), adapter)
    place = lambda s, w: place_array(w, layout.sharding(layout.rules.param(s.axes)))  # noqa: E731
    base = map_table(place, cfg, params_of(cfg, weight=0.7))
    factors = map_specs(place, adapter_table(cfg, paths), adapter)

    def loss(factors: Any, rows: Any) -> Any:
        return loss_report(adapt(base, factors, 2.0), rows, cfg, ComputePolicy(), layout.rules).total

    with layout.using():
        rows = place_array(learnable_rows(run_of(MESHES[mesh], cfg, batch=8, sequence=12), 0), layout.rows())
        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(factors, rows))


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["data x fsdp x tensor", "sequence"])
@pytest.mark.parametrize("name", ["gpt_neox", "qwen3", "llama"])
def test_gradients_of_an_adapter_are_those_of_one_device(name: str, mesh: str) -> None:
    assert_close(adapter_gradients(name, mesh), adapter_gradients(name, ONE), 1e-5)


GROUPED = small("llama", n_heads=16, n_kv_heads=2, d_ff=64)


@pytest.mark.parametrize("purpose", ["training", "inference"])
def test_a_tensor_axis_wider_than_the_heads_of_keys_is_refused(purpose: str) -> None:
    message = r"mesh\.tensor = 4 must divide model\.n_kv_heads = 2; mesh\.tensor = 2 would do"
    with pytest.raises(ConfigError, match=message):
        if purpose == "training":
            layout_for(run_of(Case(mesh=MeshConfig(data=1, tensor=4), train={}), GROUPED, batch=8, sequence=12))
        else:
            inference_layout(mesh_from_text("tensor=4"), GROUPED)
    # What the message names is taken.
    for layout in (
        layout_for(run_of(MESHES["tensor"], GROUPED, batch=8, sequence=12)),
        inference_layout(mesh_from_text("tensor=2"), GROUPED),
    ):
        assert layout.sizes.tensor == 2
