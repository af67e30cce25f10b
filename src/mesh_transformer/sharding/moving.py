"""Moving an array from one layout to another with the fewest bytes, forward and backward.

`jax.sharding.reshard` says what should lie where; XLA then sums whole arrays even where every device keeps a part of
the sum alone. Here such sums are reduce-scatters, and the gathering of what rests apart has one as its transpose.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec


def moved(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x` laid out as `spec` says; unsummed over no more mesh axes than `spec` says.

    An axis of `x` divided over mesh axes that `spec` marks `reduced` is gathered so that its gradient comes back as a
    reduce-scatter; one that becomes divided over mesh axes over which `x` is still unsummed is summed as one.
    """
    now = jax.typeof(x).sharding.spec
    gathered = [name for lost, _ in _changes(now, spec) for name in lost]
    scattered = [name for _, gained in _changes(now, spec) for name in gained]
    by_hand = set(scattered) <= now.unreduced and set(gathered) <= spec.reduced and (gathered or scattered)
    if not by_hand:
        return jax.sharding.reshard(x, spec)
    promised = spec.reduced - set(gathered)
    if promised != now.reduced:
        now = PartitionSpec(*now.partitions, unreduced=now.unreduced, reduced=promised)
        x = jax.sharding.reshard(x, now)
    return jax.shard_map(functools.partial(_send, now=now, spec=spec), in_specs=now, out_specs=spec)(x)


def _send(part: jax.Array, *, now: PartitionSpec, spec: PartitionSpec) -> Any:
    """What one device does, from its part of the array to its part of the result."""
    unsummed = set(now.unreduced - spec.unreduced)
    for axis, (lost, gained) in enumerate(_changes(now, spec)):
        if lost:
            part = jax.lax.all_gather(part, lost, axis=axis, tiled=True, to="reduced")
        if gained:
            part = jax.lax.psum_scatter(part, gained, scatter_dimension=axis, tiled=True)
            unsummed -= set(gained)
    return jax.lax.psum(part, tuple(sorted(unsummed))) if unsummed else part


def _changes(now: PartitionSpec, spec: PartitionSpec) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """For every axis of the array: the mesh axes that no longer divide it, and those that divide it from now on."""
    pairs = zip(map(_names, now.partitions), map(_names, spec.partitions), strict=True)
    return [(tuple(n for n in old if n not in new), tuple(n for n in new if n not in old)) for old, new in pairs]


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
