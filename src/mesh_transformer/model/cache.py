"""The key-value cache: a ring of slots for every row, so that a text may grow past the context and slide."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.layers import rotary_tables
from mesh_transformer.shapes import Array, Float, Int
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout

# [batch seq (layer, slot)] into [layers batch slots heads width], rows to rows: because rows belong together, a mesh
# that divides them writes without sending anything, which indices of rows would not say.
_WRITE = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3),
    inserted_window_dims=(0, 2),
    scatter_dims_to_operand_dims=(0, 2),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)


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
        slots = positions % self.n_slots
        at = jnp.stack([jnp.zeros_like(slots) + layer, slots], axis=-1)

        def write(held: Array, new: Array) -> Array:
            return jax.lax.scatter(
                held, at, new.astype(held.dtype), _WRITE, unique_indices=True, mode="promise_in_bounds"
            )

        return dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))


def empty_cache(
    cfg: ModelConfig, batch: int, n_slots: int, n_positions: int, dtype: Any, layout: Layout = ONE_DEVICE_LAYOUT
) -> KVCache:
    """A cache that holds nothing, for texts of up to `n_positions` tokens of which the newest `n_slots` are kept.

    Rows and heads lie as `layout` says, the tables whole on every device.
    """
    sizes = cfg.axis_sizes
    shape = (cfg.n_layers, batch, n_slots, sizes["kv_heads"], sizes["head_dim"])
    held = layout.sharding(layout.rules.use((None, "batch", None, "kv_heads", None)))
    sin, cos = rotary_tables(n_positions, cfg.d_rotary) if cfg.d_rotary else (np.zeros((0, 0)), np.zeros((0, 0)))
    tables = (jax.device_put(table.astype(np.float32), layout.sharding()) for table in (sin, cos))
    return KVCache(jnp.zeros(shape, dtype, device=held), jnp.zeros(shape, dtype, device=held), *tables)


def key_positions(newest: Int[Array, " batch"], n_slots: int) -> Int[Array, "batch slots"]:
    """Position of the token in every slot once `newest` has been written; negative where nothing was."""
    slots = jnp.arange(n_slots, dtype=jnp.int32)
    return newest[:, None] - (newest[:, None] - slots) % n_slots
