"""The key-value cache: a ring of slots for every row, so that a text may grow past the context and slide."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.layers import rotary_tables
from mesh_transformer.shapes import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (already rotated) and values of the newest positions of every row.

    The token at position t of row b lies in slot t mod n_slots, so a ring of n_ctx slots forgets the oldest token
    with every new one. Rotary scores depend on differences of positions only: keys keep the angle of their position
    since the start of the text and are never turned again.

    k, v: [layers, batch, slots, kv_heads, head_dim] in the compute dtype. sin, cos: rotary tables over every position
    that a text may reach, [positions, half_rotary] ([0, 0] without rotary positions).
    """

    k: Array
    v: Array
    sin: Array
    cos: Array

    @property
    def n_slots(self) -> int:
        """Positions that a row can hold."""
        return self.k.shape[2]

    def write(
        self,
        layer: Int[Array, ""],
        positions: Int[Array, "batch seq"],
        k: Float[Array, "batch seq kv_heads head_dim"],
        v: Float[Array, "batch seq kv_heads head_dim"],
    ) -> KVCache:
        """The cache with the keys and values of one layer at `positions`."""
        rows = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
        slots = positions % self.n_slots
        return dataclasses.replace(
            self,
            k=self.k.at[layer, rows, slots].set(k.astype(self.k.dtype), unique_indices=True),
            v=self.v.at[layer, rows, slots].set(v.astype(self.v.dtype), unique_indices=True),
        )


def empty_cache(cfg: ModelConfig, batch: int, n_slots: int, n_positions: int, dtype: Any) -> KVCache:
    """A cache that holds nothing, for texts of up to `n_positions` tokens of which the newest `n_slots` are kept."""
    sizes = cfg.axis_sizes
    shape = (cfg.n_layers, batch, n_slots, sizes["kv_heads"], sizes["head_dim"])
    sin, cos = rotary_tables(n_positions, cfg.d_rotary) if cfg.d_rotary else (jnp.zeros((0, 0)), jnp.zeros((0, 0)))
    return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), sin=jnp.asarray(sin), cos=jnp.asarray(cos))


def key_positions(newest: Int[Array, " batch"], n_slots: int) -> Int[Array, "batch slots"]:
    """Position of the token in every slot once `newest` has been written; negative where nothing was."""
    slots = jnp.arange(n_slots, dtype=jnp.int32)
    return newest[:, None] - (newest[:, None] - slots) % n_slots
