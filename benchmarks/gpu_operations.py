"""Single operations in the shapes of GPT-J-6B: memory, products, attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_rows import Rows, median_seconds

GB, TERA = 1e9, 1e12


def random_array(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    """Standard normal, made on the device; of whole numbers, any that the type holds."""
    key = jax.random.key(seed)
    if jnp.issubdtype(dtype, jnp.integer):
        unsigned = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
        make = lambda: jax.lax.bitcast_convert_type(jax.random.bits(key, shape, unsigned), dtype)  # noqa: E731
    else:
        make = lambda: jax.random.normal(key, shape, dtype)  # noqa: E731
    return jax.jit(make)()


def read_bandwidth(n_bytes: int) -> float:
    """Bytes a second that a sum over a bfloat16 array of `n_bytes` reads, the best of five."""
    x = random_array((n_bytes // 2,), jnp.bfloat16)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    return x.nbytes / median_seconds(functools.partial(total, x), rounds=5)["fastest"]


def bandwidth(rows: Rows) -> None:
    """Reading alone, and reading with writing."""
    sizes = [1 << 16] if rows.rehearse else [1 << 28, 1 << 30, 1 << 32]

    def read(n_bytes: int) -> dict[str, Any]:
        return {"bytes": n_bytes, "GB_per_s": read_bandwidth(n_bytes) / GB}

    def copy(n_bytes: int) -> dict[str, Any]:
        x = random_array((n_bytes // 4,), jnp.float32)
        found = median_seconds(functools.partial(jax.jit(lambda x: x + 1), x))
        return {"bytes": n_bytes, "GB_per_s": 2 * x.nbytes / found["seconds"] / GB, **found}

    for n in sizes:
        rows.row(f"read {n >> 20} MiB", functools.partial(read, n))
        rows.row(f"copy {n >> 20} MiB", functools.partial(copy, n))


def matmul(rows: Rows) -> None:
    """Products of a batch of 8 sequences of 2048, forward and of both gradients, and a large square one."""
    tokens, d, ff, vocab, chunk, square = 16384, 4096, 16384, 50400, 4096, 8192
    if rows.rehearse:
        tokens, d, ff, vocab, chunk, square = 64, 32, 64, 96, 32, 64
    shapes = {
        "square": ("mk,kn->mn", (square, square), (square, square)),
        "query, key or value": ("mk,kn->mn", (tokens, d), (d, d)),
        "into the feed-forward": ("mk,kn->mn", (tokens, d), (d, ff)),
        "out of the feed-forward": ("mk,kn->mn", (tokens, ff), (ff, d)),
        "gradient of the activation": ("mn,kn->mk", (tokens, ff), (d, ff)),
        "gradient of the weight": ("mk,mn->kn", (tokens, d), (tokens, ff)),
        "head": ("mk,kn->mn", (chunk, d), (d, vocab)),
    }

    def one(spec: str, left: tuple[int, ...], right: tuple[int, ...], out: Any) -> dict[str, Any]:
        a, b = random_array(left, jnp.bfloat16), random_array(right, jnp.bfloat16, 1)
        found = median_seconds(functools.partial(jax.jit(functools.partial(product, spec, out)), a, b))
        sizes = dict(zip(spec.split("->")[0].replace(",", ""), left + right, strict=True))
        flops = 2.0 * math.prod(sizes[axis] for axis in "mkn")
        return {"spec": spec, "left": left, "right": right, "TFLOP_per_s": flops / found["seconds"] / TERA, **found}

    for name, (spec, left, right) in shapes.items():
        for out in ("float32", "bfloat16"):
            rows.row(f"{name}, {out} result", functools.partial(one, spec, left, right, out))


def product(spec: str, out: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum summed in float32, or rounded to `out`."""
    return jnp.einsum(spec, a, b, preferred_element_type=out)


def attention(rows: Rows) -> None:
    """Causal attention of 8 sequences: forward, with gradients, and how far from float32 each form is."""
    from mesh_transformer.kernels import accelerators

    batch, seq, heads, width = (1, 128, 2, 128) if rows.rehearse else (8, 2048, 16, 256)
    q, k, v, g = (random_array((batch, seq, heads, width), jnp.bfloat16, seed) for seed in range(4))
    how: dict[str, Any] = {"scale": 1 / math.sqrt(width), "window": seq}
    forms: dict[str, Callable[..., jax.Array]] = {
        "plain": functools.partial(accelerators.plain_causal_attention, **how),
    }
    if not rows.rehearse:
        forms["cudnn"] = functools.partial(accelerators.causal_attention, kind="cudnn", **how)
        half = {"scale": how["scale"], "window": seq // 2}
        forms["cudnn, half the window"] = functools.partial(accelerators.causal_attention, kind="cudnn", **half)
    # Of the lower triangle alone: 2 products forward, 5 backward, one of them the scores a second time.
    forward_flops = 2 * 2.0 * batch * heads * width * seq * (seq + 1) / 2

    def gradients(form: Callable[..., jax.Array]) -> Callable[..., Any]:
        return jax.jit(lambda q, k, v, g: jax.vjp(form, q, k, v)[1](g))

    def timed(form: Callable[..., jax.Array]) -> dict[str, Any]:
        forward = median_seconds(functools.partial(jax.jit(form), q, k, v))
        both = median_seconds(functools.partial(gradients(form), q, k, v, g))
        return {
            "forward": forward,
            "with_gradients": both,
            "forward_TFLOP_per_s": forward_flops / forward["seconds"] / TERA,
            "with_gradients_TFLOP_per_s": 3.5 * forward_flops / both["seconds"] / TERA,
        }

    def error(form: Callable[..., jax.Array], window: int) -> dict[str, Any]:
        few = [a[:1] for a in (q, k, v, g)]
        wide = [a.astype(jnp.float32) for a in few]
        exact = functools.partial(accelerators.plain_causal_attention, scale=how["scale"], window=window)
        found = {"forward": distance(jax.jit(form)(*few[:3]), jax.jit(exact)(*wide[:3]))}
        for name, near, true in zip("qkv", gradients(form)(*few), gradients(exact)(*wide), strict=True):
            found[f"gradient of {name}"] = distance(near, true)
        return found

    for name, form in forms.items():
        window = seq // 2 if "half" in name else seq
        rows.row(f"{name}: error", functools.partial(error, form, window))
        rows.row(f"{name}: time", functools.partial(timed, form))


def distance(near: jax.Array, true: jax.Array) -> float:
    """|near - true| / |true|, Euclidean."""
    a, b = np.asarray(near, np.float64), np.asarray(true, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def few_rows(rows: Rows) -> None:
    """x [n, K] times one layer of stacked weights [layers, K, N], layer after layer, by the model's own `product`.

    What counts is bytes of weights a second: the smaller n is, the nearer that should be to the bandwidth.
    """
    from mesh_transformer.model.layers import product as model_product
    from mesh_transformer.model.params import ParamSpec
    from mesh_transformer.model.policy import default_policy

    layers, wide, narrow = (2, 64, 32) if rows.rehearse else (8, 16384, 4096)
    policy = default_policy("bfloat16")
    up = ParamSpec(("layers", "embed", "mlp"), inputs=("embed",), std=0.02)
    down = ParamSpec(("layers", "mlp", "embed"), inputs=("mlp",), std=0.02)

    def through(x: jax.Array, w_up: Any, w_down: Any) -> jax.Array:
        for i in range(layers):
            # Slices with a number that is known, as in a program of all layers written out.
            one = lambda w, i=i: jax.tree.map(lambda a: a[i], w)  # noqa: E731
            x = model_product("bse,em->bsm", x, one(w_up), policy)
            x = 1e-3 * model_product("bsm,me->bse", x, one(w_down), policy)
        return x

    def one(kind: str, n: int) -> dict[str, Any]:
        w_up = random_weight(up, (layers, narrow, wide), kind)
        w_down = random_weight(down, (layers, wide, narrow), kind)
        x = random_array((n, 1, narrow), jnp.float32)
        compiled = jax.jit(through).lower(x, w_up, w_down).compile()
        found = median_seconds(functools.partial(compiled, x, w_up, w_down))
        n_bytes = sum(a.nbytes for a in jax.tree.leaves((w_up, w_down)))
        memory = compiled.memory_analysis()
        return {
            "bytes": n_bytes,
            "GB_per_s": n_bytes / found["seconds"] / GB,
            "temporary_bytes": memory.temp_size_in_bytes if memory else None,
            **found,
        }

    for kind in ("bfloat16", "int8", "int4"):
        for n in (2,) if rows.rehearse else (1, 2, 4, 8, 16, 32, 128):
            rows.row(f"{kind}, {n} rows", functools.partial(one, kind, n))


def random_weight(spec: Any, shape: tuple[int, ...], kind: str, seed: int = 0) -> Any:
    """A matrix in bfloat16, or one in 8 or 4 bits, about as large as trained ones are."""
    from mesh_transformer.model.quantize import described

    if kind not in ("int8", "int4", "int4-128"):
        return jax.jit(lambda: 0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.dtype(kind)))()
    form = described(kind, spec, shape)
    scale = jnp.full(form.scale.shape, 2e-4 if kind == "int8" else 3e-3, form.scale.dtype)
    return type(form)(random_array(form.values.shape, form.values.dtype, seed), scale)
