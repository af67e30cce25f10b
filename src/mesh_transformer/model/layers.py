"""The parts of a block: products, norms, positions, attention, feed-forward.

Sources: docs/formats.md, section 3, and 8.3 for v2. Names in array annotations are the logical axes (in v2 `heads` are
the n_shards that attention has in effect); `keys` are the positions attended to, `half_rotary` pairs of channels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mesh_transformer.config.model import N_BUCKETS, ModelConfig
from mesh_transformer.kernels import accelerators, biased
from mesh_transformer.kernels import attention as attention_on_cpu
from mesh_transformer.kernels import products as products_on_cpu
from mesh_transformer.kernels.accelerators import Attention
from mesh_transformer.model.lora import LowRank
from mesh_transformer.model.narrow import MOST_FEW, OfLayer, from_bits, stored_product, to_bits
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.model.quantize import Quantized
from mesh_transformer.shapes import Array, Float, Int, Params
from mesh_transformer.sharding.rules import Rules

# Added to the scores of positions that may not be seen. Finite, as in the original: a row with nothing to see gives
# equal weights, not NaN.
MASKED = -1e10
# The product with a head that is the token table: the one product whose weight has its contracted axis last.
TIED = "bse,ve->bsv"
# The name of what `kept` keeps.
KEPT = "kept"


def product(
    spec: str,
    x: Array,
    w: Array | Quantized | OfLayer | LowRank,
    policy: ComputePolicy,
    out_sharding: PartitionSpec | None = None,
) -> Float[Array, ...]:
    """einsum of an activation and a weight: factors rounded to the policy's dtype, summed and returned in float32.

    The two products of its gradient round their factors the same way, which plain differentiation would not do. A
    weight in 8 bits has no gradient, and the base of a `LowRank` none that is asked for.
    """
    alike = policy.few_rows == "native" and x.shape[1] <= MOST_FEW and spec != TIED  # however many rows there are
    if 0 < policy.product_rows < x.shape[0] and not alike:
        whole, n = dataclasses.replace(policy, product_rows=0), policy.product_rows
        parts = [x[i : i + n] for i in range(0, x.shape[0], n)]
        return jnp.concatenate([product(spec, part, w, whole, out_sharding) for part in parts])
    if isinstance(w, LowRank):
        base = product(spec, x, w.base, policy, out_sharding)
        return base + low_rank_product(spec, x, w.a, w.b, w.scale, policy, out_sharding)
    if spec == TIED:
        return _rounded_product(spec, policy.dtype, out_sharding, x, w)
    if policy.few_rows != "plain" or isinstance(w, OfLayer | Quantized):
        return stored_product(spec, x, w, policy, out_sharding)
    if "products" in policy.forms and out_sharding is None and on_one_device(x):
        return _product_of_matrices(spec, x, w, policy)
    if policy.dtype == "float32":
        # "highest": accelerators would otherwise round float32 factors to fewer bits.
        return jnp.einsum(spec, x, w.astype(jnp.float32), precision="highest", out_sharding=out_sharding)
    return _rounded_product(spec, policy.dtype, out_sharding, x, w)


def on_one_device(x: Array) -> bool:
    """Whether no mesh divides the program that `x` is part of."""
    return not jax.typeof(x).sharding.mesh.axis_names


def _product_of_matrices(spec: str, x: Array, w: Array, policy: ComputePolicy) -> Array:
    """`product` as one of matrices: contracted axes last in x and first in w, as all of a decoder's are."""
    factors, out = spec.split("->")
    x_axes, w_axes = factors.split(",")
    n = sum(axis not in out for axis in w_axes)
    assert x_axes[-n:] == w_axes[:n] and out == x_axes[:-n] + w_axes[n:], spec
    k = math.prod(w.shape[:n])
    rows = products_on_cpu.product(x.reshape(-1, k), w.reshape(k, -1), policy.dtype)
    return rows.reshape(*x.shape[:-n], *w.shape[n:])


def add_bias(y: Float[Array, "*lead out"], b: Float[Array, " out"], policy: ComputePolicy) -> Float[Array, "*lead out"]:
    """y + b in float32."""
    if "biases" in policy.forms and on_one_device(y):
        return biased.add(y, b)
    return biased.plain_add(y, b)


def low_rank_product(
    spec: str, x: Array, a: Array, b: Array, scale: float, policy: ComputePolicy, out_sharding: PartitionSpec | None
) -> Float[Array, ...]:
    """scale (x a) b, for the `spec` that a matrix with the inputs of `a` and the outputs of `b` would have.

    On a mesh every device multiplies what it has with what it has: where x a is a part of a sum, so is the result.
    """
    factors, out = spec.split("->")
    x_axes, w_axes = factors.split(",")
    inputs = "".join(axis for axis in w_axes if axis not in out)
    outputs = "".join(axis for axis in w_axes if axis in out)
    assert "r" not in spec, f"{spec}: r is the rank's letter"
    narrow = "".join(axis for axis in x_axes if axis not in inputs) + "r"

    def both(x: Array, a: Array, b: Array) -> Array:
        # Not `product`: XLA on CPU computes plain differentiation's gradients of such narrow factors very slowly.
        low = _rounded_product(f"{x_axes},{inputs}r->{narrow}", policy.dtype, None, x, a)
        return _rounded_product(f"{narrow},r{outputs}->{out}", policy.dtype, None, scale * low, b)

    if out_sharding is None:
        return both(x, a, b)
    summed = tuple(sorted(out_sharding.unreduced))
    names = _mesh_axes(out_sharding) | set(summed)
    held = tuple(jax.typeof(factor).sharding.spec for factor in (x, a, b))

    def on_one_device(*parts: Array) -> Array:
        # What is the same on several devices is marked as each one's own: its gradient is summed over them.
        own = both(*(_varying(part, names - _mesh_axes(spec)) for part, spec in zip(parts, held, strict=True)))
        return jax.lax.pcast(own, summed, to="unreduced") if summed else own

    return jax.shard_map(on_one_device, in_specs=held, out_specs=out_sharding)(x, a, b)


def _varying(x: Array, names: set[str]) -> Array:
    """Within a `shard_map`: `x` as each device's own over mesh axes over which it is the same on all devices."""
    for name in sorted(names):
        x = jax.lax.pcast(x, name, to="varying")
    return x


def _mesh_axes(spec: PartitionSpec) -> set[str]:
    """Those that divide an array."""
    entries = (entry for entry in spec.partitions if entry is not None)
    return {name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,))}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rounded_product(spec: str, dtype: str, out_sharding: PartitionSpec | None, x: Array, w: Array) -> Array:
    factors = x.astype(dtype), w.astype(dtype)
    how: Any = {"preferred_element_type": jnp.float32, "precision": _precision(dtype)}
    return jnp.einsum(spec, *factors, out_sharding=out_sharding, **how)


def _precision(dtype: str) -> str | None:
    """Accelerators would otherwise round float32 factors to fewer bits."""
    return "highest" if dtype == "float32" else None


def _rounded_product_forward(
    spec: str, dtype: str, out_sharding: PartitionSpec | None, x: Array, w: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _rounded_product(spec, dtype, out_sharding, x, w), (x, w)


def _rounded_product_backward(
    spec: str, dtype: str, out_sharding: PartitionSpec | None, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, w = saved
    factors, out = spec.split("->")
    x_axes, w_axes = factors.split(",")
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=_precision(dtype))
    g = g.astype(dtype)
    dx = dot(f"{out},{w_axes}->{x_axes}", g, w.astype(dtype), out_sharding=_laid_as(x, out_sharding))
    dw = dot(f"{x_axes},{out}->{w_axes}", x.astype(dtype), g, out_sharding=_laid_as(w, out_sharding))
    return dx.astype(x.dtype), dw.astype(w.dtype)


def _laid_as(a: Array, out_sharding: PartitionSpec | None) -> PartitionSpec | None:
    """The layout of a gradient is that of what it belongs to; without a mesh there is none to name.

    What was promised to be the same on several devices has a gradient that is still to be summed over them.
    """
    if out_sharding is None:
        return None
    spec = jax.typeof(a).sharding.spec
    return PartitionSpec(*spec.partitions, unreduced=spec.reduced)


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


def norm(x: Float[Array, "batch seq embed"], p: Params, cfg: ModelConfig) -> Float[Array, "batch seq embed"]:
    """The configured norm over `embed`, in float32.

    layernorm: (x - mean) rsqrt(variance + eps) scale + bias, variance biased. rmsnorm and scalenorm divide by the
    Euclidean length plus eps (not by the root mean square); scalenorm's scale is one number. rms: see `rms_norm`.
    """
    if cfg.norm == "rms":
        return rms_norm(x, p["scale"], cfg)
    if cfg.norm.startswith("layernorm"):
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + cfg.norm_eps) * p["scale"].astype(jnp.float32)
    else:
        squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        # The root has no derivative at zero; an all-zero row gives zeros and a zero gradient instead of NaN.
        length = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
        y = x / (length + cfg.norm_eps) * p["scale"].astype(jnp.float32)
    return y + p["bias"].astype(jnp.float32) if "bias" in p else y


def rms_norm(
    x: Float[Array, "batch seq *heads width"], scale: Float[Array, " width"], cfg: ModelConfig
) -> Float[Array, "batch seq *heads width"]:
    """x rsqrt(mean(x^2) + eps) scale over the last axis, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    squares = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(squares + cfg.norm_eps) * scale.astype(jnp.float32)


def t5_buckets(n_distances: int) -> np.ndarray:
    """Bucket of every distance 0 .. n_distances - 1 (query minus key): int32 [n_distances].

    The first half of the buckets hold one distance each, the rest grow logarithmically up to distance 128.
    """
    distance = np.arange(n_distances)
    exact = N_BUCKETS // 2
    with np.errstate(divide="ignore"):
        grown = exact + (np.log(distance / exact + 1.19e-7) / np.log(128 / exact) * exact).astype(np.int64)
    return np.where(distance < exact, distance, np.minimum(grown, N_BUCKETS - 1)).astype(np.int32)


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    bias: Float[Array, "#batch #heads seq keys"] | None,
    cfg: ModelConfig,
    policy: ComputePolicy,
) -> Float[Array, "batch seq heads head_dim"]:
    """softmax(q k / cfg.score_divisor + bias) v; scores and weights in float32.

    Without a bias, what a position may see is left to the policy's kernel (see `attention_kernel`).
    """
    dtype = policy.jax_dtype
    if bias is None:
        how: dict[str, Any] = {"scale": 1 / cfg.score_divisor, "window": cfg.reach}
        narrow = (a.astype(dtype) for a in (q, k, v))
        return accelerators.causal_attention(*narrow, kind=policy.attention, **how).astype(jnp.float32)
    if "attention" in policy.forms and cfg.position != "t5" and on_one_device(q):
        return attention_on_cpu.causal_attention(q, k, v, bias, 1 / cfg.score_divisor, policy.dtype)
    dot = functools.partial(
        jnp.einsum,
        preferred_element_type=jnp.float32,
        precision="highest" if policy.dtype == "float32" else None,
    )
    scores = dot("bqhd,bkhd->bhqk", q.astype(dtype), k.astype(dtype)) / cfg.score_divisor
    weights = jax.nn.softmax(scores + bias, axis=-1)
    return dot("bhqk,bkhd->bqhd", weights.astype(dtype), v.astype(dtype))


def attention_kernel(cfg: ModelConfig, policy: ComputePolicy, rules: Rules, seq: int, *, documents: bool) -> Attention:
    """The kernel for attention without a cache; "plain" where the policy's does not serve, which is said once."""
    if policy.attention == "plain":
        return "plain"
    reason = accelerators.why_plain(policy.attention, dtype=policy.dtype, head_dim=cfg.axis_sizes["head_dim"], seq=seq)
    if cfg.position == "t5":
        reason = "T5 positions add a bias to the scores"
    elif documents:
        reason = "documents are kept apart within a sequence"
    elif cfg.alternates:
        reason = "layers differ in how far they see"
    elif rules.n_stages > 1:
        reason = "layers are divided over a pipeline"
    if reason is None:
        return policy.attention
    accelerators.say_once(policy.attention, reason)
    return "plain"


def kept(x: Float[Array, ...], policy: ComputePolicy) -> Float[Array, ...]:
    """Under remat "dots": what the backward pass has at hand, rounded to the policy's dtype; otherwise `x`."""
    if policy.remat != "dots":
        return x
    return checkpoint_name(x.astype(policy.jax_dtype), KEPT).astype(jnp.float32)


def biased_gelu(
    y: Float[Array, "*lead out"], b: Float[Array, " out"], policy: ComputePolicy
) -> Float[Array, "*lead out"]:
    """gelu(y + b) in its tanh form, float32."""
    if "biases" in policy.forms and on_one_device(y):
        return biased.gelu(y, b)
    return biased.plain_gelu(y, b)


def activated(
    y: Float[Array, "*lead out"], b: Float[Array, " out"] | None, cfg: ModelConfig, policy: ComputePolicy
) -> Float[Array, "*lead out"]:
    """act(y + b), float32; gelu in its tanh or its exact form, or silu."""
    kind = cfg.feed_forward.removeprefix("glu_")
    if kind == "gelu_tanh" and b is not None:
        return biased_gelu(y, b, policy)
    y = y if b is None else add_bias(y, b, policy)
    return jax.nn.silu(y) if kind == "silu" else jax.nn.gelu(y, approximate=kind == "gelu_tanh")


def feed_forward(
    h: Float[Array, "batch seq embed"], p: Params, cfg: ModelConfig, policy: ComputePolicy, rules: Rules
) -> Float[Array, "batch seq embed"]:
    """act(h) w_out, a partial sum over the axis of `mlp`, without b_out.

    act(h) is act(h w_in + b_in), or with a gate (h w_in + b_in) * act(h w_gate + b_gate); any bias may be absent.
    """
    split = rules.use(("batch", "seq", "mlp"))
    wide = kept(product("bse,em->bsm", h, p["w_in"], policy, split), policy)
    if "w_gate" in p:
        gate = kept(product("bse,em->bsm", h, p["w_gate"], policy, split), policy)
        linear = add_bias(wide, p["b_in"], policy) if "b_in" in p else wide
        wide = linear * activated(gate, p.get("b_gate"), cfg, policy)
    else:
        wide = activated(wide, p.get("b_in"), cfg, policy)
    return product("bsm,me->bse", wide, p["w_out"], policy, rules.partial(("batch", "seq", "embed"), over="mlp"))


def embed_tokens(
    table: Float[Array, "vocab embed"], tokens: Int[Array, "batch seq"], policy: ComputePolicy, rules: Rules
) -> Float[Array, "batch seq embed"]:
    """Rows of the table in float32; an id outside the vocabulary gives zeros, as a one-hot product would."""
    in_vocabulary = (tokens >= 0) & (tokens < table.shape[0])
    safe = jnp.where(in_vocabulary, tokens, 0)
    held = to_bits(table) if policy.widen_by_layer else table
    rows = from_bits(held.at[safe].get(out_sharding=rules.use(("batch", "seq", "embed"))), table.dtype)
    return jnp.where(in_vocabulary[..., None], rows.astype(jnp.float32), 0.0)


def sliding_mask(
    query: Int[Array, "#batch seq"], key: Int[Array, "#batch keys"], window: int | Int[Array, ""]
) -> Float[Array, "batch 1 seq keys"]:
    """0 where a query at its position may see a key at its position, MASKED elsewhere.

    Seen: keys that exist (position >= 0), at or before the query, and among the last `window`.
    """
    distance = query[:, :, None] - key[:, None, :]
    seen = (distance >= 0) & (distance < window) & (key[:, None, :] >= 0)
    return jnp.where(seen, 0.0, MASKED)[:, None, :, :]


def window_of(layer: Int[Array, ""], cfg: ModelConfig) -> int | Int[Array, ""]:
    """Newest positions that a query of this layer sees."""
    return jnp.where(layer % 2 == 1, cfg.window, cfg.n_ctx) if cfg.alternates else cfg.reach


def relative_bias(
    table: Float[Array, "heads buckets"],
    query: Int[Array, "#batch seq"],
    key: Int[Array, "#batch keys"],
    window: int,
    split: PartitionSpec | None = None,
) -> Float[Array, "batch heads seq keys"]:
    """The T5 bias of every pair of positions; distances below zero are masked anyway and use bucket 0.

    split: how heads, rows, queries and keys lie.
    """
    distance = jnp.clip(query[:, :, None] - key[:, None, :], 0, window - 1)
    of_rows = None if split is None else PartitionSpec(*split[1:])
    bucket = jnp.asarray(t5_buckets(window)).at[distance].get(out_sharding=of_rows)
    return jnp.moveaxis(table.astype(jnp.float32).at[:, bucket].get(out_sharding=split), 0, 1)
