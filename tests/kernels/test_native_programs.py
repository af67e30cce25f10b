"""Inside compiled programs: the weights are read where they lie."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.kernels import native

LAYERS, SIZE = 3, 512

Step = Callable[[jax.Array, jax.Array], jax.Array]


def weights(kind: str) -> tuple[jax.Array, jax.Array | None]:
    rng = np.random.default_rng(0)
    if kind == "int8":
        w = jnp.asarray(rng.integers(-127, 128, (LAYERS, SIZE, SIZE)).astype(np.int8))
        return w, jnp.asarray(rng.random((LAYERS, SIZE), np.float32) / 2000)
    if kind == "int4":
        w = jnp.asarray(rng.integers(0, 256, (LAYERS, SIZE // 2, SIZE)).astype(np.uint8))
        return w, jnp.full((LAYERS, SIZE // 32, SIZE), 0.01, jnp.float16)
    return jnp.asarray(rng.standard_normal((LAYERS, SIZE, SIZE)) / 25, kind), None


def written_out(step: Step, x: jax.Array) -> jax.Array:
    for layer in range(LAYERS):
        x = step(x, jnp.int32(layer))
    return x


def scanned(step: Step, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, layer: (step(x, layer), None), x, jnp.arange(LAYERS))[0]


def while_in_scan(step: Step, x: jax.Array) -> jax.Array:
    def twice(x: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, step(c[1], layer)), (0, x))[1], None

    return jax.lax.scan(twice, x, jnp.arange(LAYERS))[0]


@pytest.mark.parametrize("form", [written_out, scanned, while_in_scan], ids=lambda form: form.__name__)
@pytest.mark.parametrize("kind", native.KINDS)
def test_weights_are_not_copied(kind: str, form: Callable[[Step, jax.Array], jax.Array]) -> None:
    if not native.available():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no native extension: {native.why_not()}")
    w, scale = weights(kind)
    x = jnp.ones((2, SIZE))

    def whole(x: jax.Array, w: jax.Array, scale: Any) -> jax.Array:
        return form(lambda x, layer: native.matmul(x, w, layer, scale), x)

    compiled = jax.jit(whole).lower(x, w, scale).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    # A layer of the narrowest kind is more than eight times this; what is left are a few vectors.
    assert memory.temp_size_in_bytes < w.nbytes // LAYERS // 8
    assert memory.alias_size_in_bytes == 0 and memory.output_size_in_bytes == x.nbytes
    y = x
    for layer in np.repeat(np.arange(LAYERS), 2 if form is while_in_scan else 1):
        y = native.matmul(y, w, int(layer), scale)
    np.testing.assert_array_equal(compiled(x, w, scale), y)
