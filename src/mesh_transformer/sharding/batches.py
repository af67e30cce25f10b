"""Batches on a mesh: which rows a process reads, and how they become one global array."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mesh_transformer.sharding.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches of one shape, int32 [parts, batch / parts, width] or without `parts` [batch, width], on a layout.

    Rows are numbered through a batch in the order of the data, part after part: what a batch holds does not depend on
    the mesh.
    """

    layout: Layout
    batch_size: int
    width: int
    parts: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the global array."""
        rows = (self.batch_size,) if self.parts is None else (self.parts, self.batch_size // self.parts)
        return (*rows, self.width)

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """What a program is compiled for."""
        return jax.ShapeDtypeStruct(self.shape, np.int32, sharding=self._sharding)

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of the rows that this process holds something of, ascending."""
        n_parts, rows = self.parts or 1, self.batch_size // (self.parts or 1)
        here = self._rows_of_a_part()
        return tuple((np.arange(n_parts)[:, None] * rows + here[None, :]).reshape(-1).tolist())

    def place(self, rows: np.ndarray) -> jax.Array | np.ndarray:
        """A batch as a program takes it.

        Args:
            rows: int32 [rows here, width], those that `rows` numbers.
        """
        if self.layout.mesh is None:  # the program takes it as it is
            return rows.reshape(self.shape)
        here = self._rows_of_a_part()
        local = rows.reshape(*self.shape[:-2], len(here), self.width)

        def part(index: Any) -> np.ndarray:
            *leading, at, columns = index
            first, last, _ = at.indices(self.shape[-2])
            start = int(np.searchsorted(here, first))
            return local[(*leading, slice(start, start + last - first), columns)]

        return jax.make_array_from_callback(self.shape, self._sharding, part)

    @property
    def _sharding(self) -> Any:
        return self.layout.rows(len(self.shape) - 2)

    def _rows_of_a_part(self) -> np.ndarray:
        axis, n = len(self.shape) - 2, self.shape[-2]
        held = (index[axis].indices(n) for index in self._sharding.addressable_devices_indices_map(self.shape).values())
        return np.asarray(sorted({row for first, last, _ in held for row in range(first, last)}), np.int64)
