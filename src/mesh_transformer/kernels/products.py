"""Products with weights, and sums over rows, in the forms for which XLA on CPU has its fast kernels.

What decides (jaxlib 0.10.2; tests/kernels/test_fast_kernels.py looks at the compiled programs): a product of 16-bit
factors is computed as such only if its result is float32 and its left factor does not lie transposed; otherwise both
factors are first widened to float32. The left factor of a weight's gradient is a transposed activation. A plain
transpose is folded into the product; one that goes through a third axis is carried out, and what is left is fast. (A
product that sums over two axes, [batch seq], is put so by XLA itself.) The gradient of a bias, a sum over rows, is
taken as a product with ones.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.shapes import Array

# Rows that `turned` takes together.
_ROWS = 32
# Rows of ones in `row_sums`: a product with a single row is not given to the fast kernel.
_ONES = 8


def plain_product(x: Array, w: Array, dtype: str) -> Array:
    """The reference: x w, factors rounded to `dtype`, summed and returned in float32. x: [rows, K]; w: [K, N]."""
    return _dot(x, w, dtype, 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, w: Array, dtype: str) -> Array:
    """As `plain_product`; the products of its gradient round their factors to `dtype` too.

    A gradient is returned in the dtype of what it belongs to.
    """
    return plain_product(x, w, dtype)


def _product_forward(x: Array, w: Array, dtype: str) -> tuple[Array, Any]:
    # Rounded once for both passes. The empty arrays hold the dtypes that the gradients are to have.
    kept = x.astype(dtype), w.astype(dtype)
    return plain_product(*kept, dtype), (*kept, jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype))


def _product_backward(dtype: str, saved: Any, g: Array) -> tuple[Array, Array]:
    x, w, like_x, like_w = saved
    dx, dw = gradients(x, w, g.astype(dtype), dtype)
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


product.defvjp(_product_forward, _product_backward)


def gradients(x: Array, w: Array, g: Array, dtype: str) -> tuple[Array, Array]:
    """The gradients of x w, float32, for the gradient `g` ([rows, N]) of the product."""
    x = x.astype(dtype)
    left = turned(x) if x.dtype.itemsize == 2 else x.T  # float32 factors are not widened, whichever way they lie
    return _dot(g, w, dtype, 1, 1), _dot(left, g, dtype, 1, 0)


def turned(x: Array) -> Array:
    """x transposed, carried out rather than folded into the product that it is a factor of. x: [rows, K]."""
    rows, k = x.shape
    n = math.gcd(rows, _ROWS)
    return x.reshape(rows // n, n, k).transpose(2, 0, 1).reshape(k, rows) if n > 1 else x.T


def plain_row_sums(g: Array) -> Array:
    """The reference: the sum over all axes but the last, float32."""
    return jnp.sum(g.astype(jnp.float32), axis=tuple(range(g.ndim - 1)))


def row_sums(g: Array, weights: Array | None = None) -> Array:
    """As `plain_row_sums`, or of every row times its weight ([rows]), as a product in float32."""
    rows = g.reshape(-1, g.shape[-1])
    each = jnp.ones(rows.shape[0], jnp.float32) if weights is None else weights
    return _dot(jnp.broadcast_to(each, (_ONES, rows.shape[0])), rows, "float32", 1, 0)[0]


def _dot(a: Array, b: Array, dtype: Any, a_axis: int, b_axis: int) -> Array:
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
