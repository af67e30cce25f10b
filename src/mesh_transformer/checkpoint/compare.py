"""Two models side by side: which logical tensors differ, and by how much."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from mesh_transformer.checkpoint.logical import logical_piece, logical_tensors
from mesh_transformer.checkpoint.weights import Weights

_CHUNK = 1 << 22  # values compared at a time


@dataclasses.dataclass(frozen=True)
class Difference:
    """A tensor whose values are not all equal as float32; `largest` is the greatest absolute difference.

    Where the shapes differ no values are compared, and `n_values` is None.
    """

    name: str
    shape_a: tuple[int, ...] | None  # None: this model has no such tensor
    shape_b: tuple[int, ...] | None
    n_values: int | None = None
    n_different: int = 0
    largest: float = 0.0


def differences(
    a: Weights,
    b: Weights,
    names: Collection[str] | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Difference]:
    """The logical tensors that differ, in the byte order of their names.

    Values are compared as float32, bit for bit but for NaN, which equals NaN, and -0.0, which equals 0.0.

    Args:
        names: compare only these.
        progress: called with the values compared.
    """
    of_a = {tensor.name: tensor for tensor in logical_tensors(a.cfg)}
    of_b = {tensor.name: tensor for tensor in logical_tensors(b.cfg)}
    found = []
    for name in sorted(of_a.keys() | of_b.keys(), key=str.encode):
        if names is not None and name not in names:
            continue
        shape_a = of_a[name].shape if name in of_a else None
        shape_b = of_b[name].shape if name in of_b else None
        if shape_a is None or shape_b is None or shape_a != shape_b:
            found.append(Difference(name, shape_a, shape_b))
            continue
        n_values = n_different = 0
        largest = 0.0
        for piece_a, piece_b in zip(of_a[name].pieces, of_b[name].pieces, strict=True):
            values_a, values_b = logical_piece(a, piece_a).reshape(-1), logical_piece(b, piece_b).reshape(-1)
            for start in range(0, values_a.size, _CHUNK):
                part_a = values_a[start : start + _CHUNK].astype(np.float32)
                part_b = values_b[start : start + _CHUNK].astype(np.float32)
                n_values += part_a.size
                progress(part_a.size)
                different = ~((part_a == part_b) | (np.isnan(part_a) & np.isnan(part_b)))
                if different.any():
                    n_different += int(different.sum())
                    errors = np.abs(part_a[different].astype(np.float64) - part_b[different].astype(np.float64))
                    # Infinite minus infinite, or NaN against a number, is as far apart as can be.
                    largest = max(largest, float(np.nan_to_num(errors, nan=np.inf, posinf=np.inf).max()))
        if n_different:
            found.append(Difference(name, shape_a, shape_b, n_values, n_different, largest))
    return found
