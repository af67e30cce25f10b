"""The decoder, top to bottom: embed, the stack of blocks, head. One `block` for training, prefill and decoding.

Arithmetic: docs/formats.md, section 3, and 8.3 for v2. Parameters: `model.params.param_table`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model import heads, layers, rope
from mesh_transformer.model.cache import KVCache, attend
from mesh_transformer.model.lora import LowRank, map_parts
from mesh_transformer.model.narrow import OfLayer
from mesh_transformer.model.params import ParamSpec, is_multiplied, param_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.model.quantize import Quantized
from mesh_transformer.model.tied import TURNED
from mesh_transformer.shapes import Array, Float, Int, Params
from mesh_transformer.sharding.pipeline import run_stages
from mesh_transformer.sharding.rules import ONE_DEVICE, STREAM, Axes, Rules

# What `gather` brings together; the backward pass brings it together again instead of keeping it.
_GATHERED = "gathered"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """Everything that a block needs to know of positions; the same for every layer.

    positions: [#batch seq], the place of every query since the start of its text. sin, cos: [#batch seq half_rotary],
    None without rotary positions. Without a cache, bias: added to the scores, [#batch #heads seq keys]. With one,
    pages: the table of every row, [batch width]; relative: T5 biases of every distance, [heads buckets], or None.
    """

    positions: Array
    sin: Array | None = None
    cos: Array | None = None
    bias: Array | None = None
    pages: Array | None = None
    relative: Array | None = None


def forward(
    params: Params,
    tokens: Int[Array, "batch seq"],
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
) -> Float[Array, "batch seq vocab"]:
    """Logits of the token after every position, float32."""
    x, _ = hidden(params, tokens, cfg, policy, rules)
    return unembed(params, x, cfg, policy, rules.after_stages)


def hidden(
    params: Params,
    tokens: Int[Array, "batch seq"],
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
    *,
    start: Int[Array, " batch"] | None = None,
    cache: KVCache | None = None,
    pages: Int[Array, "batch width"] | None = None,
    separator: int | None = None,
) -> tuple[Float[Array, "batch seq embed"], KVCache | None]:
    """The residual stream after the last block, lying as `rules.after_stages` say, and the cache with these tokens.

    Without a cache the tokens are whole texts. With one, row b continues its text at position `start[b]`, sees what
    the cache holds in its `pages`, and is written into them; a row may be padded on the right, since nothing sees a
    later position and the next call overwrites it. A row's tokens must lie within one page. A pipeline has no cache.

    With a separator, which needs neither, each occurrence of that id begins a document that sees nothing before it.
    """
    seq = tokens.shape[1]
    first = jnp.zeros((1,), jnp.int32) if start is None else start
    positions = first[:, None] + jnp.arange(seq, dtype=jnp.int32)[None, :]
    documents = None if separator is None else jnp.cumsum(tokens == separator, axis=1, dtype=jnp.int32)
    own = positions if documents is None else positions - jax.lax.cummax(_begins(documents) * positions, axis=1)
    x = embed(params, tokens, own, cfg, policy, rules)
    by_kernel = cache is None and layers.attention_kernel(cfg, policy, rules, seq, documents=separator is not None)
    where = locate(params, positions, cache, pages, cfg, rules, masked=by_kernel in (False, "plain"))
    if documents is not None:
        assert cache is None and rules.n_stages == 1 and where.bias is not None
        same = documents[:, None, :, None] == documents[:, None, None, :]
        where = dataclasses.replace(where, bias=where.bias + jnp.where(same, 0.0, layers.MASKED))
    if rules.n_stages == 1:
        return run_blocks(params["layers"], x, where, cache, cfg, policy, rules)
    assert cache is None, "a pipeline has no cache"
    stage = lambda stacked, x: run_blocks(stacked, x, where, None, cfg, policy, rules)[0]  # noqa: E731
    return run_stages(stage, params["layers"], x, rules), None


def embed(
    params: Params,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "#batch seq"],
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules,
) -> Float[Array, "batch seq embed"]:
    """The stream before the first block; `positions` count only where the model has a table of them."""
    table = gather(params["embed"], param_table(cfg)["embed"], rules)
    x = layers.embed_tokens(table["tokens"], tokens, policy, rules)
    x = _plus(x, table.get("bias"))
    if cfg.position == "fixed":
        there = rules.use((None if positions.shape[0] == 1 else "batch", "seq", "embed"))
        x = x + table["positions"].at[positions].get(mode="clip", out_sharding=there).astype(jnp.float32)
    return rules.place(x, STREAM)


def _begins(documents: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """1 where a document begins, 0 elsewhere."""
    before = jnp.pad(documents[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return (documents != before).astype(jnp.int32)


def locate(
    params: Params,
    positions: Array,
    cache: KVCache | None,
    pages: Array | None,
    cfg: ModelConfig,
    rules: Rules = ONE_DEVICE,
    *,
    masked: bool = True,
) -> Where:
    """Masks, rotary angles and relative biases for queries at `positions` ([#batch seq]).

    masked: whether attention without a cache needs a mask; without one it is left to a kernel.
    """
    rows = None if cache is None else "batch"  # without a cache one row of positions stands for all
    where = Where(positions=positions, pages=pages)
    relative = None
    if cfg.position == "t5":
        relative = gather(params["relative"], param_table(cfg)["relative"], rules)["bias"]
    if cfg.position == "rotary":
        sin, cos = rope.rotary_tables(positions.shape[1], cfg) if cache is None else (cache.sin, cache.cos)
        split = rules.use((rows, "seq", None))
        sin, cos = (jnp.asarray(table).at[positions].get(out_sharding=split) for table in (sin, cos))
        where = dataclasses.replace(where, sin=sin, cos=cos)
    if cache is not None or not masked:
        return dataclasses.replace(where, relative=relative)
    bias = layers.sliding_mask(positions, positions, cfg.reach)
    if relative is not None:
        bias = bias + layers.relative_bias(
            relative, positions, positions, cfg.n_ctx, rules.use(("heads", None, None, None))
        )
    return dataclasses.replace(where, bias=bias)


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
    policy = _on(rules, policy)
    specs = param_table(cfg)["layers"]
    n_layers = jax.tree.leaves(stacked)[0].shape[0]
    if n_layers == 0:
        return x, cache

    def one_layer(carry: tuple[Array, KVCache | None], inputs: tuple[Params, Array]) -> tuple[Any, None]:
        x, cache = carry
        p, layer = inputs
        if not policy.cuts_layers:
            x, p = of_layer(x, stacked, layer, specs, policy)
        return block(x, gather(p, specs, rules), where, cache, layer, cfg, policy, rules), None

    if policy.remat != "none" or rules.gathers:
        saved = {
            "none": _all_but_gathered,
            "dots": _products,
            "full": None,
        }
        one_layer = jax.checkpoint(one_layer, policy=saved[policy.remat])
    numbers = jnp.arange(n_layers, dtype=jnp.int32)
    xs = (stacked, numbers) if policy.cuts_layers else ({}, numbers)
    carry, _ = jax.lax.scan(one_layer, (x, cache), xs, unroll=n_layers if policy.unroll else 1)
    return carry


def _on(rules: Rules, policy: ComputePolicy) -> ComputePolicy:
    """The policy on a mesh, if it is one: what multiplies few rows knows no mesh."""
    return dataclasses.replace(policy, few_rows="plain") if rules.on_mesh else policy


def of_layer(
    x: Float[Array, "batch seq embed"], stacked: Params, layer: Int[Array, ""], specs: Any, policy: ComputePolicy
) -> tuple[Float[Array, "batch seq embed"], Params]:
    """One layer of the parameters in inference, matrices left in their stack where products of few rows take it so;
    and the stream, which what is done with them must wait for.
    """
    if policy.widen_by_layer:  # keeps XLA from taking the widening out of the loop, for all layers at once
        x, stacked = jax.lax.optimization_barrier((x, stacked))

    def one(spec: ParamSpec, w: Any) -> Any:
        if isinstance(w, LowRank):
            return dataclasses.replace(w, base=one(spec, w.base), a=w.a[layer], b=w.b[layer])
        lazy = OfLayer(w, layer)
        return lazy if is_multiplied(spec) and policy.few_rows != "plain" else lazy.cut()

    return x, jax.tree.map(one, specs, stacked, is_leaf=lambda s: isinstance(s, ParamSpec))


def _products(operation: Any, *_: Any, **settings: Any) -> bool:
    """The checkpoint policy that keeps what `layers.kept` names, and all that cuDNN's attention gives."""
    return settings.get("name") == layers.KEPT or operation.name.startswith("dot_product_attention_fwd")


def _all_but_gathered(operation: Any, *_: Any, **settings: Any) -> bool:
    """The checkpoint policy that keeps everything but parameters brought together, and what moves over the mesh."""
    moves = operation.name == "reshard" or operation.name.startswith("all_gather")
    return not moves and settings.get("name") != _GATHERED


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
    """One layer: x + attention(norm(x)) + feed_forward(norm(x)), both branches summed over the mesh at once.

    With a serial residual the feed-forward reads x + attention(norm(x)), and each branch is summed by itself.
    """
    normed = lambda x, p: rules.share(layers.norm(x, p, cfg), ("batch", "seq", "embed"), over="mlp")  # noqa: E731
    h = normed(x, p["ln_1"])
    attended, cache = self_attention(h, p["attn"], where, cache, layer, cfg, policy, rules)
    if cfg.residual == "serial":
        x = _plus(x + rules.place(attended, STREAM), p["attn"].get("b_o"))
        wide = layers.feed_forward(normed(x, p["ln_2"]), p["mlp"], cfg, policy, rules)
        return _plus(x + rules.place(wide, STREAM), p["mlp"].get("b_out")), cache
    h = normed(x, p["ln_2"]) if "ln_2" in p else h
    both = attended + layers.feed_forward(h, p["mlp"], cfg, policy, rules)
    return _plus(_plus(x + rules.place(both, STREAM), p["mlp"].get("b_out")), p["attn"].get("b_o")), cache


def _plus(x: Float[Array, "batch seq out"], b: Float[Array, " out"] | None) -> Float[Array, "batch seq out"]:
    """x + b in float32; x where the model has no such bias."""
    return x if b is None else x + b.astype(jnp.float32)


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
    split = rules.use(("batch", "seq", "heads", None))  # kv_heads lie as heads do
    q, k, v = (layers.product("bse,ehd->bshd", h, p[name], policy, split) for name in ("q", "k", "v"))
    if "b_q" in p:
        q, k, v = (x + p[name].astype(jnp.float32) for x, name in ((q, "b_q"), (k, "b_k"), (v, "b_v")))
    if "q_norm" in p:
        q, k = (layers.rms_norm(x, p[name]["scale"], cfg) for x, name in ((q, "q_norm"), (k, "k_norm")))
    if where.sin is not None and where.cos is not None:
        q, k = (rope.rotate(x, where.sin, where.cos, cfg.rotary_layout) for x in (q, k))
    n_heads, n_kv = q.shape[2], k.shape[2]
    if cache is None:
        q, k, v = (layers.kept(x, policy) for x in (q, k, v))
        bias = where.bias
        if cfg.alternates and bias is not None:
            bias = bias + layers.sliding_mask(where.positions, where.positions, layers.window_of(layer, cfg))
        k, v = (heads.repeated(x, n_heads, split) for x in (k, v))
        mixed = layers.attention(q, k, v, bias, cfg, policy)
        mixed = mixed if bias is None else layers.kept(mixed, policy)  # a kernel's own is kept as it is
    else:
        assert where.pages is not None
        cache = cache.write(layer, where.pages, where.positions, k, v)
        # Heads that share keys are so many more queries at the same positions: keys are read once.
        at = where.positions if n_kv == n_heads else jnp.repeat(where.positions, n_heads // n_kv, axis=1)
        q = heads.folded(q, n_kv, split)
        mixed = attend(q, cache, layer, where.pages, at, where.relative, cfg, policy, rules)
        mixed = heads.unfolded(mixed, n_heads, split)
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
    policy = _on(rules, policy)
    head = gather(params["head"], param_table(cfg)["head"], rules)
    x = rules.share(layers.norm(x, head["ln"], cfg), ("batch", "seq", "embed"), over="vocab")
    split = rules.use(("batch", "seq", "vocab"))
    if TURNED in params:
        return _plus(layers.product("bse,ev->bsv", x, params[TURNED], policy, split), head.get("b"))
    if cfg.tied_head:
        table = gather(params["embed"], param_table(cfg)["embed"], rules)["tokens"]
        return _plus(layers.product(layers.TIED, x, table, policy, split), head.get("b"))
    return _plus(layers.product("bse,ev->bsv", x, head["w"], policy, split), head.get("b"))


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

    def apart(w: Any, axes: Axes) -> Any:
        used = rules.place(w, axes)
        return used if rules.param(axes) == rules.use(axes) else checkpoint_name(used, _GATHERED)

    def one(w: Any, spec: ParamSpec) -> Any:
        if isinstance(w, OfLayer):  # on one device, where everything lies as it is used
            return w
        if isinstance(w, Quantized | LowRank):
            return map_parts(apart, spec, w)
        axes = spec.axes[len(spec.axes) - w.ndim :]
        used = rules.place_weight(w, axes) if waits(spec, w) else rules.place(w, axes)
        return used if rules.param(axes) == rules.use(axes) else checkpoint_name(used, _GATHERED)

    return jax.tree.map(one, params, specs, is_leaf=lambda w: isinstance(w, OfLayer | Quantized | LowRank))


def waits(spec: ParamSpec, w: Any) -> bool:
    """Whether a parameter's gradient can be left unsummed over the batch: that of a product, held in float32.

    Narrower ones would be rounded before they are summed.
    """
    return is_multiplied(spec) and w.dtype == jnp.float32
