"""The optimizer chain and its schedule. Formulas and order: docs/formats.md, section 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import TrainConfig
from mesh_transformer.config.tuning import LoraConfig
from mesh_transformer.model.params import decay_mask
from mesh_transformer.shapes import Array, Params


def learning_rate_schedule(train: TrainConfig) -> Callable[[Any], Array]:
    """Learning rate of the update with a given count, the first being 0.

    Linear from 0 to the peak over `warmup_steps`, half a cosine down to the end rate over `anneal_steps`, constant
    after. Zero steps of either leave it out: no warm-up starts at the peak, no anneal stays there.
    """
    peak, end = train.learning_rate, train.end_learning_rate
    warmup, anneal = train.warmup_steps, train.anneal_steps

    def rate(count: Any) -> Array:
        n = jnp.asarray(count, jnp.float32)
        risen = jnp.clip(n, 0, warmup) / warmup if warmup else jnp.ones_like(n)
        fallen = jnp.clip(n - warmup, 0, anneal) / anneal if anneal else jnp.zeros_like(n)
        return peak * risen - (peak - end) * (1 - jnp.cos(jnp.pi * fallen)) / 2

    return rate


def make_optimizer(
    train: TrainConfig, cfg: ModelConfig, lora: LoraConfig | None = None
) -> optax.GradientTransformation:
    """Updates from the sum of `gradient_accumulation` microbatch gradients.

    In the original's order: mean over microbatches, clip by global norm, Adam, decoupled decay of matrices and tables,
    minus, learning rate. With `lora` its parameters are the adapter's, matrices all.
    """
    return optax.chain(
        optax.scale(1 / train.gradient_accumulation),
        optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity(),
        keep_state_in(jnp.dtype(train.moment_dtype), optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)),
        optax.add_decayed_weights(train.weight_decay, mask=None if lora else decay_mask(cfg)),
        optax.scale(-1),
        optax.scale_by_schedule(learning_rate_schedule(train)),
    )


def with_optimizer_state(opt_state: Any, mu: Params, nu: Params, adam_count: Any, schedule_count: Any) -> Any:
    """A state of `make_optimizer`'s chain, or its shapes, with these moments and counts in their places."""
    trees, counts = iter((mu, nu)), iter((adam_count, schedule_count))
    return map_optimizer_state(opt_state, lambda _: next(trees), lambda _: next(counts))


def moments_of(opt_state: Any) -> tuple[Params, Params]:
    """mu and nu of a state of `make_optimizer`'s chain."""
    (adam,) = (part for part in opt_state if isinstance(part, optax.ScaleByAdamState))
    return adam.mu, adam.nu


def map_optimizer_state(opt_state: Any, moments: Callable[[Params], Params], count: Callable[[Any], Any]) -> Any:
    """A state of `make_optimizer`'s chain: `moments` of mu, then of nu; `count` of Adam's, then of the schedule's."""

    def changed(part: Any) -> Any:
        if isinstance(part, optax.ScaleByAdamState):
            return part._replace(count=count(part.count), mu=moments(part.mu), nu=moments(part.nu))
        if isinstance(part, optax.ScaleByScheduleState):
            return part._replace(count=count(part.count))
        return part

    return tuple(changed(part) for part in opt_state)


def keep_state_in(dtype: Any, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` computed in float32 while its floating-point state rests in `dtype`."""

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(to) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
