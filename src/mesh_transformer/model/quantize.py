"""Weights in 8 bits, for inference: a quarter of float32's bytes, read and moved instead of float32's.

Quantised are the matrices that tokens are multiplied with, the head among them; tables in which rows are looked up,
norms and biases stay as stored. Every output channel of a matrix has a scale of its own, symmetric about zero:
w ~ values * scale, with scale = max |w| / 127 over the contracted axes, so that no weight is further than half a scale
from its own. Activations are not quantised. There is no training with such weights: whole numbers have no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mesh_transformer.config.checks import nearest, shown
from mesh_transformer.config.errors import UserError
from mesh_transformer.model.params import ParamSpec
from mesh_transformer.shapes import Params

# What `quantize=` may be.
QUANTIZATIONS = ("int8",)

_LARGEST = 127  # of int8, on both sides of zero; -128 is not used


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix as whole numbers and scales; stands in a parameter tree where the matrix stood.

    values: int8, in the matrix's shape. scale: float32, in the same shape with the contracted axes of size 1. Both
    keep a leading `layers` axis, so that a slice over layers slices both.
    """

    values: Any
    scale: Any


def check_quantize(name: object) -> None:
    """Refuses what is neither None nor one of `QUANTIZATIONS`.

    Raises:
        UserError: it is not known; the message lists those that are.
    """
    if name is None or name in QUANTIZATIONS:
        return
    close = nearest(name, QUANTIZATIONS) if isinstance(name, str) else None
    hint = f"; did you mean {close}?" if close else ""
    raise UserError(
        f"quantize = {shown(name)} is not known; expected {' or '.join(QUANTIZATIONS)}, or nothing, to keep the "
        f"weights as stored{hint}"
    )


def quantize(w: np.ndarray, spec: ParamSpec) -> Int8:
    """The matrix that `spec` describes, or one layer of it, in 8 bits, as NumPy arrays.

    A weight halfway between two whole numbers goes to the even one. A channel whose weights are all smaller than
    about 1.5e-36 becomes zero: its scale would be subnormal, and devices take such numbers for zero.

    Raises:
        ValueError: a weight is not finite.
    """
    wide = np.asarray(w, np.float32)
    contracted = tuple(i for i, axis in enumerate(_axes(spec, w)) if axis in spec.inputs)
    largest = np.maximum(wide.max(contracted, keepdims=True), -wide.min(contracted, keepdims=True))
    if not np.isfinite(largest).all():
        raise ValueError("a weight is not finite")
    scale = largest / np.float32(_LARGEST)
    scale[scale < np.finfo(np.float32).tiny] = 0
    whole = np.divide(wide, scale, out=np.zeros_like(wide), where=scale > 0)
    return Int8(np.rint(whole, out=whole).astype(np.int8), scale)


def map_arrays(f: Callable[[Any, tuple[str | None, ...]], Any], spec: ParamSpec, leaf: Any) -> Any:
    """`f(array, axes)` for the array of a parameter, or for both of an `Int8`; `axes` are the array's logical axes.

    A contracted axis of a scale is None: there is nothing to divide. A leaf may lack its leading `layers` axis.
    """
    if not isinstance(leaf, Int8):
        return f(leaf, _axes(spec, leaf))
    axes = _axes(spec, leaf.values)
    return Int8(f(leaf.values, axes), f(leaf.scale, tuple(None if axis in spec.inputs else axis for axis in axes)))


def is_quantized(params: Params) -> bool:
    """Whether any parameter is in 8 bits."""
    return any(isinstance(leaf, Int8) for leaf in jax.tree.leaves(params, is_leaf=lambda w: isinstance(w, Int8)))


def _axes(spec: ParamSpec, w: Any) -> tuple[str, ...]:
    return spec.axes[len(spec.axes) - w.ndim :]
