"""A pipeline over the mesh axis `pipeline`: stages that hold layers, microbatches that follow one another.

The schedule is GPipe's (Huang et al. 2019), or its interleaved form (Narayanan et al. 2021, section 2.2): every stage
has `n_rounds` parts of the layers, part r n_stages + s is on stage s, and a microbatch goes round that often. In tick t
stage s works on item t - s; of each n_stages microbatches come all items of round 0, then of round 1, so that what the
last stage hands to the first is what that one needs next. All stages are one array axis: a tick is `jax.vmap` of the
same function that runs the layers without a pipeline, and differentiation runs the schedule backwards by itself. The
other mesh axes divide the work within a stage as they do elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mesh_transformer.sharding.rules import STREAM, Rules

Stage = Callable[[Any, jax.Array], jax.Array]  # (slices of the stacked parameters, x) -> x


def run_stages(stage: Stage, stacked: Any, x: jax.Array, rules: Rules) -> jax.Array:
    """`stage` for every part of the stacked parameters in turn, microbatch after microbatch.

    Args:
        stacked: a pytree of arrays whose leading axis, the layers, is divided over the stages.
        x: [batch stream embed], lying as `rules` say; microbatch m has the rows i * rules.n_microbatches + m.

    Returns:
        The result for every row in the order of `x`, lying as `rules.after_stages` say.
    """
    n_stages, n_rounds, n_micro = rules.n_stages, rules.n_rounds, rules.n_microbatches
    batch, *rest = x.shape
    spec = rules.use(STREAM)
    assert spec is not None and batch % n_micro == 0 and n_micro % n_stages == 0
    one_each = PartitionSpec("pipeline", *spec)  # [stages batch stream embed]
    rows = (batch // n_micro, n_micro)
    by_row = jax.lax.reshape(x, (*rows, *rest), out_sharding=PartitionSpec(spec[0], None, *spec[1:]))
    # Every stage has all microbatches, so that their gradients, the first stage's, are sent to all once a step.
    to_all = jax.shard_map(
        lambda m: m[None], in_specs=PartitionSpec(None, *spec), out_specs=PartitionSpec("pipeline", None, *spec)
    )
    entering = to_all(jnp.moveaxis(by_row, 1, 0))
    parts = jax.tree.map(functools.partial(_dealt, n_stages=n_stages, n_rounds=n_rounds), stacked)
    number = jax.sharding.reshard(jnp.arange(n_stages, dtype=jnp.int32), PartitionSpec("pipeline"))

    def hand_on(done: jax.Array) -> jax.Array:
        ring = [(s, (s + 1) % n_stages) for s in range(n_stages if n_rounds > 1 else n_stages - 1)]
        return jax.lax.ppermute(done, "pipeline", ring)

    hand_on = jax.shard_map(hand_on, in_specs=one_each, out_specs=one_each)

    def work(part: Any, turn: jax.Array, x: jax.Array) -> jax.Array:
        """What one stage does in one tick, in its round `turn`."""
        chosen = (lambda w: w[0]) if n_rounds == 1 else (lambda w: jax.lax.dynamic_index_in_dim(w, turn, 0, False))
        return stage(jax.tree.map(chosen, part), x)

    def tick(state: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        turn = jnp.maximum(t - number, 0) % (n_stages * n_rounds) // n_stages
        item = jnp.minimum(t, n_micro * n_rounds - 1)
        entered = item // (n_stages * n_rounds) * n_stages + item % n_stages
        fresh = jax.lax.dynamic_index_in_dim(entering, entered, 1, keepdims=False)
        enters = ((number == 0) & (turn == 0)).reshape(n_stages, 1, 1, 1)
        done = jax.vmap(work)(parts, turn, jnp.where(enters, fresh, state))
        return hand_on(done), done

    nothing = jnp.zeros((n_stages, rows[0], *rest), x.dtype, out_sharding=one_each)
    n_ticks = n_micro * n_rounds + n_stages - 1
    _, done = jax.lax.scan(tick, nothing, jnp.arange(n_ticks, dtype=jnp.int32))
    # The tick in which the last stage finishes each microbatch.
    group, place = np.divmod(np.arange(n_micro), n_stages)
    finished_in = (group * n_rounds + n_rounds - 1) * n_stages + place + n_stages - 1

    def spread(done: jax.Array) -> jax.Array:
        """Each stage's share of what the last one has finished: [microbatches / stages, batch, stream, embed]."""
        finished = done[n_stages - 1 :, 0] if n_rounds == 1 else done[finished_in, 0]
        share = n_micro // n_stages
        shares = (finished[s * share : (s + 1) * share] for s in range(n_stages))
        return sum(jax.lax.ppermute(part, "pipeline", [(n_stages - 1, s)]) for s, part in enumerate(shares))

    shares = jax.shard_map(spread, in_specs=PartitionSpec(None, *one_each), out_specs=one_each)(done)
    return jax.lax.reshape(jnp.moveaxis(shares, 0, 1), x.shape, out_sharding=rules.after_stages.use(STREAM))


def _dealt(w: jax.Array, *, n_stages: int, n_rounds: int) -> jax.Array:
    """[layers ...] as [stages, rounds, layers of a part, ...].

    At rest a stage holds neighbouring layers. With one round nothing moves; with more, parts go to the stages that work
    on them, once in the forward pass and, as gradients, once in the backward pass.
    """
    spec = jax.typeof(w).sharding.spec
    stages, *others = spec
    dealt = PartitionSpec(stages, None, None, *others)
    shape = (n_stages, n_rounds, w.shape[0] // n_stages // n_rounds, *w.shape[1:])
    if n_rounds == 1:
        return jax.lax.reshape(w, shape, out_sharding=dealt)

    def deal(held: jax.Array) -> jax.Array:
        held = held.reshape(shape[1:2] + (-1,) + held.shape[1:])
        received = [jnp.zeros_like(held[0])] * n_rounds
        for own in range(n_rounds):
            # Of part c = s n_rounds + own on stage s: stage c % n_stages works on it in round c // n_stages.
            part = np.arange(n_stages) * n_rounds + own
            for turn in range(n_rounds):
                sent = [(int(s), int(part[s] % n_stages)) for s in np.flatnonzero(part // n_stages == turn)]
                received[turn] += jax.lax.ppermute(held[own], "pipeline", sent)
        return jnp.stack(received)[None]

    return jax.shard_map(deal, in_specs=spec, out_specs=dealt)(w)
