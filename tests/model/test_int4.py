"""Weights in 4 bits: which number and which scale a weight gets, how two lie in a byte, what a model makes of them."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mesh_transformer as mt
from mesh_transformer.api import Model
from mesh_transformer.checkpoint.quantized import assemble_as
from mesh_transformer.checkpoint.weights import InMemory, leaf_at
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import mesh_from_text
from mesh_transformer.model.int4 import CANDIDATES, round_groups
from mesh_transformer.model.params import ParamSpec, is_multiplied, map_table, named_specs, shape
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.model.quantize import Int4, check_layout, described, map_arrays, quantize
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, inference_layout

CFG = ModelConfig(n_layers=2, d_model=128, n_heads=4, n_vocab=272, n_ctx=32, d_rotary=8)
V2 = dataclasses.replace(CFG, architecture="v2", n_shards=4, feed_forward="glu_gelu_tanh")
TOKENS = np.random.default_rng(0).integers(0, 272, (3, 11))
IN = ParamSpec(("layers", "embed", "heads", "head_dim"), inputs=("embed",))
OUT = ParamSpec(("layers", "heads", "head_dim", "embed"), inputs=("heads", "head_dim"))
PLAIN = ParamSpec(("embed", "mlp"), inputs=("embed",))


def random(size: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def decoded(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float64 [inputs, outputs] of bytes [inputs / 2, outputs] and scales [groups, outputs], one number at a time."""
    n_inputs = 2 * len(values)
    found = np.empty((n_inputs, values.shape[1]))
    for k in range(n_inputs):
        byte = values[k // 2].astype(int)
        half = byte % 16 if k % 2 == 0 else byte // 16
        found[k] = (half - 8) * scale[k * len(scale) // n_inputs].astype(np.float64)
    return found


def params_of(cfg: ModelConfig) -> Any:
    """Twice as wide as a model begins, so that layers matter."""
    numbers = np.random.default_rng(1)

    def one(spec: ParamSpec) -> np.ndarray:
        drawn = spec.fill if spec.std is None else 2 * spec.std * numbers.normal(size=shape(spec, cfg))
        return np.broadcast_to(drawn, shape(spec, cfg)).astype(np.float32)

    return map_table(one, cfg)


def model_on(cfg: ModelConfig, mesh: str | None, name: str | None) -> Model:
    layout = ONE_DEVICE_LAYOUT if mesh is None else inference_layout(mesh_from_text(mesh), cfg)
    place = functools.partial(map_arrays, lambda a, axes: jax.device_put(a, layout.sharding(layout.rules.param(axes))))
    params = assemble_as(InMemory(cfg, params_of(cfg)), name)
    return Model(cfg, map_table(place, cfg, params), None, ComputePolicy(), None, layout)


# ---- one matrix


@pytest.mark.parametrize("group", [4, 32, 128])
def test_each_weight_gets_the_nearest_level_and_each_group_the_best_candidate(group: int) -> None:
    w = random((256, 96)) * np.exp(random((1, 96), 1))
    values, scale = round_groups(w, group)
    assert values.dtype == np.uint8 and values.shape == (128, 96)
    assert scale.dtype == np.float16 and scale.shape == (256 // group, 96)
    levels = np.arange(-8, 8)

    def errors(scales: np.ndarray) -> np.ndarray:
        """[inputs, outputs]: squared, of the nearest level."""
        steps = np.repeat(scales.astype(np.float64), group, 0)
        return ((w[..., None] - levels * steps[..., None]) ** 2).min(-1)

    found = (w - decoded(values, scale)) ** 2
    np.testing.assert_allclose(found, errors(scale), rtol=1e-4, atol=1e-12)
    groups = w.reshape(-1, group, 96)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)[:, 0]
    sums = [errors((largest / np.float32(c)).astype(np.float16)).reshape(-1, group, 96).sum(1) for c in CANDIDATES]
    np.testing.assert_allclose(found.reshape(-1, group, 96).sum(1), np.min(sums, 0), rtol=1e-4)
    used = {int(i) for i in np.argmin(sums, 0).flat}
    assert len(used) == len(CANDIDATES) if group > 4 else len(used) > 2


@pytest.mark.parametrize(("group", "most"), [(32, 0.0825), (128, 0.0978)])
def test_what_the_choice_is_worth(group: int, most: float) -> None:
    """Relative error of normal weights. With max |w| / 7 alone it would be 0.097 and 0.117."""
    w = random((1024, 512))

    def relative(w: np.ndarray, other: np.ndarray) -> float:
        return float(np.sqrt(((w - other) ** 2).mean() / (w**2).mean()))

    assert relative(w, decoded(*round_groups(w, group))) < most
    step = np.repeat(np.abs(w).reshape(-1, group, 512).max(1) / 7, group, 0)
    assert relative(w, np.rint(w / step) * step) > most / 0.87


def test_representable_weights_are_kept_exactly() -> None:
    halves = np.random.default_rng(0).integers(-8, 8, (64, 24)).astype(np.float32)
    halves[::32] = -8
    w = halves * 2.0 ** np.random.default_rng(1).integers(-14, 10, (1, 24)).astype(np.float32)
    np.testing.assert_array_equal(decoded(*round_groups(w, 32)), w)
    np.testing.assert_array_equal(decoded(*round_groups(-w, 32)), -w)


def test_groups_of_zeros_and_of_any_size() -> None:
    w = random((64, 6))
    w[:, 0], w[:32, 1], w[:, 2] = 0, 0, w[:, 2] * 1e-6
    w[:, 3], w[5, 4] = 1e5 * np.sign(w[:, 3]), 1e4
    values, scale = round_groups(w, 32)
    found = decoded(values, scale)
    assert not found[:, 0].any() and not found[:32, 1].any() and found[32:, 1].any()
    assert (values[:, 0] == 0x88).all() and not scale[:, 0].any()
    assert np.abs(found[:, 2] - w[:, 2]).max() < 1e-6  # scales are subnormal float16 there
    np.testing.assert_allclose(found[:, 3], w[:, 3], rtol=1e-3)
    np.testing.assert_allclose(found[32:, 4], w[32:, 4], atol=0.3)  # an outlier costs its own group alone
    q = Int4(values, scale)
    np.testing.assert_array_equal(jax.tree.map(jnp.asarray, q).widen(jnp.float32), found.astype(np.float32))


@pytest.mark.parametrize(
    ("value", "told"), [(np.nan, "NaN or infinity"), (-np.inf, "NaN or infinity"), (1e6, "too large")]
)
def test_weights_that_cannot_be_held(value: float, told: str) -> None:
    params = params_of(CFG)
    params["layers"]["mlp"]["w_in"][1, 5, 6] = value
    with pytest.raises(CheckpointError, match=f"layers/mlp/w_in of layer 1 holds .*{told}.*int4"):
        assemble_as(InMemory(CFG, params), "int4")


# ---- layout


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("spec", "size", "name", "group", "axis"),
    [
        (IN, (96, 4, 16), "int4", 32, 0),
        (IN, (96, 4, 16), "int4-128", 32, 0),
        (IN, (256, 4, 16), "int4-128", 128, 0),
        (OUT, (4, 16, 96), "int4", 16, 1),
        (OUT, (3, 64, 10), "int4", 32, 1),
        (OUT, (3, 12, 10), "int4-128", 4, 1),
        (IN, (4, 2, 8), "int4", 4, 0),
    ],
)
def test_where_numbers_and_scales_lie(
    spec: ParamSpec, size: tuple[int, ...], name: str, group: int, axis: int, stacked: bool
) -> None:
    w = random((3, *size) if stacked else size)
    q = quantize(w, spec, name)
    assert isinstance(q, Int4)
    planned = described(name, spec, w.shape)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), q) == jax.tree.map(lambda a: (a.shape, a.dtype), planned)
    axis += stacked
    assert (q.group, q.packed_axis, q.shape) == (group, axis, w.shape)
    assert q.values.shape[axis] == w.shape[axis] // 2 and q.scale.shape[axis] == w.shape[axis] // group
    layers = zip(w, q.values, q.scale, strict=True) if stacked else [(w, q.values, q.scale)]
    n_inputs = math.prod(size[: axis - stacked + 1])
    found = []
    for layer, values, scale in layers:
        flat_values, flat_scale = values.reshape(n_inputs // 2, -1), scale.reshape(n_inputs // group, -1)
        found.append(decoded(flat_values, flat_scale).reshape(layer.shape))
        alone = quantize(layer, spec, name)
        np.testing.assert_array_equal(alone.values, values)
        np.testing.assert_array_equal(alone.scale, scale)
    expected = np.stack(found) if stacked else found[0]
    on_device = jax.tree.map(jnp.asarray, q)
    for dtype in ("float32", "bfloat16", "float16"):
        rounded = expected.astype(np.float32).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(q.widen(jnp.dtype(dtype)), rounded)
        np.testing.assert_array_equal(jax.jit(lambda q, dtype=dtype: q.widen(dtype))(on_device), rounded)


def test_matrices_without_groups_are_refused(tmp_path: Path) -> None:
    cfg = ModelConfig(n_layers=1, d_model=12, n_heads=2, d_head=6, n_vocab=272, n_ctx=8, d_rotary=2)
    Model(cfg, params_of(cfg), None).save(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"layers/attn/o contracts head_dim = 6, .*multiple of 4; use int8"):
        mt.load(tmp_path / "model", quantize="int4")
    assert mt.load(tmp_path / "model", quantize="int8").logits([[1, 2]]).shape == (1, 2, 272)


# ---- a model


@pytest.mark.parametrize(("cfg", "name"), [(CFG, "int4"), (V2, "int4-128")], ids=["v1-int4", "v2-int4-128"])
def test_a_model_computes_with_the_rounded_weights(cfg: ModelConfig, name: str) -> None:
    here = model_on(cfg, None, name)
    for path, spec in named_specs(cfg).items():
        assert isinstance(leaf_at(here.params, path), Int4) == is_multiplied(spec), path
    wider = map_table(lambda s, w: w.widen(np.float32) if isinstance(w, Int4) else w, cfg, here.params)
    expected = Model(cfg, wider, None, ComputePolicy()).logits(TOKENS)
    np.testing.assert_allclose(here.logits(TOKENS), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    given = model_on(cfg, None, None).logits(TOKENS)
    assert 2e-2 < (expected - given).std() / given.std() < 0.3


def test_bytes() -> None:
    """4 bits a weight, and 16 for each group of 32 or 128."""
    for name, bits in (("int4", 4.5), ("int4-128", 4.125)):
        planned = described(name, PLAIN, (1024, 256))
        stored = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(planned))
        assert 8 * stored == bits * 1024 * 256


def test_several_devices_answer_as_one() -> None:
    expected = model_on(CFG, None, "int4").logits(TOKENS)
    here = model_on(CFG, "data=2,tensor=2", "int4")
    assert np.abs(here.logits(TOKENS) - expected).max() <= 1e-5 * np.abs(expected).max()
    leaf = here.params["layers"]["mlp"]["w_out"]
    assert [a.sharding.shard_shape(a.shape) for a in (leaf.values, leaf.scale)] == [(2, 128, 128), (2, 8, 128)]
    leaf = here.params["layers"]["attn"]["o"]
    assert [a.sharding.shard_shape(a.shape) for a in (leaf.values, leaf.scale)] == [(2, 2, 16, 128), (2, 2, 1, 128)]


def test_a_mesh_that_would_cut_a_group_is_refused() -> None:
    cfg = dataclasses.replace(CFG, d_ff=160)  # 5 groups of 32
    layout = inference_layout(mesh_from_text("tensor=2"), cfg)
    params = assemble_as(InMemory(cfg, params_of(cfg)), "int4")
    with pytest.raises(ConfigError, match=re.escape("layers/mlp/w_out has 5 groups of 32 weights along mlp")):
        check_layout(params, cfg, layout)
    check_layout(params, cfg, ONE_DEVICE_LAYOUT)
    check_layout(assemble_as(InMemory(cfg, params_of(cfg)), "int8"), cfg, layout)
