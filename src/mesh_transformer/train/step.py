"""One optimizer step and one validation step, as pure functions to be compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import TrainConfig
from mesh_transformer.config.tuning import LoraConfig
from mesh_transformer.model.decoder import waits
from mesh_transformer.model.lora import is_adapted, map_parts, map_specs, trained, with_trained
from mesh_transformer.model.loss import learned, loss_report
from mesh_transformer.model.params import ParamSpec, map_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.shapes import Array, Float, Int, Params
from mesh_transformer.sharding.rules import ONE_DEVICE, Rules
from mesh_transformer.train import noise_scale
from mesh_transformer.train.optimizer import learning_rate_schedule, make_optimizer
from mesh_transformer.train.state import TrainState, trained_table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepReport:
    """Scalars of one step, float32; losses are means over the whole batch, in nats a token.

    loss: plain cross-entropy. total_loss: with z_loss, what was lowered. grad_norm: of the mean gradient, before
    clipping. learning_rate: the one that this update used. noise_signal, noise_trace: estimates of |G|^2 and tr(Sigma)
    for the gradient noise scale (train/noise_scale.py); None without accumulation.
    """

    loss: Array
    last_loss: Array
    z_loss: Array
    total_loss: Array
    grad_norm: Array
    learning_rate: Array
    noise_signal: Array | None = None
    noise_trace: Array | None = None


def make_train_step(
    model: ModelConfig,
    train: TrainConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
    *,
    lora: LoraConfig | None = None,
    separator: int | None = None,
) -> Callable[[TrainState, Int[Array, "accumulation batch seq_plus_one"]], tuple[TrainState, StepReport]]:
    """The function (state, rows of T + 1 ids) -> (next state, report).

    The state rests as `rules.param` and `rules.moment` say, before and after; rows lie over the batch's devices.
    lora: what the state's parameters are adapted with, if they are; the base then comes out as it went in.
    separator: the id that begins documents which see nothing before it; None: a row is one text.
    """
    optimizer = make_optimizer(train, model, lora)
    table = trained_table(model, lora)
    schedule = learning_rate_schedule(train)
    n_micro = train.gradient_accumulation
    at_once = rules.gathered if rules.gather == "per_step" else rules

    how: dict[str, Any] = {"z_loss": train.z_loss, "z_loss_kind": train.z_loss_kind, "separator": separator}

    def loss(own: Params, params: Params, rows: Array, n_learned: Array) -> tuple[Array, Array]:
        whole = with_trained(params, own)
        report = loss_report(whole, rows, model, policy, at_once, n_learned=n_learned, **how)
        return report.total, jnp.stack([report.loss, report.last, report.z_loss, report.total])

    def gradient(params: Params, rows: Array, n_learned: Array) -> tuple[Params, Array]:
        (_, scalars), grads = jax.value_and_grad(loss, has_aux=True)(trained(params), params, rows, n_learned)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), scalars

    def summed_gradient(params: Params, rows: Array) -> tuple[Params, Array, Array | None]:
        """Sums over the microbatches of gradient, scalars and, where there are several, squares of the gradient."""
        # A microbatch's share of the targets, so that each counts alike wherever it stands.
        n_learned = jnp.maximum(learned(rows), 1) / n_micro
        if n_micro == 1:
            return (*gradient(params, rows[0], n_learned), None)

        def add(sums: Any, part: Array) -> tuple[Any, None]:
            grads, scalars = gradient(params, part, n_learned)
            return jax.tree.map(jnp.add, sums, (grads, scalars, noise_scale.squares(grads))), None

        # Sums are kept in float32: adding many small gradients in bfloat16 would lose most of them.
        zeros = jax.tree.map(_zero_gradient, trained(params))
        return jax.lax.scan(add, (zeros, jnp.zeros(4), noise_scale.no_squares(zeros)), rows)[0]

    def step(state: TrainState, rows: Array) -> tuple[TrainState, StepReport]:
        grads, scalars, squares = summed_gradient(_in_use(state.params, model, rules), rows)
        divided = noise_scale.divisions(grads)
        # Gradients that were left unsummed over the batch's devices are summed here, once a step.
        grads = map_specs(lambda s, g: rules.after_stages.place_moment(g, s.axes), table, grads)
        # Every device updates the part whose moments it holds; what rests whole is then brought together again.
        part = map_specs(lambda s, w: rules.place_moment(w, s.axes), table, trained(state.params))
        updates, opt_state = optimizer.update(grads, state.opt_state, part)
        updated = optax.apply_updates(part, updates)
        loss, last, z, total = scalars / n_micro
        noise: tuple[Array, Array] | tuple[None, None] = (None, None)
        if squares is not None:
            noise = noise_scale.estimate(squares, divided, grads, n_micro=n_micro, batch_size=train.batch_size)
        report = StepReport(
            loss=loss,
            last_loss=last,
            z_loss=z,
            total_loss=total,
            grad_norm=optax.tree.norm(grads) / n_micro,
            learning_rate=schedule(schedule_count(state.opt_state)),
            noise_signal=noise[0],
            noise_trace=noise[1],
        )
        own = map_specs(lambda s, w: rules.place_param(w, s.axes), table, updated)
        params = with_trained(state.params, own)
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), report

    return step


def _in_use(params: Params, model: ModelConfig, rules: Rules) -> Params:
    """Parameters as a step's passes take them: brought together beforehand where that is done once a step."""
    if is_adapted(params):
        # The base has no gradient, and those of A and B are small: they are summed in every microbatch.
        if rules.gather != "per_step":
            return params
        return map_table(lambda s, leaf: map_parts(rules.place, s, leaf), model, params)

    def one(spec: ParamSpec, w: Array) -> Array:
        if rules.gather == "per_step":
            return rules.place_weight(w, spec.axes) if waits(spec, w) else rules.place(w, spec.axes)
        if not waits(spec, w):
            return w
        # The head is used behind the stages, by all of which its gradient is then summed.
        where = rules if "layers" in spec.axes else rules.after_stages
        return where.place_waiting(w, spec.axes)

    return map_table(one, model, params)


def _zero_gradient(w: Array) -> Array:
    """Zeros in float32, lying as the gradient of `w` does."""
    if not jax.typeof(w).sharding.mesh.axis_names:
        return jnp.zeros(w.shape, jnp.float32)
    spec = jax.typeof(w).sharding.spec
    return jnp.zeros(w.shape, jnp.float32, out_sharding=PartitionSpec(*spec.partitions, unreduced=spec.reduced))


def schedule_count(opt_state: Any) -> Int[Array, ""]:
    """Updates that the learning rate schedule has seen; the last member of the chain keeps it."""
    return opt_state[-1].count


def make_validation_step(
    model: ModelConfig, policy: ComputePolicy, rules: Rules = ONE_DEVICE, *, separator: int | None = None
) -> Callable[[Params, Int[Array, "batch seq_plus_one"]], tuple[Float[Array, ""], Int[Array, ""]]]:
    """The function (parameters, rows) -> mean cross-entropy in nats a token, no z term, and of how many tokens."""

    def step(params: Params, rows: Array) -> tuple[Array, Array]:
        return loss_report(params, rows, model, policy, rules, separator=separator).loss, learned(rows)

    return step
