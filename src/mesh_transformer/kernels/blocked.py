"""A few rows times a narrow matrix with XLA alone: a block of inputs is widened, multiplied and forgotten.

XLA on CPU widens a narrow matrix as a whole before it multiplies, so that four times (or eight) the bytes are written
and read again. A block that stays in the cache is written and read there.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mesh_transformer.shapes import Array, Float, Int

# Bytes of a widened block: small enough for the second and third caches, large enough to be worth two threads.
_BLOCK_BYTES = 8 << 20


def block_rows(n_inputs: int, n_outputs: int, multiple: int) -> int:
    """Inputs of a block: a divisor of `n_inputs` and a multiple of `multiple`, which divides it, of a good size."""
    fitting = max(multiple, _BLOCK_BYTES // (4 * n_outputs))
    return max(n for n in range(multiple, min(fitting, n_inputs) + 1, multiple) if n_inputs % n == 0)


def matmul(
    x: Float[Array, "rows inputs"],
    block: Callable[[Int[Array, ""]], Float[Array, "block outputs"]],
    n_rows: int,
    n_outputs: int,
) -> Float[Array, "rows outputs"]:
    """x w in float32, where `block(i)` gives rows i * n_rows .. (i + 1) * n_rows - 1 of w in float32."""

    def add(i: Int[Array, ""], total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(x, i * n_rows, n_rows, axis=1)
        return total + jnp.dot(part, block(i), precision="highest")

    zeros = jnp.zeros((x.shape[0], n_outputs), jnp.float32)
    return jax.lax.fori_loop(0, x.shape[1] // n_rows, add, zeros)
