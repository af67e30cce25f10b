"""What follows a product: its bias, and an activation, each with a gradient in few passes over memory.

Differentiated plainly, XLA on CPU computes a bias' gradient by a reduction over rows into which it pulls whatever gave
the rows, and it keeps several arrays of the activation's inner results for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.kernels.products import row_sums
from mesh_transformer.shapes import Array

_SLOPE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def plain_add(y: Array, b: Array) -> Array:
    """The reference: y + b in float32. y: [..., N] float32; b: [N]."""
    return y + b.astype(jnp.float32)


@jax.custom_vjp
def add(y: Array, b: Array) -> Array:
    """As `plain_add`, with the gradient of b as a product."""
    return plain_add(y, b)


def _add_forward(y: Array, b: Array) -> tuple[Array, Array]:
    return plain_add(y, b), jnp.zeros(0, b.dtype)


def _add_backward(like_b: Array, g: Array) -> tuple[Array, Array]:
    return g, row_sums(g).astype(like_b.dtype)


add.defvjp(_add_forward, _add_backward)


def plain_gelu(y: Array, b: Array) -> Array:
    """The reference: gelu(y + b) in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415), float32."""
    return jax.nn.gelu(plain_add(y, b), approximate=True)


@jax.custom_vjp
def gelu(y: Array, b: Array) -> Array:
    """As `plain_gelu`; keeps y alone for the backward pass, and computes the gradient of b as a product."""
    return plain_gelu(y, b)


def _gelu_forward(y: Array, b: Array) -> tuple[Array, Any]:
    return plain_gelu(y, b), (y, b)


def _gelu_backward(saved: Any, g: Array) -> tuple[Array, Array]:
    y, b = saved
    x = plain_add(y, b)
    bent = jnp.tanh(_SLOPE * (x + _CUBIC * x**3))
    slope = _SLOPE * (1 + 3 * _CUBIC * jnp.square(x))
    dy = g * (0.5 * (1 + bent) + 0.5 * x * (1 - jnp.square(bent)) * slope)
    return dy, row_sums(dy).astype(b.dtype)


gelu.defvjp(_gelu_forward, _gelu_backward)
