"""The training step of an adapter: on meshes, against a reference, and in memory; and remarks on its schedule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.config.tuning import LoraConfig
from mesh_transformer.model.lora import adapt, is_adapted, merged, trained
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import abstract_params, count_params, init_params, map_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.layout import layout_for, place_array
from mesh_transformer.train.advice import tuning_advice
from mesh_transformer.train.state import TrainState, abstract_state, initial_adapter_state, initial_state
from mesh_transformer.train.step import StepReport, make_train_step

MODEL = ModelConfig(n_layers=2, d_model=16, n_heads=4, d_ff=24, n_vocab=40, n_ctx=12, d_rotary=4)
LORA = LoraConfig(rank=3, alpha=6.0, targets=("q", "o", "w_in", "w_out", "w"))
TRAIN: dict[str, Any] = {"steps": 10, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 0, "weight_decay": 0.5}
POLICY = ComputePolicy(dtype="float32")
QUICKLY = {"xla_backend_optimization_level": 0}


def run_of(lora: LoraConfig | None = LORA, mesh: MeshConfig | None = None, **train: Any) -> RunConfig:
    return RunConfig(
        name="adapted",
        model=MODEL,
        data=DataConfig(train="unread", sequence_length=MODEL.n_ctx),
        train=TrainConfig(**(TRAIN | train)),
        mesh=mesh or MeshConfig(data=1),
        lora=lora,
    )


@functools.cache
def first_state() -> TrainState:
    """On the host. B is not zero, so that A learns from the first step on."""
    begun, base = jax.tree.map(
        np.asarray, jax.jit(lambda: (initial_adapter_state(run_of()), init_params(MODEL, jax.random.key(0))))()
    )
    adapter = jax.tree.map(lambda w: w + 0.05 * np.sin(np.arange(w.size, dtype=w.dtype)).reshape(w.shape), begun.params)
    return dataclasses.replace(begun, params=adapt(base, adapter, 2.0))


def batch(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, MODEL.n_vocab, (8, MODEL.n_ctx + 1)).astype(np.int32)


def steps(run: RunConfig, n: int = 2) -> tuple[Any, StepReport]:
    """The adapter after n steps on the mesh of `run`, on the host, and the last report."""
    layout = layout_for(run)
    adapter = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, layout))
    base = map_table(lambda s: layout.sharding(layout.rules.param(s.axes)), MODEL)
    where = dataclasses.replace(adapter, params=adapt(base, adapter.params, 2.0))
    state = jax.tree.map(lambda leaf, there: place_array(leaf.copy(), there), first_state(), where)
    micro = run.train.gradient_accumulation
    rows = [place_array(batch(i).reshape(micro, -1, MODEL.n_ctx + 1), layout.rows(1)) for i in range(n)]
    policy = dataclasses.replace(POLICY, remat=run.train.remat)
    with layout.using():
        step = jax.jit(make_train_step(MODEL, run.train, policy, layout.rules, lora=run.lora), donate_argnums=0)
        program = step.lower(state, rows[0]).compile(compiler_options=QUICKLY)
        for part in rows:
            state, report = program(state, part)
    before = first_state().params
    np.testing.assert_array_equal(state.params["layers"]["attn"]["k"], before["layers"]["attn"]["k"])
    np.testing.assert_array_equal(state.params["head"]["w"].base, before["head"]["w"].base)
    return jax.tree.map(np.asarray, trained(state.params)), report


@pytest.fixture(scope="module")
def on_one_device() -> tuple[Any, StepReport]:
    return steps(run_of())


def reference(run: RunConfig) -> Any:
    """The same by plain differentiation of the merged matrices and optax's own adamw."""
    train, whole = run.train, jax.tree.map(jnp.asarray, first_state().params)
    adapter = trained(whole)
    bare = map_table(lambda s, leaf: getattr(leaf, "base", leaf), MODEL, whole)
    schedule = optax.cosine_decay_schedule(train.learning_rate, train.anneal_steps, alpha=0.1)
    adamw = optax.chain(
        optax.clip_by_global_norm(train.clip_norm), optax.adamw(schedule, weight_decay=train.weight_decay)
    )
    moments = adamw.init(adapter)

    def loss(adapter: Any, rows: Any) -> Any:
        whole = merged(adapt(bare, adapter, 2.0), MODEL)
        how: Any = {"z_loss": train.z_loss, "z_loss_kind": train.z_loss_kind}
        return loss_report(whole, rows, MODEL, POLICY, **how).total

    @jax.jit
    def step(adapter: Any, moments: Any, rows: Any) -> tuple[Any, Any]:
        updates, moments = adamw.update(jax.grad(loss)(adapter, rows), moments, adapter)
        return optax.apply_updates(adapter, updates), moments

    for i in range(2):
        adapter, moments = step(adapter, moments, jnp.asarray(batch(i)))
    return adapter


def close(a: Any, b: Any, bound: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() <= bound * np.abs(np.asarray(y)).max()


def test_two_steps_are_those_of_a_plain_optimizer_on_the_merged_model(on_one_device: tuple[Any, StepReport]) -> None:
    close(on_one_device[0], reference(run_of()), 1e-4)
    started = trained(first_state().params)
    for a, b in zip(jax.tree.leaves(on_one_device[0]), jax.tree.leaves(started), strict=True):
        assert np.abs(a - b).max() > 1e-3


MESHES: Mapping[str, tuple[MeshConfig, dict[str, Any]]] = {
    "data": (MeshConfig(data=8), {}),
    "fsdp, zero 1": (MeshConfig(data=1, fsdp=4), {}),
    "fsdp, zero 3, remat": (MeshConfig(data=1, fsdp=4, zero=3), {"remat": "full"}),
    "fsdp, zero 3, gathered once": (MeshConfig(data=1, fsdp=4, zero=3), {"gather": "per_step"}),
    "tensor": (MeshConfig(data=1, tensor=4), {}),
    "data x fsdp x tensor, zero 3": (MeshConfig(data=2, fsdp=2, tensor=2, zero=3), {}),
    "data x tensor, sequence": (MeshConfig(data=2, tensor=4, shard_sequence=True), {"remat": "dots"}),
}


# It uses every axis; the others run with `make test-long`.
QUICK = {"data x fsdp x tensor, zero 3"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in MESHES]
)
def test_a_mesh_trains_as_one_device(name: str, on_one_device: tuple[Any, StepReport]) -> None:
    mesh, train = MESHES[name]
    adapter, report = steps(run_of(mesh=mesh, **train))
    close(adapter, on_one_device[0], 1e-4)
    assert float(report.loss) == pytest.approx(float(on_one_device[1].loss), rel=1e-5)
    assert float(report.grad_norm) == pytest.approx(float(on_one_device[1].grad_norm), rel=1e-4)


def test_accumulated_parts_are_one_batch(on_one_device: tuple[Any, StepReport]) -> None:
    adapter, report = steps(run_of(mesh=MeshConfig(data=2, tensor=2), gradient_accumulation=4))
    close(adapter, on_one_device[0], 1e-4)
    assert report.noise_signal is not None and np.isfinite(float(report.noise_signal))


def test_the_base_has_no_moments_no_gradient_and_no_second_copy() -> None:
    # So many layers that one layer's copies, which XLA makes on CPU, count for little.
    model = ModelConfig(n_layers=24, d_model=128, n_heads=4, n_vocab=128, n_ctx=16, d_rotary=16)
    run = dataclasses.replace(run_of(batch_size=1), model=model, lora=LoraConfig(rank=2))
    adapter = jax.eval_shape(lambda: initial_adapter_state(run))
    adapted = dataclasses.replace(adapter, params=adapt(abstract_params(model), adapter.params, 2.0))
    full = jax.eval_shape(lambda: initial_state(model, run.train, 0))
    rows = jax.ShapeDtypeStruct((1, 1, 13), np.int32)

    def memory(state: TrainState, lora: LoraConfig | None) -> Any:
        step = jax.jit(make_train_step(model, run.train, POLICY, lora=lora), donate_argnums=0)
        return step.lower(state, rows).compile(compiler_options=QUICKLY).memory_analysis()

    base = 4 * count_params(model)
    tuned, whole = memory(adapted, run.lora), memory(full, None)
    # At rest: the base and three times the adapter, against three times the whole; overwritten in place.
    n_adapter = sum(leaf.size for leaf in jax.tree.leaves(adapter.params))
    assert abs(tuned.argument_size_in_bytes - base - 12 * n_adapter) < 4096
    assert whole.argument_size_in_bytes > 3 * base
    assert tuned.alias_size_in_bytes >= tuned.output_size_in_bytes - 4096
    # In the step: no gradient of the base.
    assert tuned.temp_size_in_bytes < 0.5 * base < base < whole.temp_size_in_bytes


def test_the_state_has_the_layout_of_its_axes() -> None:
    run = run_of(mesh=MeshConfig(data=1, fsdp=2, tensor=2, zero=3))
    state = abstract_state(run, layout_for(run))
    attn, mlp = state.params["layers"]["attn"], state.params["layers"]["mlp"]
    assert attn["q"]["a"].sharding.spec == jax.P(None, "fsdp", None)
    assert attn["q"]["b"].sharding.spec == jax.P(None, None, "tensor", None)
    assert attn["o"]["a"].sharding.spec == jax.P(None, "tensor", None, None)
    assert mlp["w_out"]["b"].sharding.spec == jax.P(None, None, "fsdp")
    assert not is_adapted(state.params)


ADVISED: dict[str, Any] = {
    "steps": 1000, "learning_rate": 3e-5, "end_learning_rate": 3e-6, "warmup_steps": 70, "anneal_steps": 930,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, named",
    [
        ({}, []),
        ({"end_learning_rate": 6e-6}, []),
        ({"learning_rate": 1.2e-4, "end_learning_rate": 1.2e-5}, ["learning_rate"]),
        ({"learning_rate": 9e-6, "end_learning_rate": 1e-6}, ["learning_rate"]),
        ({"end_learning_rate": 1e-5}, ["end_learning_rate"]),
        ({"end_learning_rate": 0.0}, ["end_learning_rate"]),
        ({"warmup_steps": 49, "anneal_steps": 951}, ["warmup_steps"]),
        ({"warmup_steps": 101, "anneal_steps": 899}, ["warmup_steps"]),
        ({"anneal_steps": 900}, ["anneal_steps"]),
        ({"learning_rate": 1.0, "anneal_steps": 1}, ["learning_rate", "end_learning_rate", "anneal_steps"]),
    ],
)
def test_remarks_are_made_on_what_departs_from_the_guide(change: dict[str, Any], named: list[str]) -> None:
    remarks = tuning_advice(run_of(None, **(ADVISED | change)))
    assert [line.split(" ")[0] for line in remarks] == [f"train.{name}" for name in named]


def test_the_guide_has_another_rate_for_adapters_and_needs_steps_for_the_rest() -> None:
    adapted = ADVISED | {"learning_rate": 2e-4, "end_learning_rate": 2e-5}
    assert tuning_advice(run_of(**adapted)) == []
    (line,) = tuning_advice(run_of(**ADVISED))
    assert line == "train.learning_rate = 3e-05; usual in fine-tuning with [lora] is 0.0001 to 0.0005"
    in_epochs = {"steps": None, "epochs": 1.0, "warmup_steps": None, "learning_rate": 3e-5}
    assert tuning_advice(run_of(None, **in_epochs)) == []
    # Defaults are what is advised, in runs so short that no step lies between 5 and 10 %, too.
    for n in (7, 15, 100, 59_000):
        defaults = {"steps": n, "learning_rate": 3e-5, "warmup_steps": None}
        assert tuning_advice(run_of(None, **defaults)) == []
