"""Weights in 8 or 4 bits, for inference: fewer bytes read and moved than float32's.

Quantised are the matrices that tokens are multiplied with, the head among them; tables in which rows are looked up,
norms and biases stay as stored. Activations are not quantised. There is no training with such weights: whole numbers
have no gradient.

int8: every output channel of a matrix has a scale of its own, symmetric about zero: w ~ values * scale, with
scale = max |w| / 127 over the contracted axes, so that no weight is further than half a scale from its own.

int4: every group of 32 (int4) or 128 (int4-128) weights that follow one another along the last contracted axis has a
scale of its own: w ~ (value - 8) * scale with value in 0..15. How the scale is chosen: `int4.round_groups`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config.checks import nearest, shown
from mesh_transformer.config.errors import ConfigError, UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.int4 import ZERO, round_groups
from mesh_transformer.model.params import ParamSpec, is_multiplied, named_specs
from mesh_transformer.shapes import Params
from mesh_transformer.sharding.layout import Layout

# What `quantize=` may be.
QUANTIZATIONS = ("int8", "int4", "int4-128")

_LARGEST = 127  # of int8, on both sides of zero; -128 is not used
_GROUPS = {"int4": 32, "int4-128": 128}
_SMALLEST_GROUP = 4


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix as whole numbers and scales; stands in a parameter tree where the matrix stood.

    Both keep a leading `layers` axis, so that a slice over layers slices both.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that is meant."""
        raise NotImplementedError

    def widen(self, dtype: Any) -> Any:
        """The matrix that is meant, computed in float32 and rounded once to `dtype`; NumPy or JAX as the parts are."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Quantized):
    """values: int8, in the matrix's shape. scale: float32, in the same shape with the contracted axes of size 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def widen(self, dtype: Any) -> Any:
        return (self.values.astype(np.float32) * self.scale).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4(Quantized):
    """Two numbers in a byte, and a scale for every group of them.

    values: uint8, in the matrix's shape with the last contracted axis halved; byte j along it holds number 2j in its
    low four bits and 2j + 1 in its high ones. scale: float16, with that axis divided by the group's size, which is a
    multiple of 4.
    """

    @property
    def packed_axis(self) -> int:
        """The last contracted axis, counted from the front: the one in which values and scale differ."""
        (axis,) = (i for i, n in enumerate(self.values.shape) if n != self.scale.shape[i])
        return axis

    @property
    def group(self) -> int:
        """Numbers that share a scale."""
        axis = self.packed_axis
        return 2 * self.values.shape[axis] // self.scale.shape[axis]

    @property
    def shape(self) -> tuple[int, ...]:
        axis = self.packed_axis
        return tuple(2 * n if i == axis else n for i, n in enumerate(self.values.shape))

    def widen(self, dtype: Any) -> Any:
        xp: Any = np if isinstance(self.values, np.ndarray) else jnp
        axis, n_groups = self.packed_axis, self.scale.shape[self.packed_axis]
        before, after = self.values.shape[:axis], self.values.shape[axis + 1 :]
        bytes_ = self.values.reshape(*before, n_groups, self.group // 2, 1, *after)
        numbers = xp.concatenate([bytes_ & 15, bytes_ >> 4], axis + 2).astype(np.int8) - np.int8(ZERO)
        scale = self.scale.reshape(*before, n_groups, 1, 1, *after).astype(np.float32)
        return (numbers.astype(np.float32) * scale).astype(dtype).reshape(self.shape)


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
        f"quantize = {shown(name)} is not known; expected {', '.join(QUANTIZATIONS[:-1])} or {QUANTIZATIONS[-1]}, or "
        f"nothing, to keep the weights as stored{hint}"
    )


def check_model(name: str, cfg: ModelConfig) -> None:
    """Returns if the model's matrices can be so quantised.

    Raises:
        ConfigError: a matrix cannot be divided into groups; the message names it.
    """
    if name not in _GROUPS:
        return
    for path, spec in named_specs(cfg).items():
        if is_multiplied(spec):
            size = cfg.axis_sizes[spec.inputs[-1]]
            if _group(size, name) < _SMALLEST_GROUP:
                raise ConfigError(
                    f"{name} needs groups of {_SMALLEST_GROUP} weights or more, and {path} contracts "
                    f"{spec.inputs[-1]} = {size}, which is no multiple of {_SMALLEST_GROUP}; use int8"
                )


def check_layout(params: Params, cfg: ModelConfig, layout: Layout) -> None:
    """Returns if the devices divide whole groups among them.

    Raises:
        ConfigError: they would have to cut one; the message names the matrix.
    """
    for path, spec in named_specs(cfg).items():
        leaf: Any = functools.reduce(operator.getitem, path.split("/"), params)
        if isinstance(leaf, Int4):
            try:
                layout.sharding(layout.rules.param(_axes(spec, leaf.scale))).shard_shape(leaf.scale.shape)
            except ValueError as error:
                n_groups = leaf.scale.shape[leaf.packed_axis]
                raise ConfigError(
                    f"{path} has {n_groups} groups of {leaf.group} weights along {spec.inputs[-1]}, which the mesh "
                    f"({layout.sizes}) cannot divide; use int8, or a mesh with another tensor"
                ) from error


def quantize(w: np.ndarray, spec: ParamSpec, name: str = "int8") -> Quantized:
    """The matrix that `spec` describes, or one layer of it, in 8 or 4 bits, as NumPy arrays.

    Of int8, a weight halfway between two whole numbers goes to the even one. A channel whose weights are all smaller
    than about 1.5e-36 becomes zero: its scale would be subnormal, and devices take such numbers for zero.

    Raises:
        ValueError: a weight is not finite, or too large for int4 (524,000).
    """
    return _int8(w, spec) if name == "int8" else _int4(w, spec, name)


def described(name: str, spec: ParamSpec, shape: tuple[int, ...]) -> Quantized:
    """What `quantize` makes of a matrix of that shape, as `jax.ShapeDtypeStruct`."""
    axes = spec.axes[len(spec.axes) - len(shape) :]
    if name == "int8":
        channels = tuple(1 if axis in spec.inputs else n for axis, n in zip(axes, shape, strict=True))
        return Int8(jax.ShapeDtypeStruct(shape, np.int8), jax.ShapeDtypeStruct(channels, np.float32))
    axis = axes.index(spec.inputs[-1])
    group = _group(shape[axis], name)
    halved, divided = (tuple(n // by if i == axis else n for i, n in enumerate(shape)) for by in (2, group))
    return Int4(jax.ShapeDtypeStruct(halved, np.uint8), jax.ShapeDtypeStruct(divided, np.float16))


def map_arrays(f: Callable[[Any, tuple[str | None, ...]], Any], spec: ParamSpec, leaf: Any) -> Any:
    """`f(array, axes)` for the array of a parameter, or for both of a `Quantized`; `axes` are the array's logical axes.

    A contracted axis of a scale of `Int8` is None: there is nothing to divide. A leaf may lack its leading `layers`
    axis.
    """
    if not isinstance(leaf, Quantized):
        return f(leaf, _axes(spec, leaf))
    axes = _axes(spec, leaf.values)
    undivided = spec.inputs if isinstance(leaf, Int8) else ()
    return type(leaf)(f(leaf.values, axes), f(leaf.scale, tuple(None if axis in undivided else axis for axis in axes)))


def is_quantized(params: Params) -> bool:
    """Whether any parameter is in 8 or 4 bits."""
    return any(isinstance(leaf, Quantized) for leaf in jax.tree.leaves(params, is_leaf=_is_quantized))


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _int8(w: np.ndarray, spec: ParamSpec) -> Int8:
    wide = np.asarray(w, np.float32)
    contracted = tuple(i for i, axis in enumerate(_axes(spec, w)) if axis in spec.inputs)
    largest = np.maximum(wide.max(contracted, keepdims=True), -wide.min(contracted, keepdims=True))
    if not np.isfinite(largest).all():
        raise ValueError("a weight is not finite")
    scale = largest / np.float32(_LARGEST)
    scale[scale < np.finfo(np.float32).tiny] = 0
    whole = np.divide(wide, scale, out=np.zeros_like(wide), where=scale > 0)
    return Int8(np.rint(whole, out=whole).astype(np.int8), scale)


def _int4(w: np.ndarray, spec: ParamSpec, name: str) -> Int4:
    kept = described(name, spec, w.shape)
    assert isinstance(kept, Int4)
    # The contracted axes lie together and before the others, so that groups follow one another along one axis.
    n_layers = w.shape[0] if len(w.shape) == len(spec.axes) and spec.axes[0] == "layers" else 1
    n_inputs = math.prod(w.shape[: kept.packed_axis + 1]) // n_layers
    values, scale = round_groups(w.reshape(n_layers * n_inputs, -1), kept.group)
    return Int4(values.reshape(kept.values.shape), scale.reshape(kept.scale.shape))


def _group(size: int, name: str) -> int:
    return math.gcd(_GROUPS[name], size)


def _axes(spec: ParamSpec, w: Any) -> tuple[str, ...]:
    return spec.axes[len(spec.axes) - w.ndim :]
