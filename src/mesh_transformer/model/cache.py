"""The key-value cache: pages that rows share, and attention over them page by page.

Attention reads the pages of a row in turn and keeps the largest score, the sum of weights and the weighted values so
far (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; pages as in Kwon et al. 2023,
"Efficient Memory Management for Large Language Model Serving with PagedAttention"). A page in which a row sees
nothing changes none of these by a single bit, so that a row's result does not depend on how long its neighbours are.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.layers import MASKED, relative_bias, sliding_mask, window_of
from mesh_transformer.model.narrow import from_bits, to_bits
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.model.rope import rotary_tables
from mesh_transformer.shapes import Array, Float, Int
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout
from mesh_transformer.sharding.rules import Rules

# How a pool lies on a mesh: groups of pages with the rows that use them.
_POOL = (None, "batch", None, "kv_heads", None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A pool of pages that hold keys (already rotated) and values of consecutive positions.

    Which pages a row uses is said by its table, [width] page numbers: the token at position t lies in page
    table[(t // page_size) % width] at t % page_size. A table wide enough for the context and one page more forgets a
    whole page at a time, and never one that is still seen. Rotary scores depend on differences of positions only:
    keys keep the angle of their position since the start of the text and are never turned again.

    Rows of a batch that is divided over a mesh divide the pool too: the batch consists of as many groups of equal
    size as there are groups of pages, and page numbers count within a group. On one device there is one group.

    k, v: [layers, groups, pages, kv_heads, page_size, head_dim] in `dtype`, the compute dtype, or, on CPU, the bits of
    a 16-bit one as integers: inside a loop XLA there would copy or widen all of an array of such floats. sin, cos:
    rotary tables over every position that a text may reach, [positions, half_rotary] ([0, 0] without rotary positions).
    """

    k: Array
    v: Array
    sin: Array
    cos: Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def holds_bits(self) -> bool:
        """Whether k and v are integers that stand for floats."""
        return self.k.dtype != self.dtype

    @property
    def page_size(self) -> int:
        """Positions that a page holds."""
        return self.k.shape[4]

    @property
    def n_groups(self) -> int:
        """Groups of rows and pages."""
        return self.k.shape[1]

    def write(
        self,
        layer: Int[Array, ""],
        table: Int[Array, "batch width"],
        positions: Int[Array, "batch seq"],
        k: Float[Array, "batch seq kv_heads head_dim"],
        v: Float[Array, "batch seq kv_heads head_dim"],
    ) -> KVCache:
        """The cache with the keys and values of one layer at `positions`."""
        pages = jnp.take_along_axis(table, (positions // self.page_size) % table.shape[1], axis=1)
        at = self._grouped(jnp.stack([jnp.zeros_like(pages) + layer, pages, positions % self.page_size], axis=-1))

        def write(held: Array, new: Array) -> Array:
            values = self._grouped(new.astype(self.dtype))
            values = to_bits(values) if self.holds_bits else values
            return jax.lax.scatter(held, at, values, _WRITE, mode="promise_in_bounds")

        return dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))

    def read(
        self, layer: Int[Array, ""], pages: Int[Array, "batch ..."]
    ) -> tuple[Float[Array, "batch ... kv_heads page head_dim"], Float[Array, "batch ... kv_heads page head_dim"]]:
        """Keys and values of one page of every row, or of several."""
        pages = self._grouped(pages)

        def read(held: Array) -> Array:
            of_group = lambda pool, pages: pool.at[layer, pages].get(mode="promise_in_bounds")  # noqa: E731
            found = jax.vmap(of_group, in_axes=(1, 0))(held, pages)
            return from_bits(found.reshape(-1, *found.shape[2:]), self.dtype)

        return read(self.k), read(self.v)

    def _grouped(self, of_rows: Array) -> Array:
        return of_rows.reshape(self.n_groups, -1, *of_rows.shape[1:])


# [groups row seq (layer, page, place)] into [layers groups pages heads places width]; rows that compute unheard all
# write into the same page, so that places are not unique.
_WRITE = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(3, 4),
    inserted_window_dims=(0, 2, 4),
    scatter_dims_to_operand_dims=(0, 2, 4),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)


def empty_cache(
    cfg: ModelConfig,
    n_pages: int,
    page_size: int,
    n_positions: int,
    dtype: Any,
    layout: Layout = ONE_DEVICE_LAYOUT,
) -> KVCache:
    """A cache that holds nothing, of `n_pages` pages a group, for texts of up to `n_positions` tokens.

    Groups and heads lie as `layout` says, the tables whole on every device.
    """
    sizes = cfg.axis_sizes
    shape = (cfg.n_layers, layout.sizes.batch_ways, n_pages, sizes["kv_heads"], page_size, sizes["head_dim"])
    held = layout.sharding(layout.rules.use(_POOL))
    sin, cos = rotary_tables(n_positions, cfg) if cfg.d_rotary else (np.zeros((0, 0)), np.zeros((0, 0)))
    sin, cos = (jax.device_put(table.astype(np.float32), layout.sharding()) for table in (sin, cos))
    dtype = jnp.dtype(dtype)
    stored = jnp.uint16 if dtype.itemsize == 2 and jax.default_backend() == "cpu" else dtype
    k, v = (jnp.zeros(shape, stored, device=held) for _ in range(2))
    return KVCache(k, v, sin, cos, dtype)


def key_positions(
    newest: Int[Array, " batch"], ring: int, first: Int[Array, ""] | int, n: int
) -> Int[Array, "batch places"]:
    """Position of the token in places first .. first + n - 1 of a ring once `newest` has been written.

    Negative where nothing was written.
    """
    places = first + jnp.arange(n, dtype=jnp.int32)
    return newest[:, None] - (newest[:, None] - places) % ring


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    cache: KVCache,
    layer: Int[Array, ""],
    table: Int[Array, "batch width"],
    positions: Int[Array, "batch seq"],
    relative: Float[Array, "heads buckets"] | None,
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules,
) -> Float[Array, "batch seq heads head_dim"]:
    """Attention of queries at `positions` over all that the cache holds of their rows, as `layers.attention`.

    relative: the T5 biases of every distance, None without them.
    """
    if policy.attention != "plain":
        return attend_at_once(q, cache, layer, table, positions, relative, cfg, policy, rules)
    dot = functools.partial(
        jnp.einsum,
        preferred_element_type=jnp.float32,
        precision="highest" if policy.dtype == "float32" else None,
    )
    width, size = table.shape[1], cache.page_size
    newest, window = positions[:, -1], window_of(layer, cfg)
    # The exact products of 16-bit factors, summed in float32, are those of their float32 copies, which XLA on CPU
    # multiplies faster.
    rounded = lambda a: a.astype(policy.jax_dtype).astype(jnp.float32 if cache.holds_bits else policy.jax_dtype)  # noqa: E731
    factors = rounded(q)

    def one_page(i: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, mixed = so_far
        k, v = map(rounded, cache.read(layer, jax.lax.dynamic_index_in_dim(table, i, axis=1, keepdims=False)))
        keys = key_positions(newest, width * size, i * size, size)
        scores = dot("bqhd,bhkd->bhqk", factors, k) / cfg.score_divisor + sliding_mask(positions, keys, window)
        if relative is not None:
            split = rules.use(("heads", "batch", None, None))
            scores = scores + relative_bias(relative, positions, keys, cfg.n_ctx, split)
        now = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrunk = jnp.exp(scores - now), jnp.exp(largest - now)
        total = total * shrunk + jnp.sum(weights, axis=-1, keepdims=True)
        return now, total, mixed * shrunk + dot("bhqk,bhkd->bhqd", rounded(weights), v)

    nothing = jnp.zeros_like(jnp.moveaxis(q, 1, 2))
    none = nothing[..., :1]
    n_used = jnp.minimum(jnp.max(newest) // size + 1, width)
    _, total, mixed = jax.lax.fori_loop(0, n_used, one_page, (none + MASKED, none, nothing))
    return jnp.moveaxis(mixed / total, 2, 1)


def attend_at_once(
    q: Float[Array, "batch seq heads head_dim"],
    cache: KVCache,
    layer: Int[Array, ""],
    table: Int[Array, "batch width"],
    positions: Int[Array, "batch seq"],
    relative: Float[Array, "heads buckets"] | None,
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules,
) -> Float[Array, "batch seq heads head_dim"]:
    """As `attend`, in two products over all pages of the table, used or not.

    For accelerators, where a loop of so many turns as there are pages in use stops for the host to look at each turn.
    The caller keeps the table short: `engine.programs.used_columns`.
    """
    dot = functools.partial(
        jnp.einsum,
        preferred_element_type=jnp.float32,
        precision="highest" if policy.dtype == "float32" else None,
    )
    n_places = table.shape[1] * cache.page_size
    k, v = cache.read(layer, table)
    keys = key_positions(positions[:, -1], n_places, 0, n_places)
    scores = dot("bqhd,bwhpd->bhqwp", q.astype(policy.jax_dtype), k)
    scores = scores.reshape(*scores.shape[:3], n_places) / cfg.score_divisor
    scores = scores + sliding_mask(positions, keys, window_of(layer, cfg))
    if relative is not None:
        scores = scores + relative_bias(relative, positions, keys, cfg.n_ctx, rules.use(("heads", "batch", None, None)))
    weights = jax.nn.softmax(scores, axis=-1).astype(policy.jax_dtype)
    return dot("bhqwp,bwhpd->bqhd", weights.reshape(*weights.shape[:3], -1, cache.page_size), v)
