"""From logits to the next token, for a batch whose rows have their own options. Orders: docs/sampling.md."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from mesh_transformer.shapes import Array, Bool, Float, Int

Sampler = Literal["default", "legacy"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowOptions:
    """Sampling options of every row; each [batch].

    temperature: 0 is greedy. top_k: candidates kept, 0 keeps all. top_p: probability mass kept, 1 keeps all.
    min_p: candidates below this share of the likeliest one's probability go, 0 keeps all. keys: uint32 key data
    [batch, 2], one stream of random numbers a row. legacy: whether the original's order of filters is used, bool.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    keys: Array
    legacy: Array

    @property
    def filters(self) -> Bool[Array, " batch"]:
        """Whether anything but temperature shapes a row's distribution."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))


def next_tokens(
    logits: Float[Array, "batch vocab"],
    positions: Int[Array, " batch"],
    options: RowOptions,
    *,
    default: bool = True,
    legacy: bool = True,
) -> Int[Array, " batch"]:
    """One token a row. The draw of a row depends on its key and position alone, not on its neighbours.

    Filters are computed only if a row uses them. `default` or `legacy` False promises that no row ever uses those of
    that order, and leaves them out of the program.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # the first, so ties take the lower id
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)  # so that a tiny temperature overflows downwards only
    temperature = jnp.where(options.temperature > 0, options.temperature, 1.0)[:, None]
    keep_all = lambda logits, _: jnp.ones(logits.shape, bool)  # noqa: E731
    by_default = jnp.any(options.filters & ~options.legacy)
    kept = keep_all(logits, options)
    if default:
        kept = jax.lax.cond(by_default, candidate_filter, keep_all, logits / temperature, options)
    by_legacy = jnp.any(options.filters & options.legacy)
    kept_legacy = keep_all(logits, options)
    if legacy:
        kept_legacy = jax.lax.cond(by_legacy, legacy_filter, keep_all, logits, options)
    scaled = jnp.where(
        options.legacy[:, None],
        (logits - jnp.where(kept_legacy, 0.0, 1e10)) / temperature,
        jnp.where(kept, logits / temperature, -jnp.inf),
    )
    draw = lambda key, position, row: jax.random.categorical(  # noqa: E731
        jax.random.fold_in(jax.random.wrap_key_data(key), position), row
    )
    all_drawn = lambda: jax.vmap(draw)(options.keys, positions, scaled).astype(jnp.int32)  # noqa: E731
    # Greedy rows have no use for a random number for every id of the vocabulary.
    drawn = jax.lax.cond(jnp.any(options.temperature > 0), all_drawn, lambda: greedy)
    return jnp.where(options.temperature > 0, drawn, greedy)


def candidate_filter(scaled: Float[Array, "batch vocab"], options: RowOptions) -> Bool[Array, "batch vocab"]:
    """True for candidates that top-k, then top-p, then min-p keep; each acts on what the one before left.

    Equal logits rank by id, the lower first. The likeliest candidate always stays.
    """
    keys = _ranking_keys(scaled)
    kept = _first_ranks(keys, jnp.uint32(1), options.top_k.astype(jnp.uint32), options.top_k > 0)
    weights = _weights(jnp.where(kept, scaled, -jnp.inf))
    masses = _whole_masses(weights)
    # A whole number is below another number if it is below that one rounded up.
    enough = jnp.ceil(options.top_p * _total(masses)).astype(jnp.uint32)
    kept &= _first_ranks(keys, masses, enough, options.top_p < 1)
    return kept & (weights >= options.min_p[:, None])


def legacy_filter(logits: Float[Array, "batch vocab"], options: RowOptions) -> Bool[Array, "batch vocab"]:
    """The original's: top-k and top-p, both from the raw logits (no temperature, no renormalisation after top-k).

    Equal logits rank by id, the higher first. The original's top-k never removed token 0; here it does.
    """
    keys = _ranking_keys(logits)
    kept = _first_ranks(keys, jnp.uint32(1), options.top_k.astype(jnp.uint32), options.top_k > 0, higher_id_first=True)
    masses = _whole_masses(_weights(logits))
    # A candidate stays while the mass before it has not passed top_p: equal to it is still allowed.
    enough = jnp.floor(options.top_p * _total(masses)).astype(jnp.uint32) + 1
    return kept & _first_ranks(keys, masses, enough, options.top_p < 1, higher_id_first=True)


def _first_ranks(
    keys: Array, masses: Array, enough: Array, used: Bool[Array, " batch"], higher_id_first: bool = False
) -> Bool[Array, "batch vocab"]:
    """True for candidates before which the masses of higher ranks sum to less than `enough`; at least for the first.

    Nothing is sorted. What stays is all above some key and the first few of those equal to it, and as the mass above a
    key falls while the key rises, that key is found bit by bit, each bit a masked sum over the row. (T5X masks its
    logits so: github.com/google-research/t5x, t5x/binary_search.py.)

    keys: as `_ranking_keys` makes them, uint32 [batch, vocab]. masses: uint32 [batch, vocab], or 1 to count
    candidates; their sum must fit. enough: uint32 [batch]. used: rows for which it is False keep everything.
    """

    def mass_above(key: Array) -> Array:
        return jnp.sum(jnp.where(keys > key[:, None], masses, jnp.uint32(0)), axis=-1, dtype=jnp.uint32)

    def next_bit(i: Array, key: Array) -> Array:
        higher = key | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(mass_above(higher - 1) < enough, key, higher)

    # The lowest key with less than enough above it; the first has nothing above it.
    enough = jnp.maximum(enough, 1)
    n_bits = jnp.where(jnp.any(used), 32, 0)
    key = jax.lax.fori_loop(0, n_bits, next_bit, jnp.zeros_like(enough))

    # Of those equal to it stay as many as begin before the mass is full: missing / mass, rounded up. In whole numbers
    # too: a quotient of floats may be a little above the whole number that it should be. The highest mass is that of
    # any that no earlier filter removed.
    equal = keys == key[:, None]
    n_equal = jnp.sum(equal, axis=-1, dtype=jnp.uint32)
    mass = jnp.max(jnp.where(equal, masses, jnp.uint32(0)), axis=-1)
    missing = enough - mass_above(key)
    stay = (missing - 1) // jnp.maximum(mass, 1) + 1
    by_id = lambda: jax.lax.cumsum(equal.astype(jnp.uint32), axis=1, reverse=higher_id_first) <= stay[:, None]  # noqa: E731
    # Rarely are there more than stay, and counting them through costs as much as a third of the search.
    first = jax.lax.cond(jnp.any(used & (n_equal > stay)), by_id, lambda: jnp.ones_like(equal))
    return (keys > key[:, None]) | (equal & first) | ~used[:, None]


def _ranking_keys(logits: Float[Array, "batch vocab"]) -> Array:
    """uint32 [batch, vocab] in the order of the logits: the bits of a float, inverted if it is negative."""
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)  # -0 equals 0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _weights(logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
    """Probabilities as multiples of the likeliest one's."""
    return jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))


def _whole_masses(weights: Float[Array, "batch vocab"]) -> Array:
    """Weights in whole numbers, uint32 [batch, vocab], whose sum lies between 2^31 and 2^32.

    Sums of whole numbers are exact, in whatever order a device adds. Rounding puts each mass off by at most 2^-32 of
    the sum: the mass before a candidate by less than 1e-6, unless tens of thousands are equal and err the same way. The
    scale is a power of two, so that the weight 1 of the likeliest candidate and of its equals is exact.
    """
    # A thousandth of room, for what rounding adds.
    _, exponent = jnp.frexp(1.001 * jnp.sum(weights, axis=-1, keepdims=True))
    return jnp.round(weights * jnp.ldexp(1.0, 32 - exponent)).astype(jnp.uint32)


def _total(masses: Array) -> Float[Array, " batch"]:
    return jnp.sum(masses, axis=-1, dtype=jnp.uint32).astype(jnp.float32)
