"""Arrays moved by hand: the values and gradients of plain resharding, with fewer bytes sent."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from jax.sharding import PartitionSpec as P

from mesh_transformer.sharding.mesh import Sizes, make_mesh
from mesh_transformer.sharding.moving import moved

W = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)
ROWS = P(("data", "fsdp"), None)


def loss(w: jax.Array, x: jax.Array, move: Any) -> jax.Array:
    """A weight that rests in parts over fsdp, used whole by a batch that lies over data and fsdp."""
    used = move(w, P(None, None, reduced={"data", "fsdp"}))
    return jnp.square(jnp.einsum("bi,ij->bj", x, used, out_sharding=ROWS)).sum()


@pytest.mark.parametrize("rests", [P("fsdp", None), P(None, "fsdp"), P(("fsdp",), None)])
def test_a_gather_sums_its_gradient_in_parts(rests: P) -> None:
    with jax.set_mesh(make_mesh(Sizes(data=2, fsdp=4))):
        w, x = jax.device_put(W, rests), jax.device_put(X, ROWS)
        results, kinds = [], []
        for move in (jax.sharding.reshard, moved):
            step = jax.jit(jax.value_and_grad(loss), static_argnames="move").lower(w, x, move=move).compile()
            value, gradient = step(w, x)
            results.append((float(value), np.asarray(gradient)))
            kinds.append({message.kind for message in collectives(step)})
            assert gradient.sharding.shard_shape(W.shape) == w.sharding.shard_shape(W.shape)
    expected = 2 * X.T @ (X @ W)
    for value, gradient in results:
        assert value == pytest.approx(float(np.square(X @ W).sum()), rel=1e-5)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    assert "reduce-scatter" in kinds[1] and "reduce-scatter" not in kinds[0]


def test_a_sum_that_is_kept_in_parts() -> None:
    def summed(x: jax.Array, w: jax.Array) -> jax.Array:
        partial = jnp.einsum("bi,ij->bj", x, w, out_sharding=P(None, None, unreduced={"data", "tensor"}))
        return moved(partial, P(None, "tensor"))

    with jax.set_mesh(make_mesh(Sizes(data=2, tensor=4))):
        x, w = jax.device_put(X, P(None, ("data", "tensor"))), jax.device_put(W, P(("data", "tensor"), None))
        step = jax.jit(summed).lower(x, w).compile()
        np.testing.assert_allclose(np.asarray(step(x, w)), X @ W, rtol=1e-4, atol=1e-5)
        sent = {message.kind: message.n_bytes for message in collectives(step)}
    # The sum over data is of what is kept.
    assert sent == {"reduce-scatter": 8 * 2 * 4, "all-reduce": 8 * 2 * 4}


def test_what_lies_right_already_is_left_alone() -> None:
    with jax.set_mesh(make_mesh(Sizes(fsdp=8))):
        w = jax.device_put(W, P("fsdp", None))
        compiled = jax.jit(lambda w: moved(w, P("fsdp", None)) + 1).lower(w).compile()
        assert collectives(compiled) == []
