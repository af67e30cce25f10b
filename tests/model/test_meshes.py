"""Loss and gradients are the same wherever parameters and batch lie."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import abstract_params, map_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.rules import ONE_DEVICE, STRATEGIES, Rules

CFG = ModelConfig(n_layers=2, d_model=32, n_heads=8, n_vocab=40, n_ctx=16, d_rotary=2)
SIZES = {"data": (8, 1), "tensor": (1, 8), "data+tensor": (2, 4), "fsdp": (8, 1)}
ROWS = np.random.default_rng(1).integers(0, CFG.n_vocab, (8, 13)).astype(np.int32)


# Eight heads of width eight, made of four of width sixteen; biases of q, k and v, and a gate.
V2 = ModelConfig(
    architecture="v2", n_layers=2, d_model=32, n_heads=4, d_head=16, n_shards=8, n_vocab=40, n_ctx=16, d_rotary=2
)


def value_and_gradients(cfg: ModelConfig, policy: ComputePolicy, rules: Rules = ONE_DEVICE) -> tuple[float, Any, Any]:
    """Under the mesh in use, if the rules are for one; the gradients' shardings come last."""
    # The legacy term of v2 differentiates the maximum as well.
    kind: Any = "legacy" if cfg.architecture == "v2" else "log_partition"
    params: Any = reference.random_params(abstract_params(cfg), seed=2)
    rows: Any = ROWS
    if rules.on_mesh:
        mesh = jax.sharding.get_mesh()
        params = map_table(lambda s, w: jax.device_put(w, NamedSharding(mesh, rules.param(s.axes))), cfg, params)
        rows = jax.device_put(rows, NamedSharding(mesh, rules.use(("batch", None))))
    run = lambda p, r: loss_report(p, r, cfg, policy, rules, z_loss=0.01, z_loss_kind=kind).total  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(run))(params, rows)
    return float(value), jax.tree.map(np.asarray, gradients), jax.tree.map(lambda g: g.sharding, gradients)


def on_mesh(strategy: str, cfg: ModelConfig, policy: ComputePolicy) -> tuple[float, Any, Any]:
    mesh = jax.make_mesh(SIZES[strategy], ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        return value_and_gradients(cfg, policy, STRATEGIES[strategy])


def furthest(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


@pytest.fixture(scope="module")
def alone() -> tuple[float, Any, Any]:
    return value_and_gradients(CFG, ComputePolicy())


@pytest.fixture(scope="module")
def v2_alone() -> tuple[float, Any, Any]:
    return value_and_gradients(V2, ComputePolicy())


def test_every_strategy_has_a_mesh_here() -> None:
    assert set(SIZES) == set(STRATEGIES)
    assert len(jax.devices()) == 8


@pytest.mark.parametrize("strategy", SIZES)
def test_eight_devices_equal_one(strategy: str, alone) -> None:
    value, gradients, where = on_mesh(strategy, CFG, ComputePolicy())
    assert value == pytest.approx(alone[0], rel=1e-5)
    assert furthest(gradients, alone[1]) <= 1e-5
    assert_gradients_rest_with_their_parameters(strategy, CFG, where)


def assert_gradients_rest_with_their_parameters(strategy: str, cfg: ModelConfig, where: Any) -> None:
    store = STRATEGIES[strategy]
    specs = map_table(lambda s, g: (g.spec, store.param(s.axes)), cfg, where)
    for got, expected in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, tuple)):
        assert tuple(got) + (None,) * (len(expected) - len(got)) == tuple(expected)


@pytest.mark.parametrize("strategy", ["data+tensor", "tensor", "fsdp"])
def test_v2_on_eight_devices(strategy: str, v2_alone) -> None:
    policy = ComputePolicy(loss_chunk=32) if strategy == "tensor" else ComputePolicy()
    value, gradients, where = on_mesh(strategy, V2, policy)
    assert value == pytest.approx(v2_alone[0], rel=1e-5)
    assert furthest(gradients, v2_alone[1]) <= 1e-5
    assert_gradients_rest_with_their_parameters(strategy, V2, where)


@pytest.mark.parametrize(
    ("strategy", "policy", "fields", "tolerance"),
    [
        ("tensor", ComputePolicy(loss_chunk=32, remat="full"), {"position": "t5", "d_rotary": 0}, 1e-5),
        # Sums of factors rounded alike differ by their order only, but may then round to the next bfloat16.
        (
            "data+tensor",
            ComputePolicy(dtype="bfloat16"),
            {"position": "fixed", "d_rotary": 0, "norm": "scalenorm-bias"},
            1e-3,
        ),
    ],
    ids=["t5-in-chunks", "bfloat16-fixed"],
)
def test_other_forms_on_eight_devices(strategy: str, policy: ComputePolicy, fields: Any, tolerance: float) -> None:
    cfg = dataclasses.replace(CFG, **fields)
    value, gradients, _ = value_and_gradients(cfg, policy)
    other, others, _ = on_mesh(strategy, cfg, policy)
    assert other == pytest.approx(value, rel=tolerance)
    assert furthest(others, gradients) <= tolerance
