"""Which kernels XLA chose for the fast forms, read from the compiled programs: a new jaxlib may choose otherwise."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.kernels import biased, cross_entropy, products
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import abstract_params
from mesh_transformer.model.policy import default_policy

ROWS, K, N = 256, 128, 384


@dataclasses.dataclass(frozen=True)
class Product:
    """A product in a compiled program: result's shape, factors' dtypes, and whether YNNPACK computes it."""

    shape: tuple[int, ...]
    factors: tuple[str, str]
    by_ynnpack: bool


def products_in(f: Callable[..., Any], *arguments: Any) -> list[Product]:
    """All of the program that `f` compiles to, in the order of the text."""
    text = jax.jit(f).lower(*arguments).compile().as_text()
    called = set(re.findall(r"kind=kCustom, calls=%([\w.-]+),[^\n]*\"__ynn_fusion\"", text))
    found = []
    for part in re.split(r"\n(?=(?:ENTRY )?%[\w.-]+ \()", text):
        name = re.match(r"(?:ENTRY )?%([\w.-]+) \(", part)
        types = dict(re.findall(r"%([\w.-]+) = (\w+)\[", part)) | dict(re.findall(r"([\w.-]+): (\w+)\[", part))
        for shape, a, b in re.findall(r" = \w+\[([\d,]*)\]\S* dot\(%([\w.-]+), %([\w.-]+)\)", part):
            sizes = tuple(int(size) for size in shape.split(","))
            found.append(Product(sizes, (types[a], types[b]), name is not None and name[1] in called))
    return found


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape)


def gradient_of_product(product: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Both gradients for a given gradient of the result, which is no constant that XLA could see through."""
    return lambda x, w, g: jax.vjp(lambda x, w: product(x, w, "bfloat16"), x, w)[1](g)


def test_bfloat16_products_are_computed_as_such() -> None:
    forward = products_in(lambda x, w: products.product(x, w, "bfloat16"), normal(ROWS, K), normal(K, N))
    assert forward == [Product((ROWS, N), ("bf16", "bf16"), True)]
    backward = products_in(gradient_of_product(products.product), normal(ROWS, K), normal(K, N), normal(ROWS, N))
    assert sorted(product.shape for product in backward) == [(K, N), (ROWS, K)]
    assert all(product.factors == ("bf16", "bf16") and product.by_ynnpack for product in backward), backward


def test_a_transposed_factor_is_what_it_is_done_for() -> None:
    """Without the detour XLA widens the factors; when it no longer does, `turned` can go."""
    plain = products_in(
        lambda x, g: jnp.einsum(
            "tk,tn->kn", x.astype(jnp.bfloat16), g.astype(jnp.bfloat16), preferred_element_type=jnp.float32
        ),
        normal(ROWS, K), normal(ROWS, N),
    )  # fmt: skip
    assert [product.factors for product in plain] == [("f32", "f32")]


def test_the_gradient_of_a_bias_is_a_product() -> None:
    found = products_in(lambda y, b, g: jax.vjp(biased.gelu, y, b)[1](g), normal(ROWS, N), normal(N), normal(ROWS, N))
    assert len(found) == 1 and found[0].by_ynnpack


def test_the_head_is_three_products_a_chunk_in_training() -> None:
    how = cross_entropy.How("bfloat16", 1e-4, False, ROWS // 2)

    def step(x: Any, w: Any, b: Any, targets: Any, weights: Any) -> Any:
        total = lambda x, w, b: cross_entropy.head_loss(x, w, b, targets, weights, how)  # noqa: E731
        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(x, w, b)

    arguments = (normal(ROWS, K), normal(K, 2048), normal(2048), jnp.zeros(ROWS, jnp.int32), jnp.ones(ROWS))
    found = products_in(step, *arguments)
    large = [product for product in found if min(product.shape) >= 64]
    assert len(large) == 6
    assert all(product.by_ynnpack and product.factors == ("bf16", "bf16") for product in large), large


def test_every_product_with_weights_of_a_training_step() -> None:
    """Per layer q, k, v, o, w_in, w_out and the head, each once forwards and twice backwards; none is widened."""
    cfg = ModelConfig(n_layers=1, d_model=128, n_heads=2, n_vocab=1024, n_ctx=128, d_rotary=16)
    params = abstract_params(cfg)
    policy = default_policy("bfloat16")
    rows = jax.ShapeDtypeStruct((4, cfg.n_ctx + 1), jnp.int32)
    found = products_in(jax.grad(lambda p, rows: loss_report(p, rows, cfg, policy).total), params, rows)
    of_weights = [product for product in found if len(product.shape) == 2 and min(product.shape) > 8]
    assert len(of_weights) == 3 * 7
    assert all(product.by_ynnpack and product.factors == ("bf16", "bf16") for product in of_weights), of_weights
