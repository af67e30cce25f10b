"""The optimizer against an independent float64 implementation, and the training step around it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_optimizer as reference

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import TrainConfig
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import abstract_params, path_name
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.train.optimizer import learning_rate_schedule, make_optimizer
from mesh_transformer.train.state import TrainState, initial_state
from mesh_transformer.train.step import make_train_step, make_validation_step

MODEL = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_ff=24, n_vocab=31, n_ctx=12, d_rotary=4)
POLICY = ComputePolicy(dtype="float32")
ROWS = np.random.default_rng(8).integers(0, MODEL.n_vocab, (8, 13)).astype(np.int32)
# A rate at which five updates move parameters by some hundredths of their size: enough to see a wrong update, and
# little enough for the bias corrections, which optax forms in float32 (1 - 0.999^n to about 1e-5 for small n).
SETTINGS = reference.Settings(peak=0.04, end=0.008, warmup=4, anneal=10)


def train_config(s: reference.Settings, **fields: Any) -> TrainConfig:
    return TrainConfig(
        steps=100, batch_size=8, gradient_accumulation=s.accumulation, learning_rate=s.peak, end_learning_rate=s.end,
        warmup_steps=s.warmup, anneal_steps=s.anneal, weight_decay=s.decay, clip_norm=s.clip, **fields,
    )  # fmt: skip


def flat(tree: Any) -> reference.Arrays:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): np.asarray(leaf).astype(np.float64) for path, leaf in leaves}


def tree_like(shapes: Any, values: reference.Arrays, dtype: Any = jnp.float32) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(values[path_name(path)], dtype), shapes)


def with_state(opt_state: Any, mu: Any, nu: Any, adam_count: int, schedule_count: int) -> Any:
    """The chain's state with other moments and counters."""

    def changed(part: Any) -> Any:
        if isinstance(part, optax.ScaleByAdamState):
            return part._replace(count=jnp.int32(adam_count), mu=mu, nu=nu)
        if isinstance(part, optax.ScaleByScheduleState):
            return part._replace(count=jnp.int32(schedule_count))
        return part

    return tuple(changed(part) for part in opt_state)


def adam_of(opt_state: Any) -> optax.ScaleByAdamState:
    return next(part for part in opt_state if isinstance(part, optax.ScaleByAdamState))


def schedule_count_of(opt_state: Any) -> int:
    return int(next(part for part in opt_state if isinstance(part, optax.ScaleByScheduleState)).count)


def starting_point(cfg: ModelConfig, seed: int = 0) -> tuple[Any, reference.State]:
    """Random parameters and moments, and counters that have moved, each by its own number."""
    random = np.random.default_rng(seed)
    shapes = abstract_params(cfg)
    names = flat(jax.tree.map(lambda s: np.zeros(s.shape), shapes))

    def values(draw: Any) -> reference.Arrays:
        return {name: np.float32(draw(a.shape)).astype(np.float64) for name, a in names.items()}

    state = reference.State(
        params=values(lambda shape: 0.5 * random.standard_normal(shape)),
        mu=values(lambda shape: 0.02 * random.standard_normal(shape)),
        nu=values(lambda shape: random.uniform(0.02, 0.04, shape) ** 2),
        adam_count=6,
        schedule_count=2,
    )
    # One tensor whose second moment is so small that the place of epsilon shows.
    state.mu["head/b"][:], state.nu["head/b"][:] = np.float32(2e-9), np.float32(2e-17)
    return shapes, state


def random_gradients(names: reference.Arrays, seed: int) -> reference.Arrays:
    random = np.random.default_rng(seed)
    sizes = {name: 1e-8 if name == "head/b" else 0.3 for name in names}
    return {name: (sizes[name] * random.standard_normal(a.shape)).astype(np.float32) for name, a in names.items()}


def furthest(ours: reference.Arrays, theirs: reference.Arrays) -> float:
    """Over all tensors, the largest difference relative to the tensor's largest value."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - b).max() / np.abs(b).max()) for name, b in theirs.items())


def five_updates(cfg: ModelConfig, s: reference.Settings) -> reference.State:
    """By the package, of random gradients."""
    shapes, start = starting_point(cfg)
    optimizer = make_optimizer(train_config(s), cfg)
    params = tree_like(shapes, start.params)
    moments = tree_like(shapes, start.mu), tree_like(shapes, start.nu)
    opt_state = with_state(optimizer.init(params), *moments, start.adam_count, start.schedule_count)

    @jax.jit
    def update(params: Any, opt_state: Any, gradients: Any) -> Any:
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(5):
        params, opt_state = update(params, opt_state, tree_like(shapes, random_gradients(start.params, i)))
    adam = adam_of(opt_state)
    return reference.State(flat(params), flat(adam.mu), flat(adam.nu), int(adam.count), schedule_count_of(opt_state))


def five_reference_updates(cfg: ModelConfig, s: reference.Settings) -> reference.State:
    _, state = starting_point(cfg)
    for i in range(5):
        gradients = random_gradients(state.params, i)
        assert reference.global_norm(gradients) / s.accumulation > 1  # so that clipping acts
        state = reference.step(state, gradients, s)
    return state


def difference(a: reference.State, b: reference.State) -> float:
    return max(furthest(a.params, b.params), furthest(a.mu, b.mu), furthest(a.nu, b.nu))


@pytest.mark.parametrize(("position", "accumulation"), [("rotary", 1), ("fixed", 4), ("t5", 1)])
def test_five_updates_from_moments_that_are_not_zero(position: Any, accumulation: int) -> None:
    cfg = dataclasses.replace(MODEL, position=position, d_rotary=4 if position == "rotary" else 0)
    s = dataclasses.replace(SETTINGS, accumulation=accumulation)
    ours, theirs = five_updates(cfg, s), five_reference_updates(cfg, s)
    assert difference(ours, theirs) <= 1e-6
    assert (ours.adam_count, ours.schedule_count) == (theirs.adam_count, theirs.schedule_count) == (11, 7)


@pytest.mark.parametrize(
    "changed",
    [{"decay": 0.0}, {"clip": 1.01}, {"b1": 0.901}, {"b2": 0.9991}, {"eps": 2e-8}, {"accumulation": 2}, {"anneal": 11}],
    ids=str,
)
def test_the_comparison_notices_another_setting(changed: dict[str, Any], ours_by_default) -> None:
    settings = dataclasses.replace(SETTINGS, **changed)
    if "accumulation" in changed:  # above the clip norm, a factor does nothing: so it should
        assert difference(ours_by_default, five_reference_updates(MODEL, settings)) <= 1e-6
        settings = dataclasses.replace(settings, clip=1000.0)
    assert difference(ours_by_default, five_reference_updates(MODEL, settings)) > 1e-4


@pytest.fixture(scope="module")
def ours_by_default() -> reference.State:
    return five_updates(MODEL, SETTINGS)


def test_a_gradient_below_the_clip_norm_is_left_alone() -> None:
    s = dataclasses.replace(SETTINGS, clip=1000.0, accumulation=4)
    assert difference(five_updates(MODEL, s), five_reference_updates(MODEL, s)) <= 1e-6


# ------------------------------------------------------------------------------------------------ schedule


def test_the_schedule_of_gpt_j() -> None:
    train = TrainConfig(
        steps=350_000, learning_rate=1.2e-4, end_learning_rate=1.2e-5, warmup_steps=3000, anneal_steps=300_000
    )
    rate = learning_rate_schedule(train)
    expected = {0: 0.0, 1500: 6e-5, 3000: 1.2e-4, 153_000: 6.6e-5, 303_000: 1.2e-5, 349_999: 1.2e-5}
    for count, value in expected.items():
        assert float(rate(count)) == pytest.approx(value, rel=1e-6, abs=0), count
    s = reference.Settings(peak=1.2e-4, end=1.2e-5, warmup=3000, anneal=300_000)
    for count in (1, 2999, 3001, 10_000, 200_000, 302_999):
        assert float(rate(jnp.int32(count))) == pytest.approx(reference.rate(count, s), rel=2e-6), count


@pytest.mark.parametrize(
    ("warmup", "anneal", "expected"),
    [
        (0, 10, {0: 1.0, 5: 0.6, 10: 0.2, 11: 0.2}),
        (4, 0, {0: 0.0, 1: 0.25, 4: 1.0, 100: 1.0}),
        (0, 0, {0: 1.0, 1: 1.0, 100: 1.0}),
    ],
)
def test_a_schedule_without_a_part(warmup: int, anneal: int, expected: dict[int, float]) -> None:
    rate = learning_rate_schedule(
        TrainConfig(steps=20, learning_rate=1.0, end_learning_rate=0.2, warmup_steps=warmup, anneal_steps=anneal)
    )
    for count, value in expected.items():
        assert float(rate(count)) == pytest.approx(value, rel=1e-6), count


# ------------------------------------------------------------------------------------------------ the step

WHOLE = train_config(SETTINGS, z_loss=0.01, z_loss_kind="legacy")
FORMS = {
    "whole": WHOLE,
    "in four parts": dataclasses.replace(WHOLE, gradient_accumulation=4),
    "all in bfloat16": dataclasses.replace(WHOLE, param_dtype="bfloat16", moment_dtype="bf16", gradient_accumulation=2),
}


def in_parts(train: TrainConfig) -> jax.Array:
    """ROWS as a step takes them: [accumulation, batch / accumulation, T + 1]."""
    return jnp.asarray(ROWS).reshape(train.gradient_accumulation, -1, ROWS.shape[1])


class Step:
    """A compiled training step that counts how often it is traced; one for each of FORMS."""

    def __init__(self, train: TrainConfig) -> None:
        self.train, self.traces = train, 0
        step = make_train_step(MODEL, train, POLICY)

        def counted(state: TrainState, rows: jax.Array) -> Any:
            self.traces += 1
            return step(state, rows)

        self._compiled = jax.jit(counted)

    def __call__(self, state: TrainState) -> tuple[TrainState, Any]:
        return self._compiled(state, in_parts(self.train))


@functools.cache
def step_of(form: str) -> Step:
    return Step(FORMS[form])


@functools.cache
def stepped(form: str) -> tuple[TrainState, Any]:
    """One step from `state_of`."""
    return step_of(form)(state_of(FORMS[form]))


def state_of(train: TrainConfig) -> TrainState:
    """Step 41 of a run: moments and counters as in `starting_point`, in the run's dtypes."""
    shapes, start = starting_point(MODEL, seed=3)
    params = tree_like(shapes, start.params, train.param_dtype)
    moments = (tree_like(shapes, m, train.moment_dtype) for m in (start.mu, start.nu))
    opt_state = with_state(make_optimizer(train, MODEL).init(params), *moments, start.adam_count, start.schedule_count)
    key = jax.random.key_data(jax.random.key(0))
    return TrainState(step=jnp.int32(41), params=params, opt_state=opt_state, key=key)


def test_a_step_is_the_gradient_and_the_optimizer() -> None:
    state, report = stepped("whole")
    _, start = starting_point(MODEL, seed=3)

    def both(params: Any) -> Any:
        scores = loss_report(params, jnp.asarray(ROWS), MODEL, POLICY, z_loss=0.01, z_loss_kind="legacy")
        return scores.total, scores

    gradients, scores = jax.jit(jax.grad(both, has_aux=True))(state_of(WHOLE).params)
    after = reference.step(start, flat(gradients), SETTINGS)
    adam = adam_of(state.opt_state)
    assert furthest(flat(adam.mu), after.mu) <= 1e-6
    assert furthest(flat(adam.nu), after.nu) <= 1e-6
    assert furthest(flat(state.params), after.params) <= 1e-6
    assert (int(state.step), int(adam.count), schedule_count_of(state.opt_state)) == (42, 7, 3)
    assert {a.dtype for a in jax.tree.leaves(report)} == {jnp.dtype("float32")}
    assert float(report.loss) == pytest.approx(float(scores.loss), rel=1e-6)
    assert float(report.last_loss) == pytest.approx(float(scores.last), rel=1e-6)
    assert float(report.z_loss) == pytest.approx(float(scores.z_loss), rel=1e-6)
    assert float(report.total_loss) == pytest.approx(float(scores.loss + scores.z_loss), rel=1e-6)
    assert float(report.grad_norm) == pytest.approx(reference.global_norm(flat(gradients)), rel=1e-6)
    assert float(report.grad_norm) > 1
    assert float(report.learning_rate) == pytest.approx(reference.rate(2, SETTINGS), rel=1e-6)


def test_accumulation_changes_nothing() -> None:
    (state, report), (whole, whole_report) = stepped("in four parts"), stepped("whole")
    adam, whole_adam = adam_of(state.opt_state), adam_of(whole.opt_state)
    for ours, theirs in ((state.params, whole.params), (adam.mu, whole_adam.mu), (adam.nu, whole_adam.nu)):
        assert furthest(flat(ours), flat(theirs)) <= 1e-6
    for name, value in vars(whole_report).items():
        if value is not None:  # the noise of the gradient is known from several parts alone
            assert float(getattr(report, name)) == pytest.approx(float(value), rel=1e-6)


def test_the_first_step_moves_moments_and_counters_only() -> None:
    before = initial_state(MODEL, WHOLE, 0)
    after, report = step_of("whole")(before)
    assert float(report.learning_rate) == 0
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(before.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.abs(m).max() == 0 for m in jax.tree.leaves(adam_of(before.opt_state)[1:]))
    assert all(np.abs(m).max() > 0 for m in jax.tree.leaves(adam_of(after.opt_state)[1:]))
    assert (int(after.step), int(adam_of(after.opt_state).count), schedule_count_of(after.opt_state)) == (1, 1, 1)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moment_dtype", ["float32", "bf16"])
def test_states_rest_in_their_dtypes(param_dtype: str, moment_dtype: str) -> None:
    train = dataclasses.replace(WHOLE, param_dtype=param_dtype, moment_dtype=moment_dtype)
    first = jax.eval_shape(lambda: initial_state(MODEL, train, 0))
    step = make_train_step(MODEL, train, POLICY)
    second = jax.eval_shape(lambda state, rows: step(state, rows)[0], first, in_parts(train))
    for state in (first, second):
        adam = adam_of(state.opt_state)
        moments = jnp.dtype({"bf16": "bfloat16"}.get(moment_dtype, moment_dtype))
        assert {a.dtype for a in jax.tree.leaves((adam.mu, adam.nu))} == {moments}
        assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype(param_dtype)}
        assert adam.count.dtype == state.step.dtype == jnp.int32


def test_a_step_in_bfloat16_is_close() -> None:
    """One step from the rounded state: measured 0.5 % of a tensor's largest value."""
    (state, _), (whole, _) = stepped("all in bfloat16"), stepped("whole")
    adam, whole_adam = adam_of(state.opt_state), adam_of(whole.opt_state)
    for ours, theirs in ((state.params, whole.params), (adam.mu, whole_adam.mu), (adam.nu, whole_adam.nu)):
        assert 1e-6 < furthest(flat(ours), flat(theirs)) <= 0.02


@pytest.mark.parametrize("form", FORMS)
def test_the_second_step_runs_the_first_one_s_program(form: str) -> None:
    state, _ = stepped(form)
    after, _ = step_of(form)(state)
    assert step_of(form).traces == 1
    assert int(after.step) == 43


def test_validation_is_plain_cross_entropy() -> None:
    params = state_of(WHOLE).params
    got, n = jax.jit(make_validation_step(MODEL, POLICY))(params, jnp.asarray(ROWS))
    assert int(n) == ROWS.shape[0] * (ROWS.shape[1] - 1)
    _, report = stepped("whole")
    assert float(got) == pytest.approx(float(report.loss), rel=1e-6)
    assert float(report.total_loss) - float(got) > 1e-3
