"""The gradient noise scale of McCandlish et al. 2018 (arXiv:1812.06162), appendix A.1, without bias, on any mesh.

The gradient of one sequence has a mean G and a covariance Sigma over the training data. The mean gradient of b
sequences then has an expected squared norm of |G|^2 + tr(Sigma) / b. A step that accumulates knows this norm at two
sizes: of the whole batch, and, as a mean of squares, of the parts it was summed from. Two sizes give both unknowns:

    |G|^2     = (B |g_B|^2 - b mean |g_b|^2) / (B - b)
    tr(Sigma) = (mean |g_b|^2 - |g_B|^2) / (1/b - 1/B)

B_simple = tr(Sigma) / |G|^2, in sequences: the batch beyond which a larger one buys little. One step's estimates are
very noisy and may be negative; their ratio is taken of running averages.

Where gradients stay unsummed over the devices of the batch until the end of a step, the parts are what each device has
of a microbatch, so that nothing is sent to find their norms; elsewhere they are whole microbatches. Sizes then differ
from one array to another, and as both formulas are sums over arrays, each array goes in with its own size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mesh_transformer.shapes import Array, Float

SIGNAL, TRACE = "noise_signal", "noise_trace"


# ------------------------------------------------------------------------------------------------- on the devices


def no_squares(grads: Any) -> Float[Array, "devices arrays"]:
    """Zeros to which `squares` of gradients like `grads` are added."""
    n, mesh = len(jax.tree.leaves(grads)), _mesh(grads)
    if not mesh.axis_names:
        return jnp.zeros((1, n), jnp.float32)
    return jnp.zeros((mesh.size, n), jnp.float32, out_sharding=PartitionSpec(mesh.axis_names))


def squares(grads: Any) -> Float[Array, "devices arrays"]:
    """Each device's share of the sum of squares of every array; nothing is sent.

    Of an array that is not yet summed over some devices, the squares of what each of them has are added.
    """
    leaves, mesh = jax.tree.leaves(grads), _mesh(grads)
    if not mesh.axis_names:
        return jnp.stack([jnp.sum(jnp.square(g)) for g in leaves])[None]
    specs = [jax.typeof(g).sharding.spec for g in leaves]
    copies = [mesh.size // math.prod(mesh.shape[name] for name in _names(spec)) for spec in specs]

    def of_device(parts: list[Array]) -> Array:
        return jnp.stack([jnp.sum(jnp.square(p)) / n for p, n in zip(parts, copies, strict=True)])[None]

    # Unchecked, because JAX rightly holds the square of an unsummed array for a mistake where its sum is meant.
    by_device = jax.shard_map(of_device, in_specs=(specs,), out_specs=PartitionSpec(mesh.axis_names), check_vma=False)
    return by_device(leaves)


def divisions(grads: Any) -> tuple[int, ...]:
    """Among how many devices each array waits to be summed; 1 where it is whole."""
    mesh = _mesh(grads)
    if not mesh.axis_names:
        return (1,) * len(jax.tree.leaves(grads))
    return tuple(
        math.prod(mesh.shape[name] for name in jax.typeof(g).sharding.spec.unreduced) for g in jax.tree.leaves(grads)
    )


def estimate(
    small: Float[Array, "devices arrays"], divided: Sequence[int], grads: Any, *, n_micro: int, batch_size: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """One step's estimates of |G|^2 and tr(Sigma), the latter for one sequence.

    Args:
        small: `squares` of every microbatch's mean gradient, added up.
        divided: `divisions` of those gradients.
        grads: the sum of the microbatches' mean gradients, summed over devices too.
        n_micro: microbatches, at least 2.
        batch_size: sequences of a step.
    """
    signal, trace = jnp.zeros(()), jnp.zeros(())
    totals = jnp.sum(small, axis=0)
    for total, ways, g in zip(totals, divided, jax.tree.leaves(grads), strict=True):
        # A device's part of a mean over the microbatch is 1 / ways of the mean over its own sequences.
        mean_square = ways * total / n_micro
        whole = jnp.sum(jnp.square(g)) / n_micro**2
        n_parts = ways * n_micro  # B / b
        signal += (n_parts * whole - mean_square) / (n_parts - 1)
        trace += (mean_square - whole) * batch_size / (n_parts - 1)
    return signal, trace


def _mesh(grads: Any) -> Any:
    return jax.typeof(jax.tree.leaves(grads)[0]).sharding.mesh


def _names(spec: PartitionSpec) -> set[str]:
    """Mesh axes over which what the devices hold differs."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec.partitions if entry is not None)
    return {name for entry in entries for name in entry} | set(spec.unreduced)


# ---------------------------------------------------------------------------------------------------- on the host


@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """Running averages of both estimates, unbiased from the first step on, and B_simple in sequences.

    scale is None where the averages have no positive ratio: the gradient is lost in its noise, or the other way about.
    """

    signal_average: float
    trace_average: float
    scale: float | None


class NoiseAverages:
    """Exponential averages of the estimates of all steps so far.

    They are a function of the estimates alone, so that a run that goes on makes them anew from its metrics.

    Args:
        alpha: weight of a step; that of the steps before it shrinks by 1 - alpha.
    """

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._signal = self._trace = 0.0
        self._forgotten = 1.0  # weight of the zeros that the averages began with

    def add(self, signal: float, trace: float) -> NoiseScale:
        """The averages after one more step."""
        keep = 1 - self._alpha
        self._signal = keep * self._signal + self._alpha * signal
        self._trace = keep * self._trace + self._alpha * trace
        self._forgotten *= keep
        weight = 1 - self._forgotten
        average, noise = self._signal / weight, self._trace / weight
        scale = noise / average if average > 0 and noise > 0 else None
        return NoiseScale(average, noise, scale if scale is None or math.isfinite(scale) else None)

    def add_lines(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """The same for lines of metrics.jsonl; those without estimates are passed over."""
        for line in lines:
            signal, trace = line.get(SIGNAL), line.get(TRACE)
            if signal is not None and trace is not None:
                self.add(signal, trace)
