"""A pipeline over the mesh axis `pipeline`: stages that hold consecutive layers, microbatches that follow one another.

The schedule is GPipe's (Huang et al. 2019): in tick t stage s works on microbatch t - s, then hands it to stage s + 1.
All stages are one array axis, so that a tick is `jax.vmap` of the same function that runs the layers without a
pipeline, and differentiation runs the schedule backwards by itself. The other mesh axes divide the work within a stage
as they do elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mesh_transformer.sharding.rules import STREAM, Rules

Stage = Callable[[Any, jax.Array], jax.Array]  # (the stage's slices of the stacked parameters, x) -> x


def run_stages(stage: Stage, stacked: Any, x: jax.Array, rules: Rules) -> jax.Array:
    """`stage` for every part of the stacked parameters in turn, microbatch after microbatch.

    Args:
        stacked: a pytree of arrays whose leading axis, the layers, is divided over the stages.
        x: [batch stream embed], lying as `rules` say; microbatch m has the rows i * rules.n_microbatches + m.

    Returns:
        The result for every row in the order of `x`, lying as `rules.after_stages` say.
    """
    n_stages, n_micro = rules.n_stages, rules.n_microbatches
    batch, *rest = x.shape
    spec = rules.use(STREAM)
    assert spec is not None and batch % n_micro == 0 and n_micro % n_stages == 0
    one_each = PartitionSpec("pipeline", *spec)  # [stages batch stream embed]
    rows = (batch // n_micro, n_micro)
    by_row = jax.lax.reshape(x, (*rows, *rest), out_sharding=PartitionSpec(spec[0], None, *spec[1:]))
    micro = jnp.moveaxis(by_row, 1, 0)
    slices = jax.tree.map(lambda w: _by_stage(w, n_stages), stacked)
    first = jax.sharding.reshard((jnp.arange(n_stages) == 0).reshape(n_stages, 1, 1, 1), PartitionSpec("pipeline"))
    # Every stage has all microbatches, so that their gradients, the first stage's, are sent to all once a step.
    to_all = jax.shard_map(
        lambda m: m[None], in_specs=PartitionSpec(None, *spec), out_specs=PartitionSpec("pipeline", None, *spec)
    )
    entering = to_all(micro)

    def to_next(state: jax.Array) -> jax.Array:
        return jax.lax.ppermute(state, "pipeline", [(s, s + 1) for s in range(n_stages - 1)])

    to_next = jax.shard_map(to_next, in_specs=one_each, out_specs=one_each)

    def tick(state: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        fresh = jax.lax.dynamic_index_in_dim(entering, jnp.minimum(t, n_micro - 1), 1, keepdims=False)
        done = jax.vmap(stage)(slices, jnp.where(first, fresh, state))
        return to_next(done), done

    nothing = jnp.zeros((n_stages, *micro.shape[1:]), x.dtype, out_sharding=one_each)
    _, done = jax.lax.scan(tick, nothing, jnp.arange(n_micro + n_stages - 1, dtype=jnp.int32))

    def spread(done: jax.Array) -> jax.Array:
        """Each stage's share of what the last one has finished: [microbatches / stages, batch, stream, embed]."""
        finished, share = done[n_stages - 1 :, 0], n_micro // n_stages
        parts = (finished[s * share : (s + 1) * share] for s in range(n_stages))
        return sum(jax.lax.ppermute(part, "pipeline", [(n_stages - 1, s)]) for s, part in enumerate(parts))

    shares = jax.shard_map(spread, in_specs=PartitionSpec(None, *one_each), out_specs=one_each)(done)
    return jax.lax.reshape(jnp.moveaxis(shares, 0, 1), x.shape, out_sharding=rules.after_stages.use(STREAM))


def _by_stage(w: jax.Array, n_stages: int) -> jax.Array:
    """[layers ...] as [stages, layers of a stage, ...]; nothing moves."""
    shape = (n_stages, w.shape[0] // n_stages, *w.shape[1:])
    spec = jax.typeof(w).sharding.spec
    stages, *others = spec.partitions
    return jax.lax.reshape(w, shape, out_sharding=PartitionSpec(stages, None, *others, reduced=spec.reduced))
