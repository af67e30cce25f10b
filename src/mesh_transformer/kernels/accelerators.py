"""Causal attention by the kernels of accelerators, beside the plain form that they are compared with.

On NVIDIA GPUs cuDNN's flash attention, through `jax.nn.dot_product_attention`; on TPUs splash attention, a Pallas
kernel of JAX. Neither ever holds the scores of all pairs of positions, and both leave out what the causal mask hides.
Which inputs they serve is asked by `why_plain`; the caller computes the others by the plain form and says so with
`say_once`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mesh_transformer.compat import cudnn_version
from mesh_transformer.shapes import Array

Attention = Literal["plain", "cudnn", "splash"]

_log = logging.getLogger(__name__)

# Of splash attention: positions of queries, and of keys, that are computed with at one time. The length of a sequence
# must be a multiple of the first that fits; the kernel needs whole rows of 128 lanes.
_SPLASH_BLOCKS = (512, 256, 128)
LANES = 128
# Channels of the widest head that cuDNN's attention serves.
WIDEST_HEAD, WIDEST_HEAD_SINCE_HOPPER = 128, 256


def attention_for(platform: str) -> Attention:
    """The kernel of a platform as JAX names it ("cpu", "gpu", "cuda", "tpu")."""
    kernels: dict[str, Attention] = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}
    return kernels.get(platform, "plain")


def why_plain(kind: Attention, *, dtype: str, head_dim: int, seq: int) -> str | None:
    """Why the kernel does not serve sequences of `seq` positions in heads of `head_dim`; None where it does."""
    if kind == "plain":
        return "the plain form was asked for"
    if dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not {dtype}"
    return _why_not_cudnn(head_dim) if kind == "cudnn" else _why_not_splash(head_dim, seq)


def _why_not_cudnn(head_dim: int) -> str | None:
    """The conditions of `jax._src.cudnn.fused_attention_stablehlo`, asked before it refuses."""
    if cudnn_version() is None:
        return "no cuDNN was found"
    # None where programs are compiled for a device that is not there: JAX then decides.
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    version = tuple(int(part) for part in str(capability or "9.0").split("."))
    if version < (8, 0):
        return f"it needs compute capability 8.0 or newer, and this GPU has {capability}"
    widest = WIDEST_HEAD_SINCE_HOPPER if version >= (9, 0) else WIDEST_HEAD
    if head_dim > widest or head_dim % 8:
        return f"heads are {head_dim} wide, and on this GPU it takes multiples of 8 up to {widest}"
    return None


def _why_not_splash(head_dim: int, seq: int) -> str | None:
    if head_dim % LANES:
        return f"heads are {head_dim} wide, and it takes multiples of {LANES}"
    if seq % _SPLASH_BLOCKS[-1]:
        return f"sequences have {seq} positions, and it takes multiples of {_SPLASH_BLOCKS[-1]}"
    return None


@functools.cache
def say_once(kind: Attention, reason: str) -> None:
    """A line in the log, the first time for each reason."""
    name = {"cudnn": "cuDNN", "splash": "splash"}[kind]
    _log.warning("attention is computed in its plain form, not by the %s kernel: %s", name, reason)


def plain_causal_attention(q: Array, k: Array, v: Array, *, scale: float, window: int) -> Array:
    """The reference: softmax(scale q k) v over the last `window` positions of every query, computed in float32.

    q, k, v: [batch, seq, heads, head_dim]. Returns the same shape in the dtype of q.
    """
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")
    at = jnp.arange(q.shape[1])
    distance = at[:, None] - at[None, :]
    scores = jnp.where((distance >= 0) & (distance < window), scale * dot("bqhd,bkhd->bhqk", q, k), -jnp.inf)
    return dot("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v.astype(jnp.float32)).astype(q.dtype)


def causal_attention(
    q: Array, k: Array, v: Array, *, scale: float, window: int, kind: Attention, interpret: bool = False
) -> Array:
    """As `plain_causal_attention`, by a kernel that `why_plain` has nothing against; with gradients.

    On a mesh every device computes the rows and heads that it has: sequence and head_dim must lie whole.

    Args:
        q, k, v: [batch, seq, heads, head_dim] in bfloat16 or float16, alike.
        scale: factor of the scores.
        window: how many positions a query sees, its own among them.
        interpret: splash attention step by step in JAX, where there is no TPU (for tests).
    """
    compute = functools.partial(_cudnn, scale=scale, window=window)
    if kind == "splash":
        compute = functools.partial(_splash, scale=scale, window=window, interpret=interpret)
    held = jax.typeof(q).sharding
    if not held.mesh.axis_names or held.mesh.are_all_axes_manual:
        return compute(q, k, v)
    spec: PartitionSpec = held.spec
    # Pallas kernels do not say over which mesh axes their results differ; cuDNN's do.
    apart = jax.shard_map(compute, in_specs=(spec,) * 3, out_specs=spec, check_vma=kind == "cudnn")
    return apart(q, k, v)


def _cudnn(q: Array, k: Array, v: Array, *, scale: float, window: int) -> Array:
    sliding = (window - 1, 0) if window < q.shape[1] else None
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="cudnn", local_window_size=sliding
    )


def _splash(q: Array, k: Array, v: Array, *, scale: float, window: int, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    seq, n_heads = q.shape[1:3]
    mask: Any = masks.CausalMask((seq, seq))
    if window < seq:
        mask = masks.LocalMask((seq, seq), (window - 1, 0), 0)
    block = next(n for n in _SPLASH_BLOCKS if seq % n == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    attend = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * n_heads), head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret
    )
    # The kernel has no scale of its own: queries are scaled before they are rounded.
    scaled = (scale * q.astype(jnp.float32)).astype(q.dtype)
    mixed = jax.vmap(attend)(*(jnp.swapaxes(a, 1, 2) for a in (scaled, k, v)))
    return jnp.swapaxes(mixed, 1, 2)
