"""Bytes of parameters, gradients and moments on one device of a mesh: from shapes and rules, without devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from jax.sharding import PartitionSpec

from mesh_transformer.sharding.mesh import Sizes
from mesh_transformer.sharding.rules import Axes, Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes on one device.

    params, moments: what rests between two steps. gradients: what the optimizer is fed, float32; it exists within a
    step only.
    """

    params: int
    gradients: int
    moments: int


def state_bytes(
    parameters: Iterable[tuple[Axes, tuple[int, ...]]],
    rules: Rules,
    sizes: Sizes,
    *,
    param_itemsize: int = 4,
    moment_itemsize: int = 4,
) -> StateBytes:
    """The state of a model on each device of a mesh; every device holds as much as every other.

    Args:
        parameters: of each one its logical axes and its whole shape.
        param_itemsize: bytes of a value of a parameter.
        moment_itemsize: bytes of a value of a moment, of which Adam has two.
    """
    params = moments = 0
    for axes, shape in parameters:
        params += _values_held(shape, rules.param(axes), sizes)
        moments += _values_held(shape, rules.moment(axes), sizes)
    return StateBytes(params=param_itemsize * params, gradients=4 * moments, moments=2 * moment_itemsize * moments)


def _values_held(shape: tuple[int, ...], spec: PartitionSpec | None, sizes: Sizes) -> int:
    return math.prod(shape) // ways_of(spec, sizes)


def ways_of(spec: PartitionSpec | None, sizes: Sizes) -> int:
    """Into how many parts an array that lies so is divided."""
    names = [name for entry in spec or () for name in ((entry,) if isinstance(entry, str) else entry or ())]
    return math.prod(getattr(sizes, name) for name in names)
