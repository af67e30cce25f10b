"""Products with weights as stored: every way of multiplying a few rows against the widened matrix."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.kernels import blocked, native
from mesh_transformer.model.layers import product
from mesh_transformer.model.narrow import OfLayer
from mesh_transformer.model.params import ParamSpec
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.model.quantize import Quantized, quantize

KINDS = ("float32", "bfloat16", "float16", "int8", "int4", "int4-128")
# spec of the product; the parameter, its sizes
CASES = {
    "bse,ehd->bshd": (ParamSpec(("layers", "embed", "heads", "head_dim"), inputs=("embed",)), (3, 128, 5, 16)),
    "bshd,hde->bse": (
        ParamSpec(("layers", "heads", "head_dim", "embed"), inputs=("heads", "head_dim")),
        (3, 4, 32, 24),
    ),
    "bse,ev->bsv": (ParamSpec(("embed", "vocab"), inputs=("embed",)), (128, 77)),
}


@functools.cache
def stored(spec: str, kind: str) -> tuple[Any, np.ndarray]:
    """A random matrix as stored, on the device, and what it means in float64."""
    declared, sizes = CASES[spec]
    w = np.random.default_rng(len(kind)).normal(size=sizes).astype(np.float32)
    if kind.startswith("int"):
        held = jax.tree.map(jnp.asarray, quantize(w, declared, kind))
        return held, np.asarray(held.widen(jnp.float32), np.float64)
    held = jnp.asarray(w, kind)
    return held, np.asarray(held.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("rows", [(3, 1), (2, 24), (2, 40)])
@pytest.mark.parametrize("few_rows", ["plain", "blocked", "native"])
@pytest.mark.parametrize(
    ("spec", "kind"),
    [(spec, kind) for spec in CASES for kind in KINDS if kind.startswith("int") or spec == "bshd,hde->bse"],
)
def test_equal_to_the_widened_matrix(spec: str, kind: str, few_rows: Any, rows: tuple[int, int]) -> None:
    if few_rows == "native" and not native.available():
        pytest.fail(f"the native kernels are not there: {native.why_not()}")
    held, wide = stored(spec, kind)
    stacked = "layers" in CASES[spec][0].axes
    n_summed = len(CASES[spec][0].inputs)
    summed = wide.shape[1 : 1 + n_summed] if stacked else wide.shape[:n_summed]
    x = np.random.default_rng(1).normal(size=(*rows, *summed)).astype(np.float32)
    policy = ComputePolicy(few_rows=few_rows)

    @jax.jit
    def multiplied(x: Any, w: Any, layer: Any) -> Any:
        return product(spec, x, OfLayer(w, layer) if stacked else w, policy)

    for layer in range(3 if stacked else 1):
        expected = np.einsum(spec, x.astype(np.float64), wide[layer] if stacked else wide)
        found = multiplied(x, held, jnp.int32(layer))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("rows", "product_rows", "read_as_stored"),
    [((1, 64), 0, True), ((1, 65), 0, False), ((2, 32), 0, True), ((2, 33), 0, False), ((65, 1), 0, True)]
    # Where neighbours must not show, the choice is each text's own.
    + [((2, 33), 8, True), ((9, 64), 8, True), ((9, 65), 8, False)],
)
def test_a_chunk_of_a_prompt_is_few_rows(rows: tuple[int, int], product_rows: int, read_as_stored: bool) -> None:
    held, _ = stored("bse,ev->bsv", "int8")
    policy = ComputePolicy(few_rows="native", product_rows=product_rows)
    program = jax.make_jaxpr(lambda x, w: product("bse,ev->bsv", x, w, policy))(jnp.zeros((*rows, 128)), held)
    assert ("ffi_call" in str(program)) == read_as_stored


@pytest.mark.parametrize("few_rows", ["blocked", "native"])
def test_factors_are_rounded_to_the_policys_dtype(few_rows: Any) -> None:
    held, wide = stored("bse,ev->bsv", "int8")
    x = np.random.default_rng(2).normal(size=(2, 1, 128)).astype(np.float32)
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64)
    expected = np.einsum("bse,ev->bsv", rounded, wide)
    found = product("bse,ev->bsv", jnp.asarray(x), held, ComputePolicy(dtype="bfloat16", few_rows=few_rows))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("few_rows", ["blocked", "native"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_loop_over_layers_copies_no_stack(kind: str, few_rows: Any) -> None:
    """The program's own memory is less than one layer of what it reads, widened, and far less than the stack."""
    n_layers, width = 6, 1024
    declared = ParamSpec(("layers", "embed", "mlp"), inputs=("embed",))
    w = np.random.default_rng(0).normal(size=(n_layers, width, width)).astype(np.float32)
    held: Any = quantize(w, declared, kind) if kind.startswith("int") else jnp.asarray(w, kind)

    def run(x: Any, w: Any) -> Any:
        def one(x: Any, layer: Any) -> Any:
            return product("bse,em->bsm", x, OfLayer(w, layer), ComputePolicy(few_rows=few_rows)), None

        return jax.lax.scan(one, x, jnp.arange(n_layers))[0]

    compiled = jax.jit(run).lower(jnp.zeros((1, 1, width)), held).compile()
    limit = 1 << 20 if few_rows == "native" else 2 * (blocked.block_rows(width, width, 1) * width * 4) + (1 << 20)
    assert compiled.memory_analysis().temp_size_in_bytes <= limit < n_layers * width * width * 4


def test_blocks_divide_the_inputs() -> None:
    assert blocked.block_rows(4096, 16384, 1) == 128
    assert blocked.block_rows(96, 10**9, 32) == 32  # never less than a group
    assert blocked.block_rows(100, 4, 1) == 100
    assert blocked.block_rows(3 * 7 * 128, 16384, 128) == 128


def test_a_quantised_leaf_is_cut_with_its_scale() -> None:
    held, wide = stored("bshd,hde->bse", "int4")
    cut = OfLayer(held, jnp.int32(1)).cut()
    assert isinstance(cut, Quantized)
    np.testing.assert_array_equal(np.asarray(cut.widen(jnp.float32), np.float64), wide[1])
