"""Loss and gradients of the model's other forms are the same on meshes, and on meshes wider than eight."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from mesh_cases import QUICKLY, Case, run_of

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import MeshConfig
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import abstract_params, map_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout, layout_for, place_array
from model import reference

V1 = ModelConfig(n_layers=2, d_model=32, n_heads=8, n_vocab=40, n_ctx=16, d_rotary=2)
# Eight heads of width eight, made of four of width sixteen; biases of q, k and v, and a gate.
V2 = ModelConfig(
    architecture="v2", n_layers=2, d_model=32, n_heads=4, d_head=16, n_shards=8, n_vocab=40, n_ctx=16, d_rotary=2
)
ROWS = np.random.default_rng(1).integers(0, V1.n_vocab, (8, 13)).astype(np.int32)


def value_and_gradients(cfg: ModelConfig, policy: ComputePolicy, layout: Layout = ONE_DEVICE_LAYOUT) -> tuple[Any, Any]:
    """The loss, and its gradients where JAX leaves them."""
    rules = layout.rules
    # The legacy term of v2 differentiates the maximum as well.
    kind: Any = "legacy" if cfg.architecture == "v2" else "log_partition"
    params: Any = reference.random_params(abstract_params(cfg), seed=2)
    params = map_table(lambda s, w: place_array(w, layout.sharding(rules.param(s.axes))), cfg, params)
    run = lambda p, r: loss_report(p, r, cfg, policy, rules, z_loss=0.01, z_loss_kind=kind).total  # noqa: E731
    with layout.using():
        rows = place_array(ROWS, layout.rows())
        return jax.jit(jax.value_and_grad(run)).lower(params, rows).compile(compiler_options=QUICKLY)(params, rows)


@functools.cache
def on_one_device(cfg: ModelConfig, policy: ComputePolicy) -> tuple[Any, Any]:
    return value_and_gradients(cfg, policy)


def assert_same_on(mesh: MeshConfig, cfg: ModelConfig, policy: ComputePolicy, tolerance: float = 1e-5) -> None:
    """Loss and each gradient, the latter relative to its largest value; gradients rest with their parameters."""
    layout = layout_for(run_of(Case(mesh=mesh, train={}), cfg, batch=8, sequence=12))
    alone, gradients = on_one_device(cfg, policy)
    value, others = value_and_gradients(cfg, policy, layout)
    assert float(value) == pytest.approx(float(alone), rel=tolerance)
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (others, gradients)), strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()
    resting = map_table(
        lambda s, g: g.sharding.is_equivalent_to(layout.sharding(layout.rules.param(s.axes)), g.ndim), cfg, others
    )
    assert all(jax.tree.leaves(resting))


@pytest.mark.parametrize(
    ("mesh", "policy"),
    [
        pytest.param(MeshConfig(data=2, tensor=4), ComputePolicy(), marks=pytest.mark.long),
        (MeshConfig(tensor=8), ComputePolicy(loss_chunk=32)),
        pytest.param(MeshConfig(fsdp=8, zero=3), ComputePolicy(), marks=pytest.mark.long),
        (MeshConfig(pipeline=2, fsdp=2, tensor=2, zero=3), ComputePolicy()),
    ],
    ids=["data-tensor", "tensor-in-chunks", "fsdp", "pipeline-fsdp-tensor"],
)
def test_v2(mesh: MeshConfig, policy: ComputePolicy) -> None:
    assert_same_on(mesh, V2, policy)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(tensor=8), pytest.param(MeshConfig(pipeline=2, data=2, tensor=2), marks=pytest.mark.long)],
    ids=["tensor", "pipeline"],
)
def test_t5_in_chunks(mesh: MeshConfig) -> None:
    cfg = dataclasses.replace(V1, position="t5", d_rotary=0)
    assert_same_on(mesh, cfg, ComputePolicy(loss_chunk=32 if mesh.tensor == 8 else 8, remat="full"))


def test_fixed_positions_in_bfloat16() -> None:
    cfg = dataclasses.replace(V1, position="fixed", d_rotary=0, norm="scalenorm-bias")
    # Sums of factors rounded alike differ by their order only, but may then round to the next bfloat16.
    assert_same_on(MeshConfig(data=2, tensor=4), cfg, ComputePolicy(dtype="bfloat16"), tolerance=1e-3)


def sixteen_devices() -> None:
    """What the test below runs in a process of its own."""
    assert len(jax.devices()) == 16
    cfg = dataclasses.replace(V1, n_heads=16, n_kv_heads=16, n_vocab=48)
    assert_same_on(MeshConfig(tensor=16), cfg, ComputePolicy())


@pytest.mark.long
def test_tensor_wider_than_eight() -> None:
    here = Path(__file__).parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=16",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    command = [sys.executable, "-c", "import test_mesh_forms; test_mesh_forms.sixteen_devices()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
