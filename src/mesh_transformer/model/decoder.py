"""The decoder, top to bottom: embed, the stack of blocks, head. One `block` for training, prefill and decoding.

Arithmetic: docs/formats.md, section 3, and 8.3 for v2. Parameters: `model.params.param_table`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model import layers
from mesh_transformer.model.cache import KVCache, key_positions
from mesh_transformer.model.params import param_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.shapes import Array, Float, Int, Params
from mesh_transformer.sharding.rules import ONE_DEVICE, Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """Everything that a block needs to know of positions; the same for every layer.

    sin, cos: [#batch seq half_rotary], None without rotary positions. bias: added to the scores, [#batch #heads seq
    keys]. positions: [#batch seq], the place of every query since the start of its text.
    """

    positions: Array
    bias: Array
    sin: Array | None
    cos: Array | None


def forward(
    params: Params,
    tokens: Int[Array, "batch seq"],
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
) -> Float[Array, "batch seq vocab"]:
    """Logits of the token after every position, float32."""
    x, _ = hidden(params, tokens, cfg, policy, rules)
    return unembed(params, x, cfg, policy, rules)


def hidden(
    params: Params,
    tokens: Int[Array, "batch seq"],
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
    *,
    start: Int[Array, " batch"] | None = None,
    cache: KVCache | None = None,
) -> tuple[Float[Array, "batch seq embed"], KVCache | None]:
    """The residual stream after the last block, and the cache with these tokens added.

    Without a cache the tokens are whole texts. With one, row b continues its text at position `start[b]`, sees what
    the cache holds, and is written into it; a row may be padded on the right, since nothing sees a later position and
    the next call overwrites it. More than one token a row is only right while the cache has not begun to slide.
    """
    seq = tokens.shape[1]
    first = jnp.zeros((1,), jnp.int32) if start is None else start
    positions = first[:, None] + jnp.arange(seq, dtype=jnp.int32)[None, :]
    embed = gather(params["embed"], param_table(cfg)["embed"], rules)
    x = layers.embed_tokens(embed["tokens"], tokens, policy, rules) + embed["bias"].astype(jnp.float32)
    if cfg.position == "fixed":
        x = x + embed["positions"].at[positions].get(mode="clip").astype(jnp.float32)
    where = locate(params, positions, cache, cfg)
    return run_blocks(params["layers"], x, where, cache, cfg, policy, rules)


def locate(params: Params, positions: Array, cache: KVCache | None, cfg: ModelConfig) -> Where:
    """Masks, rotary angles and relative biases for queries at `positions` ([#batch seq])."""
    keys = positions if cache is None else key_positions(positions[:, -1], cache.n_slots)
    bias = layers.sliding_mask(positions, keys, cfg.n_ctx)
    if cfg.position == "t5":
        bias = bias + layers.relative_bias(params["relative"]["bias"], positions, keys, cfg.n_ctx)
    if cfg.position != "rotary":
        return Where(positions=positions, bias=bias, sin=None, cos=None)
    n_positions = positions.shape[1] if cache is None else cache.sin.shape[0]
    sin, cos = layers.rotary_tables(n_positions, cfg.d_rotary) if cache is None else (cache.sin, cache.cos)
    return Where(positions=positions, bias=bias, sin=jnp.asarray(sin)[positions], cos=jnp.asarray(cos)[positions])


def run_blocks(
    stacked: Params,
    x: Float[Array, "batch seq embed"],
    where: Where,
    cache: KVCache | None,
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules,
) -> tuple[Float[Array, "batch seq embed"], KVCache | None]:
    """`block` for every slice of the stacked parameters in turn; the stack may be a part of the model's layers."""
    specs = param_table(cfg)["layers"]
    n_layers = jax.tree.leaves(stacked)[0].shape[0]

    def one_layer(carry: tuple[Array, KVCache | None], inputs: tuple[Params, Array]) -> tuple[Any, None]:
        x, cache = carry
        p, layer = inputs
        if policy.widen_by_layer:  # the barrier keeps XLA from taking this out of the loop, for all layers at once
            x, held = jax.lax.optimization_barrier((x, stacked))
            p = jax.tree.map(lambda w: layers.from_bits(layers.to_bits(w)[layer], w.dtype), held)
        return block(x, gather(p, specs, rules), where, cache, layer, cfg, policy, rules), None

    if policy.remat != "none":
        saved = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}[policy.remat]
        one_layer = jax.checkpoint(one_layer, policy=saved)
    numbers = jnp.arange(n_layers, dtype=jnp.int32)
    xs = ({}, numbers) if policy.widen_by_layer else (stacked, numbers)
    carry, _ = jax.lax.scan(one_layer, (x, cache), xs, unroll=n_layers if policy.unroll else 1)
    return carry


def block(
    x: Float[Array, "batch seq embed"],
    p: Params,
    where: Where,
    cache: KVCache | None,
    layer: Int[Array, ""],
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules,
) -> tuple[Float[Array, "batch seq embed"], KVCache | None]:
    """One layer: x + attention(norm(x)) + feed_forward(norm(x)), both branches summed over the mesh at once."""
    h = layers.norm(x, p["ln_1"], cfg)
    attended, cache = self_attention(h, p["attn"], where, cache, layer, cfg, policy, rules)
    both = attended + layers.feed_forward(h, p["mlp"], policy, rules)
    return x + rules.place(both, ("batch", "seq", "embed")) + p["mlp"]["b_out"].astype(jnp.float32), cache


def self_attention(
    h: Float[Array, "batch seq embed"],
    p: Params,
    where: Where,
    cache: KVCache | None,
    layer: Int[Array, ""],
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules,
) -> tuple[Float[Array, "batch seq embed"], KVCache | None]:
    """Attention over these positions, or over all that the cache holds; a partial sum over the axis of `heads`."""
    split = rules.use(("batch", "seq", "heads", None))
    q, k, v = (layers.product("bse,ehd->bshd", h, p[name], policy, split) for name in ("q", "k", "v"))
    if "b_q" in p:
        q, k, v = (x + p[name].astype(jnp.float32) for x, name in ((q, "b_q"), (k, "b_k"), (v, "b_v")))
    if where.sin is not None and where.cos is not None:
        q, k = layers.rotate(q, where.sin, where.cos), layers.rotate(k, where.sin, where.cos)
    if cache is not None:
        cache = cache.write(layer, where.positions, k, v)
        k, v = cache.k[layer], cache.v[layer]
    mixed = layers.attention(q, k, v, where.bias, cfg, policy)
    out = rules.partial(("batch", "seq", "embed"), over="heads")
    return layers.product("bshd,hde->bse", mixed, p["o"], policy, out), cache


def unembed(
    params: Params,
    x: Float[Array, "batch seq embed"],
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
) -> Float[Array, "batch seq vocab"]:
    """Final norm and head."""
    head = gather(params["head"], param_table(cfg)["head"], rules)
    x = layers.norm(x, head["ln"], cfg)
    logits = layers.product("bse,ev->bsv", x, head["w"], policy, rules.use(("batch", "seq", "vocab")))
    return logits + head["b"].astype(jnp.float32)


def features(
    params: Params,
    tokens: Int[Array, "batch seq"],
    layer: int,
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
) -> Float[Array, "batch seq embed"]:
    """The stream after `layer` blocks (0: the embedding); after all of them, the final norm is applied too.

    Negative values count from the end, as in a list of n_layers + 1 entries.
    """
    layer = layer % (cfg.n_layers + 1)
    first = jax.tree.map(lambda w: w[:layer], params["layers"])
    x, _ = hidden(params | {"layers": first}, tokens, cfg, policy, rules)
    if layer < cfg.n_layers:
        return x
    return layers.norm(x, gather(params["head"], param_table(cfg)["head"], rules)["ln"], cfg)


def gather(params: Params, specs: Any, rules: Rules) -> Params:
    """Storage layout to compute layout: the whole of parameter sharding's all-gather.

    A leaf may lack its leading `layers` axis, being one slice of it.
    """
    return jax.tree.map(lambda w, s: rules.place(w, s.axes[len(s.axes) - w.ndim :]), params, specs)
