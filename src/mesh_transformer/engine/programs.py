"""The engine's compiled programs: prefill a chunk of a prompt, decode a token of every row, choose the next tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.compat import alike_rows, n_compiled
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.engine.pages import page_size
from mesh_transformer.engine.request import MOST_ALTERNATIVES, Request
from mesh_transformer.engine.slots import Slots, fill_slot
from mesh_transformer.model.cache import KVCache
from mesh_transformer.model.decoder import hidden, unembed
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sample.methods import next_tokens
from mesh_transformer.shapes import Array, Float, Int, Params
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout
from mesh_transformer.sharding.rules import ONE_DEVICE, Rules

# Columns of `rows` before the table of pages, and the fewest pages that a program is compiled for.
_BEFORE_TABLE = 2
_FEWEST_PAGES = 4


class Alternatives(NamedTuple):
    """Log-probabilities in nats of given tokens [...], and the likeliest ids and theirs [..., MOST_ALTERNATIVES]."""

    of_token: Any
    ids: Any
    values: Any


class Uses(NamedTuple):
    """What rows may ask of `choose`; a program lacks what they may not.

    shaping: biases or penalties. filters, legacy: filters of the default order, of the original's. scores:
    likelihoods.
    """

    shaping: bool = True
    filters: bool = True
    legacy: bool = True
    scores: bool = True

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Uses:
        """What some of the requests use."""
        return cls(
            shaping=any(r.options.shapes for r in requests),
            filters=any(r.options.filters and r.options.sampler == "default" for r in requests),
            legacy=any(r.options.filters and r.options.sampler == "legacy" for r in requests),
            scores=any(r.logprobs is not None for r in requests),
        )


class Programs:
    """One model's programs, compiled once for every shape; engines share them.

    alike: a text's logits are the same bit for bit whatever else is computed with it, on one CPU device. In
    float32 and without the native kernels that costs texts which are few (docs/serving.md, "The same answer"):
    products then have rows for more.
    """

    def __init__(
        self, cfg: ModelConfig, policy: ComputePolicy, layout: Layout = ONE_DEVICE_LAYOUT, *, alike: bool = True
    ) -> None:
        self.cfg, self.policy, self.layout = cfg, policy, layout
        how: dict[str, Any] = {"cfg": cfg, "policy": policy, "rules": layout.rules}
        options, self.fewest_rows, product_rows = alike_rows(policy.dtype) if alike else (None, 1, 0)
        if policy.few_rows == "native":  # its rows are alike however many; attention still differs between one and two
            self.fewest_rows = 2
        if layout.mesh is None:
            how["policy"] = dataclasses.replace(policy, product_rows=product_rows)
        compile_ = functools.partial(jax.jit, donate_argnames="cache", compiler_options=options)
        self._prefill = compile_(functools.partial(prefill, n_copies=self.fewest_rows, **how))
        self._decode = compile_(functools.partial(decode, **how))
        several = functools.partial(write_several, **how)
        self._write = jax.jit(several, donate_argnames=("cache", "slots"), static_argnames=("n", "uses"))
        self._choose = jax.jit(choose, donate_argnames="slots", static_argnames="uses")
        self._fill = jax.jit(fill_slot, donate_argnames="slots")

    def prefill(
        self, params: Params, cache: KVCache, tokens: np.ndarray, rows: np.ndarray, targets: np.ndarray | None = None
    ) -> tuple[Array, KVCache, Alternatives | None]:
        """See `prefill`. The logits lie on one device."""
        rows = self.used_columns(rows, rows[:, 0] + tokens.shape[1] - 1)
        with self.layout.using():
            placed = [None if a is None else self.layout.place_rows(a) for a in (tokens, rows, targets)]
            logits, cache, scores = self._prefill(params, *placed, cache=cache)
        return self._whole(logits), cache, jax.tree.map(self._whole, scores)

    def decode(self, params: Params, cache: KVCache, rows: np.ndarray) -> tuple[Array, KVCache]:
        """See `decode`. The logits lie on one device."""
        rows = self.used_columns(rows, rows[:, 1])
        with self.layout.using():
            logits, cache = self._decode(params, self.layout.place_rows(rows), cache=cache)
        return self._whole(logits), cache

    def write_several(
        self,
        params: Params,
        cache: KVCache,
        slots: Slots,
        rows: np.ndarray,
        chosen: np.ndarray,
        end: int | Sequence[int],
        n: int,
        uses: Uses,
    ) -> tuple[Array, Alternatives | None, KVCache, Slots]:
        """See `write_several`. On one device."""
        rows = self.used_columns(rows, rows[:, 1] + n - 1)
        return self._write(params, rows, chosen, _several(end), cache=cache, slots=slots, n=n, uses=uses)

    def choose(
        self, logits: Array, slots: Slots, rows: np.ndarray, end: int | Sequence[int], uses: Uses
    ) -> tuple[Array, Alternatives | None, Slots]:
        """See `choose`."""
        return self._choose(logits, rows, _several(end), slots=slots, uses=uses)

    def fill(self, slots: Slots, *values: Any) -> Slots:
        """See `slots.fill_slot`."""
        return self._fill(*values, slots=slots)

    def used_columns(self, rows: np.ndarray, newest: np.ndarray) -> np.ndarray:
        """Rows whose tables of pages have no more columns than a few widths allow and `newest` positions need.

        Where attention is computed page by page nothing is gained by that; on accelerators it reads whole tables.
        """
        width = rows.shape[1] - _BEFORE_TABLE
        used = int(newest.max()) // page_size(self.cfg.n_ctx) + 1
        if self.policy.attention == "plain" or used >= width:
            return rows
        columns = max(_FEWEST_PAGES, 1 << (used - 1).bit_length())
        return rows[:, : _BEFORE_TABLE + min(columns, width)]

    @property
    def n_compiled(self) -> int:
        """Programs compiled until now."""
        return n_compiled(self._prefill, self._decode, self._write, self._choose, self._fill)

    def _whole(self, value: Array) -> Array:
        """On one device: choosing the next tokens is little work."""
        return value if self.layout.mesh is None else value.addressable_data(0)


def _several(end: int | Sequence[int]) -> np.ndarray:
    return np.atleast_1d(np.asarray(end, np.int32))


def prefill(
    params: Params,
    tokens: Int[Array, "batch seq"],
    rows: Int[Array, "batch columns"],
    targets: Int[Array, "batch seq"] | None = None,
    *,
    cache: KVCache,
    n_copies: int,
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
) -> tuple[Float[Array, "copies vocab"], KVCache, Alternatives | None]:
    """Reads a chunk of every row's text: logits after its last token, each row of them `n_copies` times, the cache
    with the chunk, and how likely `targets` were after every token.

    rows: position of the chunk's first token, number of tokens (the rest is padding), then the table of pages.
    """
    x, filled = hidden(params, tokens, cfg, policy, rules, start=rows[:, 0], cache=cache, pages=rows[:, 2:])
    assert filled is not None
    scores = None
    if targets is not None:
        logits = rules.place(unembed(params, x, cfg, policy, rules), (None, None, None))
        scores = alternatives(logits, rules.place(targets, (None, None)))
    last = jax.vmap(lambda row, n: row[n - 1])(x, rows[:, 1])
    several = jnp.broadcast_to(last[:, None], (last.shape[0], n_copies, last.shape[1]))
    logits = rules.place(unembed(params, several, cfg, policy, rules), (None, None, None))
    return logits.reshape(-1, logits.shape[-1]), filled, scores


def decode(
    params: Params,
    rows: Int[Array, "batch columns"],
    *,
    cache: KVCache,
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Adds one token to every row: logits of the next, and the cache with it.

    rows: the token, its position, then the table of pages.
    """
    x, filled = hidden(params, rows[:, :1], cfg, policy, rules, start=rows[:, 1], cache=cache, pages=rows[:, 2:])
    assert filled is not None
    return rules.place(unembed(params, x, cfg, policy, rules)[:, 0], (None, None)), filled


def write_several(
    params: Params,
    rows: Int[Array, "batch columns"],
    chosen: Int[Array, "batch 3"],
    end: Int[Array, " ends"],
    *,
    cache: KVCache,
    slots: Slots,
    n: int,
    uses: Uses,
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
) -> tuple[Int[Array, "n batch"], Alternatives | None, KVCache, Slots]:
    """`decode` and `choose` in turn, n times over without the host: what is read next is what was just chosen.

    rows, chosen, end: as they take them for the first time. Pages must be there for all n tokens. A text that ends on
    the way goes on unheard.
    """

    def one(carry: tuple[Array, KVCache, Slots], i: Array) -> tuple[Any, Any]:
        tokens, cache, slots = carry
        now = jnp.concatenate([tokens[:, None], rows[:, 1:2] + i, rows[:, 2:]], axis=1)
        logits, cache = decode(params, now, cache=cache, cfg=cfg, policy=policy, rules=rules)
        tokens, scores, slots = choose(logits, chosen + i * jnp.array([0, 1, -1]), end, slots=slots, uses=uses)
        return (tokens, cache, slots), (tokens, scores)

    steps = jnp.arange(n, dtype=jnp.int32)
    (_, cache, slots), (tokens, scores) = jax.lax.scan(one, (rows[:, 0], cache, slots), steps)
    return tokens, scores, cache, slots


def choose(
    logits: Float[Array, "batch vocab"],
    rows: Int[Array, "batch 3"],
    end: Int[Array, " ends"],
    *,
    slots: Slots,
    uses: Uses,
) -> tuple[Int[Array, " batch"], Alternatives | None, Slots]:
    """The next token of every row, its likelihood, and the slots that have counted it.

    rows: slot, position of the new token, for how many tokens end-of-text is held off. end: the ids that end a text,
    negative if there is none. Likelihoods are the model's own, and zeros where no row asks for them at the time.
    """
    slot, positions, held_off = rows.T
    own = logits
    if uses.shaping:
        logits = shape_logits(logits, slots, slot)
    at_end = jnp.any(jnp.arange(logits.shape[1])[:, None] == end, axis=1)
    logits = jnp.where(at_end[None, :] & (held_off > 0)[:, None], -jnp.inf, logits)
    options = jax.tree.map(lambda values: values[slot], slots.options)
    tokens = next_tokens(logits, positions, options, default=uses.filters, legacy=uses.legacy)
    if uses.shaping:
        slots = dataclasses.replace(slots, counts=slots.counts.at[slot, tokens].add(1))
    if not uses.scores:
        return tokens, None, slots
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(alternatives, own, tokens))
    scores = jax.lax.cond(jnp.any(slots.scored[slot]), alternatives, lambda *_: zeros, own, tokens)
    return tokens, scores, slots


def shape_logits(
    logits: Float[Array, "batch vocab"], slots: Slots, slot: Int[Array, " batch"]
) -> Float[Array, "batch vocab"]:
    """With biases added, and penalties for what the completion holds already subtracted."""
    add = lambda row, ids, values: row.at[ids].add(values, mode="drop")  # noqa: E731
    logits = jax.vmap(add)(logits, slots.bias_ids[slot], slots.bias_values[slot])
    counts = slots.counts[slot].astype(jnp.float32)
    presence, frequency = slots.presence[slot, None], slots.frequency[slot, None]
    return logits - frequency * counts - presence * (counts > 0)


def alternatives(logits: Float[Array, "*rows vocab"], tokens: Int[Array, "*rows"]) -> Alternatives:
    """Log-probabilities of `tokens` and of the likeliest ids."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    values, ids = jax.lax.top_k(log_probs, min(MOST_ALTERNATIVES, logits.shape[-1]))
    return Alternatives(jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0], ids, values)
