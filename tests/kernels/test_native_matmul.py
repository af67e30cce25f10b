"""The native product against NumPy in float64, on every path that this processor has."""

import ctypes
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_transformer.kernels import native

KINDS = tuple(native.KINDS)
# Sums of n products differ from the exact one by less than n roundings; in blocks it is far less.
TOLERANCE = 1e-6


def library() -> ctypes.CDLL:
    _, found = native._chosen()
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no native extension: {native.why_not()}")
    return found


ELSEWHERE = ("avx512", "avx2") if os.uname().machine in ("aarch64", "arm64") else ("neon",)


@pytest.fixture(params=[path for path in native.PATHS if path not in ELSEWHERE])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Takes that path in this process, then the best one again."""
    choose = library().mesh_transformer_choose
    if choose(request.param.encode()) is None:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    choose(None)


class Weights(NamedTuple):
    kind: str
    stored: np.ndarray
    scale: np.ndarray | None
    exact: np.ndarray  # float64 [layers, inner, columns]


def random_weights(
    rng: np.random.Generator, kind: str, layers: int, inner: int, columns: int, group: int = 32
) -> Weights:
    if kind == "int8":
        values = rng.integers(-128, 128, (layers, inner, columns)).astype(np.int8)
        scale = rng.random((layers, columns), np.float32)
        return Weights(kind, values, scale, values.astype(np.float64) * scale[:, None])
    if kind == "int4":
        halves = rng.integers(0, 16, (layers, inner, columns), np.uint8)
        scale = rng.random((layers, inner // group, columns), np.float32).astype(np.float16)
        exact = (halves.astype(np.float64) - 8) * np.repeat(scale.astype(np.float64), group, axis=1)
        return Weights(kind, halves[:, ::2] | halves[:, 1::2] << 4, scale, exact)
    dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[kind]
    # Small ones among them: half precision has subnormal numbers, which must not be taken for zero.
    sizes = 10.0 ** rng.uniform(-7, 0, (layers, inner, columns))
    stored = (rng.standard_normal((layers, inner, columns)) * sizes).astype(dtype)
    return Weights(kind, stored, None, stored.astype(np.float64))


def product(x: np.ndarray, w: Weights, layer: int) -> np.ndarray:
    scale = None if w.scale is None else jnp.asarray(w.scale)
    y = native.matmul(jnp.asarray(x), jnp.asarray(w.stored), layer, scale, kind=w.kind)
    assert y.dtype == jnp.float32
    return np.asarray(y)


def assert_right(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    wide = x.astype(np.float64)
    # The smallest normal float32 for what is too small for one: XLA's threads take it for zero.
    bound = TOLERANCE * (np.abs(wide) @ np.abs(w)) + np.finfo(np.float32).tiny
    assert y.shape == (len(x), w.shape[1])
    assert (np.abs(y - wide @ w) <= bound).all()


@st.composite
def problems(draw: Any) -> tuple[int, str, int, int, int, int]:
    kind = draw(st.sampled_from(KINDS))
    group = draw(st.sampled_from([2, 6, 8, 32, 48, 128]))
    inner = draw(st.integers(0, 4)) * group if kind == "int4" else draw(st.integers(0, 300))
    return draw(st.integers(0, 2**32)), kind, draw(st.integers(0, 40)), inner, draw(st.integers(0, 700)), group


def check(problem: tuple[int, str, int, int, int, int]) -> None:
    seed, kind, rows, inner, columns, group = problem
    rng = np.random.default_rng(seed)
    w = random_weights(rng, kind, 2, inner, columns, group)
    x = rng.standard_normal((rows, inner)).astype(np.float32)
    assert_right(product(x, w, 1), x, w.exact[1])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(problems())
def few_shapes(problem: tuple[int, str, int, int, int, int]) -> None:
    check(problem)


@settings(max_examples=1500, deadline=None)
@given(problems())
def many_shapes(problem: tuple[int, str, int, int, int, int]) -> None:
    check(problem)


def test_equals_the_reference_in_random_shapes(path: str) -> None:
    few_shapes()


@pytest.mark.long
def test_equals_the_reference_in_many_random_shapes(path: str) -> None:
    many_shapes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_whatever_is_beside_it(path: str, kind: str) -> None:
    """For every number of rows, and so for every division into blocks of rows and chunks of columns."""
    rng = np.random.default_rng(1)
    w = random_weights(rng, kind, 1, 96, 1111)
    x = rng.standard_normal((40, 96)).astype(np.float32)
    together = product(x, w, 0)
    assert_right(together, x, w.exact[0])
    for rows in (*range(1, 18), 31):
        some = rng.permutation(40)[:rows]
        np.testing.assert_array_equal(product(x[some], w, 0), together[some])


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_is_the_same_whatever_the_width(path: str, kind: str) -> None:
    """The chunks that threads take follow from the number of columns."""
    rng = np.random.default_rng(2)
    w = random_weights(rng, kind, 1, 64, 5000)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    whole = product(x, w, 0)
    for columns in (1, 63, 64, 257, 1025, 4096):
        scale = None if w.scale is None else w.scale[..., :columns]
        part = Weights(kind, w.stored[..., :columns], scale, w.exact[..., :columns])
        np.testing.assert_array_equal(product(x, part, 0), whole[:, :columns])


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_arrive_as_in_the_reference(path: str, kind: str, special: float) -> None:
    rng = np.random.default_rng(3)
    w = random_weights(rng, kind, 1, 64, 70)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    x[3, 40] = special
    if w.scale is None:
        w.stored[0, 7, 66] = special
        w = w._replace(exact=w.stored.astype(np.float64))
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ w.exact[0]
    y = product(x, w, 0)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    endless = np.isinf(expected)
    np.testing.assert_array_equal(y[endless], expected[endless])
    rest = np.isfinite(expected)
    assert rest.any() and not rest.all()
    np.testing.assert_allclose(y[rest], expected[rest], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", ["float16", "bfloat16"])
def test_every_number_of_sixteen_bits_is_widened_exactly(path: str, bits: str) -> None:
    dtype = np.float16 if bits == "float16" else ml_dtypes.bfloat16
    every = np.arange(2**16, dtype=np.uint16).view(dtype)[None, None]
    wide = every[0].astype(np.float32)
    # As a subnormal float32 it would count as zero; half precision has none that small.
    wide[np.abs(wide) < np.finfo(np.float32).tiny] = 0
    y = product(np.ones((1, 1), np.float32), Weights(bits, every, None, wide), 0)
    np.testing.assert_array_equal(y, wide)


@pytest.mark.parametrize("kind", KINDS)
def test_the_width_of_vectors_makes_no_difference(kind: str) -> None:
    choose = library().mesh_transformer_choose
    wide, narrow = choose(b"avx512"), choose(b"avx2")
    choose(None)
    if not (wide and narrow):
        pytest.skip("this processor has not both of avx512 and avx2")
    rng = np.random.default_rng(5)
    w = random_weights(rng, kind, 1, 128, 333)
    x = rng.standard_normal((9, 128)).astype(np.float32)
    y = product(x, w, 0)
    choose(b"avx2")
    np.testing.assert_array_equal(product(x, w, 0), y)
    choose(None)


def test_rows_of_a_batch() -> None:
    library()
    rng = np.random.default_rng(4)
    w = random_weights(rng, "int8", 2, 40, 30)
    x = rng.standard_normal((3, 2, 40)).astype(np.float32)
    y = jax.vmap(lambda x: native.matmul(x, jnp.asarray(w.stored), 1, jnp.asarray(w.scale)))(jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(y), np.stack([product(part, w, 1) for part in x]))
