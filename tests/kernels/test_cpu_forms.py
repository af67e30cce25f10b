"""Each fast form on CPU beside its plain reference: values and gradients, at odd sizes too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.kernels import attention, biased, cross_entropy, products
from mesh_transformer.model.policy import default_policy, for_inference


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def assert_alike(fast: Any, plain: Any) -> None:
    """Every array within 1e-6 of its own length, and of the same dtype."""
    for mine, other in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        assert mine.dtype == other.dtype
        a, b = np.asarray(mine, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def values_and_gradients(f: Callable[..., jax.Array], g: jax.Array, *arguments: jax.Array) -> Any:
    """What f gives, and the gradients of its arguments for the gradient `g` of that."""
    return jax.jit(lambda g, *a: (lambda value, pull: (value, pull(g)))(*jax.vjp(f, *a)))(g, *arguments)


@pytest.mark.parametrize(("rows", "k", "n"), [(96, 40, 24), (37, 5, 3), (2, 1, 1)])
def test_product(rows: int, k: int, n: int) -> None:
    given = normal(0, rows, n), normal(1, rows, k), normal(2, k, n)
    fast = values_and_gradients(lambda x, w: products.product(x, w, "float32"), *given)
    assert_alike(fast, values_and_gradients(lambda x, w: products.plain_product(x, w, "float32"), *given))
    np.testing.assert_array_equal(products.turned(given[1]), given[1].T)


def test_product_rounds_its_factors_and_those_of_its_gradient() -> None:
    g, x, w = normal(0, 64, 24), normal(1, 64, 40), normal(2, 40, 24)
    value, (dx, dw) = values_and_gradients(lambda x, w: products.product(x, w, "bfloat16"), g, x, w)
    round_, exact = lambda a: np.asarray(a.astype(jnp.bfloat16), np.float64), np.testing.assert_allclose
    exact(value, round_(x) @ round_(w), atol=1e-5)
    exact(dx, round_(g) @ round_(w).T, atol=1e-5)
    exact(dw, round_(x).T @ round_(g), atol=1e-5)


def test_gradients_of_narrow_weights_are_narrow() -> None:
    _, (_, dw) = values_and_gradients(
        lambda x, w: products.product(x, w, "float32"), normal(0, 8, 4), normal(1, 8, 6), normal(2, 6, 4).astype("f2")
    )
    assert dw.dtype == jnp.float16


@pytest.mark.parametrize("shape", [(3, 33, 20), (1, 1, 1)])
@pytest.mark.parametrize("name", ["add", "gelu"])
def test_biases(name: str, shape: tuple[int, ...]) -> None:
    fast, plain = getattr(biased, name), getattr(biased, f"plain_{name}")
    given = normal(0, *shape), 3 * normal(1, *shape), normal(2, shape[-1])
    assert_alike(values_and_gradients(lambda y, b: fast(y, b), *given), values_and_gradients(plain, *given))
    assert_alike(products.row_sums(given[0]), products.plain_row_sums(given[0]))


@pytest.mark.parametrize("seq", [1, 63, 64, 65, 257])
def test_attention(seq: int) -> None:
    """With a window, and two documents in the second row."""
    here = np.arange(seq)
    seen = (here[:, None] >= here) & (here[:, None] - here < 100)
    apart = seen & ((here[:, None] < seq // 3) == (here < seq // 3))
    bias = jnp.where(jnp.asarray(np.stack([seen, apart])), 0.0, -1e10)[:, None]
    given = [normal(i, 2, seq, 3, 8) for i in range(4)]
    fast = values_and_gradients(lambda *qkv: attention.causal_attention(*qkv, bias, 0.3, "float32"), *given)
    assert_alike(fast, values_and_gradients(lambda *qkv: attention.plain_attention(*qkv, bias, 0.3, "float32"), *given))


def head_case(rows: int) -> tuple[jax.Array, ...]:
    """x, w, b, targets, weights: one target lies outside the vocabulary, and a third of the rows do not count."""
    targets = jnp.arange(rows, dtype=jnp.int32) * 7 % 50
    weights = jnp.where(jnp.arange(rows) % 3 > 0, 1 / rows, 0.0)
    return normal(0, rows, 16), normal(1, 16, 50), normal(2, 50), targets.at[1].set(50), weights


@pytest.mark.parametrize(
    ("rows", "whole"),
    [
        (5, False),
        (64, True),
        pytest.param(5, True, marks=pytest.mark.long),
        pytest.param(64, False, marks=pytest.mark.long),
    ],
)
def test_head_loss(rows: int, whole: bool) -> None:
    how = cross_entropy.How("float32", 0.3, whole, 24)
    x, w, b, targets, weights = head_case(rows)

    def run(f: Callable[..., Any]) -> Any:
        total = lambda x, w, b: f(x, w, b, targets, weights, how)  # noqa: E731
        return jax.jit(jax.value_and_grad(lambda *a: 3 * total(*a)[0], argnums=(0, 1, 2)))(x, w, b), total(x, w, b)

    assert_alike(run(cross_entropy.head_loss), run(cross_entropy.plain_head_loss))
    direct = jax.nn.log_softmax(np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(b, np.float64))
    scores = cross_entropy.head_loss(x, w, b, targets, weights, how)[1]
    expected = -np.take_along_axis(np.asarray(direct), np.asarray(targets % 50)[:, None], axis=1)[:, 0]
    inside = np.asarray(targets) < 50
    np.testing.assert_allclose(np.asarray(scores.loss)[inside], expected[inside], rtol=1e-4)


def test_gradients_of_the_scores_themselves() -> None:
    how = cross_entropy.How("float32", 0.3, False, 24)
    x, w, b, targets, weights = head_case(40)

    def run(f: Callable[..., Any]) -> Any:
        def mixed(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
            total, scores = f(x, w, b, targets, weights, how)
            return total + jnp.sum(jnp.sin(scores.loss)) + jnp.sum(scores.log_partition**2) + scores.log_sum[3]

        return jax.jit(jax.grad(mixed, argnums=(0, 1, 2)))(x, w, b)

    assert_alike(run(cross_entropy.head_loss), run(cross_entropy.plain_head_loss))


def test_inference_keeps_to_the_plain_forms() -> None:
    """Its rows must be rounded alike however many there are, which the engine sees to in its own way."""
    policy = default_policy("float32")
    assert policy.forms
    assert not for_inference(policy, {"w": jnp.zeros((2, 2))}, one_device=True).forms
