"""The training step in its fast forms on CPU beside the plain ones: values, gradients, and what XLA made of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import TrainConfig
from mesh_transformer.model.lora import adapt, init_adapter, trained, with_trained
from mesh_transformer.model.loss import LossReport, loss_report
from mesh_transformer.model.params import init_params
from mesh_transformer.model.policy import CPU_FORMS, ComputePolicy, default_policy
from mesh_transformer.shapes import Params
from mesh_transformer.train.state import initial_state
from mesh_transformer.train.step import make_train_step

CFG = ModelConfig(n_layers=1, d_model=64, n_heads=4, n_vocab=512, n_ctx=80, d_rotary=8)
SEPARATOR = 511


def parameters(cfg: ModelConfig = CFG) -> Params:
    """No bias or scale at its initial value."""
    begun = init_params(cfg, jax.random.key(0))
    return jax.tree.map(lambda w: w + 0.02 * jax.random.normal(jax.random.key(w.size), w.shape), begun)


def some_rows() -> np.ndarray:
    """Four rows, with documents, and targets in one that are not learned."""
    rows = np.random.default_rng(0).integers(0, CFG.n_vocab, (4, CFG.n_ctx + 1)).astype(np.int32)
    rows[0, [7, 70, 71]] = SEPARATOR
    rows[1, :40] = ~rows[1, :40]
    return rows


def policy_with(forms: frozenset[Any], dtype: str = "float32", **changes: Any) -> ComputePolicy:
    return dataclasses.replace(default_policy(dtype), forms=forms, loss_chunk=200, **changes)


@functools.cache
def both(policy: ComputePolicy, cfg: ModelConfig = CFG, part: str = "total", **how: Any) -> tuple[Params, LossReport]:
    """The gradient of one of the report's numbers, and the report."""

    def of(params: Params) -> tuple[Any, LossReport]:
        report = loss_report(params, jnp.asarray(some_rows()), cfg, policy, z_loss=1e-2, **how)
        return getattr(report, part), report

    grads, report = jax.jit(jax.grad(of, has_aux=True))(parameters(cfg))
    return grads, report


def differences(a: Params, b: Params) -> dict[str, float]:
    """Of every parameter's gradient, relative to its length."""
    norms = jax.tree.map(lambda x, y: float(jnp.linalg.norm(x - y) / jnp.maximum(jnp.linalg.norm(y), 1e-30)), a, b)
    return {jax.tree_util.keystr(path): d for path, d in jax.tree_util.tree_leaves_with_path(norms)}


def assert_alike(fast: tuple[Params, LossReport], plain: tuple[Params, LossReport], bound: float = 1e-6) -> None:
    found = differences(fast[0], plain[0])
    assert max(found.values()) < bound, found
    for mine, other in zip(jax.tree.leaves(fast[1]), jax.tree.leaves(plain[1]), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)


@pytest.mark.parametrize("form", sorted(CPU_FORMS))
def test_each_form_alone_has_the_plain_gradient(form: Any) -> None:
    assert_alike(both(policy_with(frozenset({form}))), both(policy_with(frozenset())))


@pytest.mark.parametrize("kind", ["legacy", "log_partition"])
@pytest.mark.parametrize("separator", [None, SEPARATOR])
def test_all_together_have_the_plain_gradient(kind: str, separator: int | None) -> None:
    how = {"z_loss_kind": kind, "separator": separator}
    assert_alike(both(policy_with(CPU_FORMS), **how), both(policy_with(frozenset()), **how))


@pytest.mark.parametrize("part", ["loss", "z_loss", "last"])
def test_other_numbers_of_the_report_have_gradients_too(part: str) -> None:
    assert_alike(both(policy_with(CPU_FORMS), part=part), both(policy_with(frozenset()), part=part))


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "rmsnorm", "d_ff": 36}, {"norm": "layernorm-nobias", "position": "t5", "d_rotary": 0},
        {
            "norm": "rms", "residual": "serial", "rotary_layout": "half", "feed_forward": "glu_silu", "biases": (),
            "n_kv_heads": 2, "qk_norm": True, "tied_head": True,
        },
        {
            "n_layers": 2, "residual": "serial", "position": "fixed", "d_rotary": 0, "tied_head": True,
            "biases": ("out", "mlp"), "window": 20, "windowed_layers": "odd", "scale_scores": False,
        },
        {"residual": "parallel-two-norms", "feed_forward": "gelu", "biases": ("qkv", "out", "mlp")},
    ],
    ids=["rmsnorm", "t5", "shared-tied", "alternating-tied", "two-norms"],
)  # fmt: skip
def test_other_models(change: dict[str, Any]) -> None:
    cfg = dataclasses.replace(CFG, **change)
    assert_alike(both(policy_with(CPU_FORMS), cfg), both(policy_with(frozenset()), cfg), bound=3e-6)


def test_a_window_and_recomputation() -> None:
    cfg = dataclasses.replace(CFG, n_ctx=48)
    assert_alike(both(policy_with(CPU_FORMS, remat="full"), cfg), both(policy_with(frozenset()), cfg))
    looped = policy_with(CPU_FORMS, remat="dots", unroll=False)
    assert_alike(both(looped, cfg), both(policy_with(frozenset()), cfg))


def test_bfloat16_is_as_near_to_float32_as_the_plain_form() -> None:
    """float32's own distance from float64 is a thousandth of the distances compared here."""
    truth, _ = both(policy_with(frozenset()))
    plain = differences(both(policy_with(frozenset(), "bfloat16"))[0], truth)
    fast = differences(both(policy_with(CPU_FORMS, "bfloat16"))[0], truth)
    assert all(fast[name] < 1.25 * plain[name] for name in plain), {name: (fast[name], plain[name]) for name in plain}
    assert sum(fast.values()) < 1.1 * sum(plain.values())


def test_an_adapter_over_a_frozen_base() -> None:
    adapter = init_adapter(CFG, ["layers/attn/q", "layers/mlp/w_out"], 2, jax.random.key(1))
    adapted = adapt(
        parameters(),
        jax.tree.map(lambda w: w + 0.05 * jax.random.normal(jax.random.key(w.size), w.shape), adapter),
        2.0,
    )

    def gradient(policy: ComputePolicy) -> tuple[Params, LossReport]:
        def of(own: Params) -> tuple[Any, LossReport]:
            report = loss_report(with_trained(adapted, own), jnp.asarray(some_rows()), CFG, policy)
            return report.total, report

        return jax.jit(jax.grad(of, has_aux=True))(trained(adapted))

    assert_alike(gradient(policy_with(CPU_FORMS)), gradient(policy_with(frozenset())))


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.long), 2])
def test_steps_go_the_same_way(accumulation: int) -> None:
    losses = [step_losses(forms, accumulation) for forms in (frozenset[Any](), CPU_FORMS)]
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def step_losses(forms: frozenset[Any], accumulation: int) -> list[float]:
    how: dict[str, Any] = {"batch_size": 4, "gradient_accumulation": accumulation, "z_loss": 1e-3}
    train = TrainConfig(steps=6, learning_rate=1e-2, warmup_steps=0, **how)
    rows = jnp.asarray(some_rows().reshape(accumulation, 4 // accumulation, -1))
    state, found = initial_state(CFG, train, 0), []
    step = jax.jit(make_train_step(CFG, train, policy_with(forms)))
    for _ in range(6):
        state, report = step(state, rows)
        found.append(float(report.total_loss))
    return found
