"""Low-rank adapters: their formulas against the merged matrix, their beginning, and what stands where in the tree."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.lora import (
    LowRank,
    adapt,
    adaptable,
    adapter_table,
    factor_specs,
    init_adapter,
    is_adapted,
    map_specs,
    merged,
    trained,
    with_trained,
)
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import init_params, map_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.model.quantize import Int8, quantize
from mesh_transformer.shapes import Params

V1 = ModelConfig(n_layers=2, d_model=24, n_heads=4, d_ff=40, n_vocab=50, n_ctx=12, d_rotary=4)
V2 = ModelConfig(
    architecture="v2", n_layers=1, d_model=24, n_heads=4, d_ff=40, n_vocab=48, n_ctx=12, d_rotary=4, n_shards=2
)
RANK, SCALE = 3, 0.7
ROWS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (3, 13)), jnp.int32)
POLICY = ComputePolicy(dtype="float32")


def adapter_of(cfg: ModelConfig, paths: Any = None) -> Params:
    """A and B both of ordinary size, as after some training."""
    begun = init_adapter(cfg, paths or list(adaptable(cfg)), RANK, jax.random.key(1))
    leaves, structure = jax.tree.flatten(begun)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return structure.unflatten(
        [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


@functools.cache
def params_of(cfg: ModelConfig) -> Params:
    return init_params(cfg, jax.random.key(0))


def relative(a: Any, b: Any) -> float:
    """The largest difference, in parts of the largest value of `b`."""
    wide = [np.asarray(x, np.float64) for x in (a, b)]
    return float(np.abs(wide[0] - wide[1]).max() / np.abs(wide[1]).max())


@pytest.mark.parametrize("cfg", [V1, pytest.param(V2, marks=pytest.mark.long)], ids=["v1", "v2"])
def test_loss_and_gradients_are_those_of_the_merged_matrices(cfg: ModelConfig) -> None:
    params, adapter = params_of(cfg), adapter_of(cfg)

    def adapted(adapter: Params) -> Any:
        return loss_report(adapt(params, adapter, SCALE), ROWS, cfg, POLICY).loss

    def plain(adapter: Params) -> Any:
        return loss_report(merged(adapt(params, adapter, SCALE), cfg), ROWS, cfg, POLICY).loss

    (loss, own), (expected, theirs) = (jax.jit(jax.value_and_grad(f))(adapter) for f in (adapted, plain))
    assert abs(loss - expected) < 1e-6 * expected
    assert jax.tree.structure(own) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(theirs), strict=True):
        assert float(jnp.abs(b).max()) > 0
        assert relative(a, b) < 2e-6


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)])
def test_logits_are_those_of_the_merged_model(dtype: Any, bound: float) -> None:
    # A base in bfloat16 is merged with one rounding of its own, of which the adapter has none.
    params = jax.tree.map(lambda w: w.astype(dtype), params_of(V1))
    whole = adapt(params, adapter_of(V1), SCALE)
    both = [forward(p, ROWS[:, :-1], V1, POLICY) for p in (whole, merged(whole, V1))]
    assert relative(*both) < bound
    assert relative(both[0], forward(params, ROWS[:, :-1], V1, POLICY)) > 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(merged(whole, V1))} == {jnp.dtype(dtype)}


def test_factors_are_rounded_by_the_policy() -> None:
    whole = adapt(params_of(V1), adapter_of(V1), SCALE)
    narrow = [forward(p, ROWS[:, :-1], V1, ComputePolicy(dtype="bfloat16")) for p in (whole, merged(whole, V1))]
    exact = forward(whole, ROWS[:, :-1], V1, POLICY)
    assert 1e-4 < relative(narrow[0], exact) < 3e-2
    assert relative(*narrow) < 3e-2


def test_a_base_in_8_bits_takes_no_part_in_the_gradient() -> None:
    paths = ["layers/attn/q", "layers/mlp/w_out"]
    params, adapter = params_of(V1), adapter_of(V1, paths)

    def stacked(spec: Any, w: Any) -> Any:
        return quantize(np.asarray(w), spec) if "layers" in spec.axes and len(spec.axes) > 2 else w

    in_8_bits = map_table(stacked, V1, params)
    widened = map_table(
        lambda _, w: jnp.asarray(w.values, jnp.float32) * w.scale if isinstance(w, Int8) else w, V1, in_8_bits
    )
    in_8_bits = jax.tree.map(jnp.asarray, in_8_bits)

    def loss(adapter: Params, base: Params) -> Any:
        return loss_report(adapt(base, adapter, SCALE), ROWS, V1, POLICY).loss

    own, expected = (jax.grad(loss)(adapter, base) for base in (in_8_bits, widened))
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
        assert relative(a, b) < 1e-5
    with pytest.raises(TypeError, match="8 or 4 bits"):
        merged(adapt(in_8_bits, adapter, SCALE), V1)


def test_an_adapter_begins_as_peft_begins_and_changes_nothing() -> None:
    begun = init_adapter(V1, list(adaptable(V1)), RANK, jax.random.key(4))
    bounds = {"q": 24, "k": 24, "v": 24, "o": 24, "w_in": 24, "w_out": 40}
    for name, n_in in bounds.items():
        factors = begun["layers"]["mlp" if name.startswith("w") else "attn"][name]
        a = np.abs(np.asarray(factors["a"]))
        assert 0.9 / np.sqrt(n_in) < a.max() <= 1 / np.sqrt(n_in)
        assert a.mean() == pytest.approx(0.5 / np.sqrt(n_in), rel=0.25)  # uniform
        assert not np.asarray(factors["b"]).any()
    whole = adapt(params_of(V1), begun, SCALE)
    ids = ROWS[:, :-1]
    np.testing.assert_array_equal(forward(whole, ids, V1, POLICY), forward(params_of(V1), ids, V1, POLICY))


def test_an_a_depends_on_the_seed_and_its_own_name_alone() -> None:
    alone = init_adapter(V1, ["layers/attn/v"], RANK, jax.random.key(4))["layers"]["attn"]["v"]["a"]
    among = init_adapter(V1, list(adaptable(V1)), RANK, jax.random.key(4))["layers"]["attn"]
    np.testing.assert_array_equal(alone, among["v"]["a"])
    assert not np.array_equal(among["v"]["a"], among["k"]["a"])
    other = init_adapter(V1, ["layers/attn/v"], RANK, jax.random.key(5))["layers"]["attn"]["v"]["a"]
    assert not np.array_equal(alone, other)


def test_axes_of_the_factors_follow_from_the_matrix() -> None:
    specs = adaptable(V1)
    o = factor_specs(specs["layers/attn/o"])
    assert o["a"].axes == ("layers", "heads", "head_dim", "rank")
    assert o["b"].axes == ("layers", "rank", "embed")
    head = factor_specs(specs["head/w"])
    assert (head["a"].axes, head["b"].axes) == (("embed", "rank"), ("rank", "vocab"))
    table = adapter_table(V1, ["head/w", "layers/attn/o"])
    begun = init_adapter(V1, ["head/w", "layers/attn/o"], RANK, jax.random.key(0))
    sizes = {**V1.axis_sizes, "rank": RANK}
    map_specs(lambda spec, leaf: np.testing.assert_equal(leaf.shape, tuple(sizes[a] for a in spec.axes)), table, begun)


def test_what_is_trained_is_taken_out_and_put_back() -> None:
    params, adapter = params_of(V1), adapter_of(V1, ["head/w", "layers/attn/q"])
    whole = adapt(params, adapter, SCALE)
    assert is_adapted(whole) and not is_adapted(params)
    assert isinstance(whole["layers"]["attn"]["q"], LowRank) and whole["layers"]["attn"]["k"] is not None
    taken = trained(whole)
    assert jax.tree.structure(taken) == jax.tree.structure(adapter)
    assert all(a is b for a, b in zip(jax.tree.leaves(taken), jax.tree.leaves(adapter), strict=True))
    doubled = with_trained(whole, jax.tree.map(lambda w: 2 * w, taken))
    np.testing.assert_array_equal(doubled["head"]["w"].a, 2 * adapter["head"]["w"]["a"])
    assert doubled["head"]["w"].base is params["head"]["w"]
    assert doubled["layers"]["attn"]["k"] is params["layers"]["attn"]["k"]
    assert trained(params) is params and with_trained(params, adapter) is adapter
