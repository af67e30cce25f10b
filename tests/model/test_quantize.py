"""Weights in 8 or 4 bits: what rounding does to a weight, a product, a model; and where such weights may lie."""

from __future__ import annotations

import dataclasses
import functools
import re
import tracemalloc
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
from mesh_transformer.config.errors import CheckpointError, ConfigError, UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import mesh_from_text
from mesh_transformer.model import layers
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import (
    ParamSpec,
    abstract_params,
    count_matmul_params,
    count_params,
    is_multiplied,
    map_table,
    named_specs,
    param_table,
    shape,
)
from mesh_transformer.model.policy import ComputePolicy, for_inference
from mesh_transformer.model.quantize import Int8, map_arrays, quantize
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, inference_layout

CFG = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_vocab=272, n_ctx=32, d_rotary=8)
V2 = dataclasses.replace(CFG, architecture="v2", n_shards=4, feed_forward="glu_gelu_tanh")
TOKENS = np.random.default_rng(0).integers(0, 272, (3, 11))
IN, OUT = (
    ParamSpec(("layers", "embed", "heads", "head_dim"), inputs=("embed",)),
    ParamSpec(("layers", "heads", "head_dim", "embed"), inputs=("heads", "head_dim")),
)


def long(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.long)


def random(size: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def wide(q: Int8) -> np.ndarray:
    return np.asarray(q.values, np.float32) * np.asarray(q.scale)


def params_of(cfg: ModelConfig, dtype: str = "float32") -> Any:
    """Twice as wide as a model begins, so that layers matter."""
    numbers = np.random.default_rng(1)

    def one(spec: ParamSpec) -> np.ndarray:
        drawn = spec.fill if spec.std is None else 2 * spec.std * numbers.normal(size=shape(spec, cfg))
        return np.broadcast_to(drawn, shape(spec, cfg)).astype(jnp.dtype(dtype))

    return map_table(one, cfg)


def model_on(cfg: ModelConfig, mesh: str | None, *, name: str | None = "int8", dtype: str = "float32") -> Model:
    layout = ONE_DEVICE_LAYOUT if mesh is None else inference_layout(mesh_from_text(mesh), cfg)
    params = params_of(cfg)
    place = functools.partial(map_arrays, lambda a, axes: jax.device_put(a, layout.sharding(layout.rules.param(axes))))
    placed = map_table(place, cfg, assemble_as(InMemory(cfg, params), name))
    return Model(cfg, placed, None, ComputePolicy(dtype=dtype), None, layout)


# ---- one matrix


@pytest.mark.parametrize("spec", [IN, OUT])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stacked", [True, False])
def test_no_weight_is_further_than_half_a_scale(spec: ParamSpec, dtype: str, stacked: bool) -> None:
    w = np.asarray(random((3, 8, 4, 16) if stacked else (8, 4, 16)) * np.float32(0.03)).astype(jnp.dtype(dtype))
    q = quantize(w, spec)
    assert q.values.dtype == np.int8 and q.values.shape == w.shape and q.scale.dtype == np.float32
    contracted = (1,) if spec is IN else (1, 2)
    contracted = contracted if stacked else tuple(axis - 1 for axis in contracted)
    assert q.scale.shape == tuple(1 if i in contracted else n for i, n in enumerate(w.shape))
    exact = np.asarray(w, np.float64)
    assert (np.abs(exact - q.values * q.scale.astype(np.float64)) <= q.scale / 2 * (1 + 1e-5)).all()
    # The scale is as small as it can be: the largest weight of every channel has the largest number.
    assert (np.abs(q.values).max(contracted) == 127).all()
    np.testing.assert_allclose(q.scale, np.abs(exact).max(contracted, keepdims=True) / 127, rtol=1e-6)


def test_a_channel_of_zeros_and_others_of_any_size() -> None:
    w = random((6, 8))
    w[:, 0], w[:, 1], w[:, 2], w[:, 3] = 0, 1e-38 * w[:, 1], 1e-30 * w[:, 2], 1e38 * np.sign(w[:, 3])
    w[0, 4] = 1e6  # an outlier costs its own channel alone
    q = quantize(w, ParamSpec(("embed", "mlp"), inputs=("embed",)))
    assert not q.values[:, :2].any() and not q.scale[:, :2].any()
    assert (np.abs(wide(q) - w) <= np.maximum(q.scale / 2 * (1 + 1e-5), 1.5e-36)).all()
    assert np.isfinite(wide(q)).all() and (np.abs(q.values[:, 3]) == 127).all()


def test_representable_weights_are_kept_exactly() -> None:
    whole = np.random.default_rng(0).integers(-127, 128, (2, 16, 24)).astype(np.float32)
    whole[:, 0] = 127
    w = whole * 2.0 ** np.random.default_rng(1).integers(-20, 3, (2, 1, 24)).astype(np.float32)
    q = quantize(w, ParamSpec(("layers", "embed", "mlp"), inputs=("embed",)))
    np.testing.assert_array_equal(q.values, whole)
    np.testing.assert_array_equal(wide(q), w)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    params = params_of(CFG)
    params["layers"]["mlp"]["w_in"][1, 5, 6] = value
    with pytest.raises(CheckpointError, match="layers/mlp/w_in of layer 1 holds NaN or infinity"):
        assemble_as(InMemory(CFG, params), "int8")


@pytest.mark.parametrize(
    ("einsum", "x", "w", "spec"),
    [
        ("bse,ehd->bshd", (2, 5, 64), (64, 4, 16), IN),
        ("bshd,hde->bse", (2, 5, 4, 16), (4, 16, 64), OUT),
        ("bse,ev->bsv", (2, 5, 64), (64, 272), ParamSpec(("embed", "vocab"), inputs=("embed",))),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_product(einsum: str, x: tuple[int, ...], w: tuple[int, ...], spec: ParamSpec, dtype: str) -> None:
    a, q = random(x), quantize(random(w, 1), spec)
    found = layers.product(einsum, jnp.asarray(a), jax.tree.map(jnp.asarray, q), ComputePolicy(dtype=dtype))
    # Activations are rounded to the dtype; whole numbers are exact in each, and sums are float32.
    rounded = np.asarray(jnp.asarray(a).astype(dtype), np.float64)
    expected = np.einsum(einsum, rounded, q.values * q.scale.astype(np.float64))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


# ---- a model


@pytest.mark.parametrize("cfg", [CFG, dataclasses.replace(CFG, position="t5", d_rotary=0), V2], ids=["v1", "t5", "v2"])
def test_what_is_quantised(cfg: ModelConfig) -> None:
    params = params_of(cfg)
    quantized = assemble_as(InMemory(cfg, params), "int8")
    for path, spec in named_specs(cfg).items():
        before, after = leaf_at(params, path), leaf_at(quantized, path)
        if not is_multiplied(spec):
            np.testing.assert_array_equal(after, before)
            continue
        stacked = spec.axes[0] == "layers"
        layers_of = [quantize(w, spec) for w in before] if stacked else [quantize(before, spec)]
        np.testing.assert_array_equal(after.values, np.reshape([q.values for q in layers_of], before.shape))
        np.testing.assert_array_equal(after.scale, np.reshape([q.scale for q in layers_of], after.scale.shape))
    assert {p for p, s in named_specs(cfg).items() if is_multiplied(s)} >= {
        "head/w",
        "layers/attn/o",
        "layers/mlp/w_in",
    }


def test_bytes() -> None:
    cfg = dataclasses.replace(CFG, d_model=256, n_layers=4)
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(assemble_as(InMemory(cfg, params_of(cfg)), "int8")))
    multiplied = count_matmul_params(cfg)
    rest = 4 * (count_params(cfg) - multiplied)
    assert multiplied + rest < n_bytes < 1.03 * multiplied + rest


@pytest.mark.parametrize(
    ("cfg", "dtype"),
    [
        (CFG, "float32"),
        (V2, "bfloat16"),
        long(CFG, "bfloat16"),
        long(V2, "float32"),
        long(dataclasses.replace(CFG, position="fixed", d_rotary=0), "float32"),
    ],
    ids=["v1-float32", "v2-bfloat16", "v1-bfloat16", "v2-float32", "fixed-float32"],
)
def test_a_model_computes_with_the_rounded_weights(cfg: ModelConfig, dtype: str) -> None:
    """Equal, but for the order of roundings, to a float32 model of the rounded weights; near to one of the given."""
    here = model_on(cfg, None, dtype=dtype)
    assert here.policy.widen_by_layer and not here.policy.unroll
    expected = rounded(here).logits(TOKENS)
    bound = {"float32": 1e-5, "bfloat16": 3e-2}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(here.logits(TOKENS), expected, rtol=0, atol=bound)
    # Rounding to 127 levels moves each product by about a 200th of its spread, and a few of them add up.
    given = model_on(cfg, None, name=None).logits(TOKENS)
    assert 1e-3 < (expected - given).std() / given.std() < 4e-2


def rounded(model: Model) -> Model:
    """A float32 model of the weights that an int8 model has."""
    wider = map_table(lambda s, w: jnp.asarray(wide(w) if isinstance(w, Int8) else w), model.config, model.params)
    return Model(model.config, wider, None, ComputePolicy())


@pytest.mark.long
def test_features_scores_and_texts() -> None:
    here = model_on(CFG, None)
    plain = rounded(here)
    expected = plain.features(TOKENS, layer=1)
    np.testing.assert_allclose(here.features(TOKENS, layer=1), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert here._score([1, 2], [3, 4, 5])[0] == pytest.approx(plain._score([1, 2], [3, 4, 5])[0], rel=1e-5)
    texts = [m.generate([[1, 2, 3], [4]], max_tokens=12, temperature=0.0) for m in (here, plain)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [(1, 16), (2, 1)])
def test_no_copy_of_all_weights(tokens: tuple[int, int], compute: str) -> None:
    """The program's own memory holds one layer in wider numbers, not all; without the care taken it does."""
    cfg = ModelConfig(n_layers=8, d_model=256, n_heads=4, n_vocab=512, n_ctx=64, d_rotary=16)

    def abstract(spec: ParamSpec, leaf: Any) -> Any:
        if not is_multiplied(spec):
            return leaf
        channels = tuple(1 if a in spec.inputs else n for a, n in zip(spec.axes, leaf.shape, strict=True))
        return Int8(jax.ShapeDtypeStruct(leaf.shape, jnp.int8), jax.ShapeDtypeStruct(channels, jnp.float32))

    params = map_table(abstract, cfg, abstract_params(cfg, jnp.float32))

    def temporary(policy: ComputePolicy) -> int:
        program = jax.jit(functools.partial(forward, cfg=cfg, policy=policy))
        compiled = program.lower(params, jax.ShapeDtypeStruct(tokens, jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    layer, head = 4 * 12 * cfg.d_model**2, 4 * cfg.d_model * cfg.n_vocab
    all_layers = cfg.n_layers * layer
    assert 2 * layer + head < 0.35 * all_layers
    assert temporary(for_inference(ComputePolicy(dtype=compute), params, one_device=True)) < 2 * layer + head
    if compute == "float32" and tokens == (1, 16):
        assert temporary(ComputePolicy(dtype=compute, unroll=True)) > 0.5 * all_layers


ROWS = [2, 3, 4, 5, 7, 8, 9, 15]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("einsum", "x", "w", "spec"),
    [
        ("bse,em->bsm", (64,), (64, 272), ParamSpec(("embed", "mlp"), inputs=("embed",))),
        ("bse,em->bsm", (256,), (256, 1024), ParamSpec(("embed", "mlp"), inputs=("embed",))),
        ("bse,ehd->bshd", (256,), (256, 4, 64), IN),
        ("bshd,hde->bse", (4, 64), (4, 64, 256), OUT),
    ],
)
def test_a_row_does_not_depend_on_its_neighbours(
    einsum: str, x: tuple[int, ...], w: tuple[int, ...], spec: ParamSpec, dtype: str
) -> None:
    """Bit for bit, in a product of two rows or more."""
    q = jax.tree.map(jnp.asarray, quantize(random(w), spec))
    program = jax.jit(lambda x, w: layers.product(einsum, x, w, ComputePolicy(dtype=dtype)))
    rows = random((16, 1, *x), 1)
    together = np.asarray(program(rows, q))
    for n in (2, 3, 4, 5, 7, 8, 9, 15):
        np.testing.assert_array_equal(program(rows[:n], q), together[:n])
        np.testing.assert_array_equal(program(rows[16 - n :], q), together[16 - n :])


# ---- devices


@pytest.mark.parametrize(
    ("mesh", "position"),
    [("data=2,tensor=2", "rotary"), long("tensor=2", "t5"), long("tensor=4", "fixed"), long("data=4", "rotary")],
)
def test_several_devices_answer_as_one(mesh: str, position: Any) -> None:
    cfg = dataclasses.replace(CFG, position=position, d_rotary=8 if position == "rotary" else 0)
    one, here = model_on(cfg, None), model_on(cfg, mesh)
    expected = one.logits(TOKENS)
    assert np.abs(here.logits(TOKENS) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.long
def test_features_scores_and_texts_on_several_devices() -> None:
    one, here = model_on(CFG, None), model_on(CFG, "data=2,tensor=2")
    expected = one.features(TOKENS, layer=1)
    assert np.abs(here.features(TOKENS, layer=1) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert here._score([1, 2], [3, 4, 5])[0] == pytest.approx(one._score([1, 2], [3, 4, 5])[0], rel=1e-5)
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8]]
    ours, theirs = (m.generate(prompts, max_tokens=12, temperature=0.0) for m in (one, here))
    assert [c.tokens for c in ours] == [c.tokens for c in theirs]


def test_scales_send_nothing() -> None:
    """The sums over devices are those of other weights, each made once."""
    sums = []
    for name in ("int8", None):
        model = model_on(CFG, "tensor=2", name=name)
        with model.layout.using():
            program = jax.jit(functools.partial(forward, cfg=CFG, policy=ComputePolicy(), rules=model.layout.rules))
            text = program.lower(model.params, jnp.zeros((2, 8), jnp.int32)).compile().as_text()
        sums.append(len(re.findall(r" (?:all|reduce|collective)-[a-z-]*\(", text)))
    assert sums[0] == sums[1] > 0


def test_values_and_scales_are_divided_alike() -> None:
    params = model_on(CFG, "data=2,tensor=4").params

    def local(leaf: Any) -> tuple[Any, Any]:
        return tuple(a.sharding.shard_shape(a.shape) for a in (leaf.values, leaf.scale))

    assert local(params["layers"]["attn"]["q"]) == ((2, 64, 1, 16), (2, 1, 1, 16))
    assert local(params["layers"]["attn"]["o"]) == ((2, 1, 16, 64), (2, 1, 1, 64))
    assert local(params["layers"]["mlp"]["w_in"]) == ((2, 64, 64), (2, 1, 64))
    assert local(params["layers"]["mlp"]["w_out"]) == ((2, 64, 64), (2, 1, 64))
    assert local(params["head"]["w"]) == ((64, 68), (1, 68))


# ---- loading, saving, mistakes


def test_load(tmp_path: Path) -> None:
    Model(CFG, params_of(CFG, "bfloat16"), None).save(tmp_path / "model")
    done: list[tuple[int, int]] = []
    opened = mt.load(
        tmp_path / "model",
        quantize="int8",
        dtype="f32",
        tokenizer="bytes",
        progress=lambda _, n, of: done.append((n, of)),
    )
    assert done[-1][0] == done[-1][1] == 2 * count_params(CFG)
    expected = assemble_as(InMemory(CFG, params_of(CFG, "bfloat16")), "int8", jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, opened.params, expected)
    assert opened.params["embed"]["tokens"].dtype == jnp.float32
    as_stored = mt.load(tmp_path / "model", quantize="int8", mesh="tensor=2")
    assert as_stored.params["embed"]["tokens"].dtype == jnp.bfloat16
    np.testing.assert_allclose(as_stored.logits(TOKENS), opened.logits(TOKENS), rtol=0, atol=1e-4)
    text = opened.generate("abc", max_tokens=5, seed=1)[0]
    assert opened.generate("abc", max_tokens=5, seed=1)[0] == text
    assert opened.log_likelihood("abc", "d")[0] < 0
    for format in ("native", "huggingface"):
        with pytest.raises(UserError, match=r"(?s)rounded to 8 or 4 bits.*load the original"):
            opened.save(tmp_path / "copy", format=format)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("given", ["int3", "INT8", "", 8, True])
def test_unknown_quantization(tmp_path: Path, given: Any) -> None:
    with pytest.raises(UserError, match=r"quantize = .* is not known; expected int8, int4 or int4-128, or nothing"):
        mt.load(tmp_path / "never opened", quantize=given)


def test_a_value_too_large_for_the_other_parameters(tmp_path: Path) -> None:
    params = params_of(CFG)
    params["embed"]["tokens"][0, 0] = 1e6
    with pytest.raises(ConfigError, match="embed/tokens has a value that is too large for float16"):
        assemble_as(InMemory(CFG, params), "int8", jnp.float16)


def test_matrices_are_quantised_from_what_is_stored() -> None:
    """Not from a rounding of it; and values that float16 does not reach are no obstacle."""
    params = params_of(CFG)
    params["head"]["w"] *= np.float32(1e6)
    found = assemble_as(InMemory(CFG, params), "int8", jnp.float16)["head"]["w"]
    np.testing.assert_array_equal(found.scale, quantize(params["head"]["w"], param_table(CFG)["head"]["w"]).scale)


def test_loading_holds_a_few_layers_in_float32() -> None:
    cfg = dataclasses.replace(CFG, n_layers=16, d_model=96, n_vocab=64)
    weights = InMemory(cfg, params_of(cfg))
    weights.readers = 1
    assemble_as(weights, "int8")  # whatever is imported or cached on the way
    tracemalloc.start()
    try:
        params = assemble_as(weights, "int8")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = 4 * 4 * cfg.d_model**2
    # What is read ahead is in 8 bits already: at the most all of it, beside the result.
    assert result < peak < 2 * result + 4 * largest < 3.5 * count_params(cfg)


def test_there_is_no_training() -> None:
    params = jax.tree.map(jnp.asarray, assemble_as(InMemory(CFG, params_of(CFG)), "int8"))
    loss = lambda p: loss_report(p, jnp.asarray(TOKENS, jnp.int32), CFG, ComputePolicy()).total  # noqa: E731
    with pytest.raises(TypeError, match="int8"):
        jax.grad(loss)(params)
