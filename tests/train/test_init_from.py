"""Runs that begin from another model: its values in the right places, what is reset, and how they go on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_optimizer as reference
from init_from_cases import ADAM, ARCH, SAME, SCHEDULE, STEP
from run_cases import (
    MODEL,
    Listener,
    Spy,
    T,
    Toy,
    checkpoints,
    copy_of,
    lines,
    state_of,
    terminate,
    trained_steps,
)

from legacy.generator import write_config, write_model_directory
from mesh_transformer.checkpoint import arrays, native_weights
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.checkpoint.weights import nested
from mesh_transformer.config.errors import RunError
from mesh_transformer.config.run import RunConfig
from mesh_transformer.data.source import open_source
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import named_specs
from mesh_transformer.model.policy import default_policy
from mesh_transformer.train.init_from import InitFrom, first_state, open_model
from mesh_transformer.train.run import Result, train
from mesh_transformer.train.state import abstract_state, initial_state

pytestmark = pytest.mark.usefixtures("quick_compile")

# No warm-up, so that the very first update moves; long enough for a count of 301 to be on the way down.
SETTINGS = reference.Settings(peak=1e-3, end=1e-4, warmup=0, anneal=600)
CHANGES: dict[str, Any] = {
    "learning_rate": 1e-3, "end_learning_rate": 1e-4, "warmup_steps": 0, "anneal_steps": 600,
    "compute_dtype": "float32", "validate_every": 0, "checkpoint_every": 1,
}  # fmt: skip
Z_LOSS: dict[str, Any] = {"z_loss": 1e-4, "z_loss_kind": "log_partition"}


def beginning(run: RunConfig, model: Path, spy: Spy | None = None, **how: Any) -> tuple[Listener, dict[str, Any]]:
    """Trains; what was heard, and the metadata of the newest checkpoint."""
    listener = Listener()
    step = train(run, listener, init_from=InitFrom(model=str(model), **how)).step
    return listener, json.loads((run.run_directory / "checkpoints" / str(step) / "checkpoint.json").read_text())


def saved_state(run: RunConfig, step: int) -> dict[str, np.ndarray]:
    """Name on the disk -> values."""
    with CheckpointStore(run.run_directory / "checkpoints", keep_last=1, keep_every=0) as store:
        state = store.restore(step, abstract_state(run), model=run.model)
    return dict(zip(arrays.describe(state), map(np.asarray, jax.tree.leaves(state)), strict=True))


def under(state: dict[str, np.ndarray], prefix: str) -> reference.Arrays:
    return {name.removeprefix(f"{prefix}/"): a for name, a in state.items() if name.startswith(f"{prefix}/")}


def furthest(ours: reference.Arrays, theirs: reference.Arrays) -> float:
    """Over all tensors, the largest difference relative to the tensor's largest value."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - b).max() / np.abs(b).max()) for name, b in theirs.items())


def gradients_at(params: reference.Arrays, rows: list[list[int]]) -> reference.Arrays:
    def total(tree: Any) -> Any:
        report = loss_report(tree, jnp.asarray(rows), SAME, default_policy("float32"), **Z_LOSS)
        return report.total

    grads = jax.jit(jax.grad(total))(nested({name: jnp.asarray(a, jnp.float32) for name, a in params.items()}))
    return {name: np.asarray(a, np.float64) for name, a in zip(sorted(params), jax.tree.leaves(grads), strict=True)}


# ------------------------------------------------------------------------------------------------ the first update


@pytest.mark.parametrize(
    ("shards", "variant", "how", "adam", "schedule", "step"),
    [
        (8, "full", {}, ADAM, 0, 0),
        (1, "full", {}, ADAM, 0, 0),
        (8, "full", {"keep_schedule": True}, ADAM, SCHEDULE, STEP),
        (8, "full", {"fresh_optimizer": True}, 0, 0, 0),
        (8, "slim", {}, 0, 0, 0),
    ],
    ids=["eight shards", "one shard", "kept schedule", "fresh optimizer", "slim"],
)
def test_the_first_update_is_the_reference_s(
    tmp_path: Path, toy: Toy, spy: Spy, models: Any, shards: int, variant: str, how: Any, adam: int, schedule: int,
    step: int,
) -> None:  # fmt: skip
    stored = models(shards, variant)
    run = toy.run(tmp_path / "run", model=SAME, steps=step + 1, **CHANGES)
    listener, metadata = beginning(run, stored.path, **how)

    params = {name: np.asarray(a, np.float64) for name, a in stored.truth.params.items()}
    zeros = {name: np.zeros_like(a) for name, a in params.items()}
    kept = adam > 0
    mu, nu = (stored.truth.mu, stored.truth.nu) if kept else (zeros, zeros)
    before = reference.State(params, mu, nu, adam, schedule)
    after = reference.step(before, gradients_at(params, spy.rows), SETTINGS)

    state = saved_state(run, step + 1)
    assert furthest(under(state, "opt_state/2/mu"), after.mu) <= 1e-6
    assert furthest(under(state, "opt_state/2/nu"), after.nu) <= 1e-6
    assert furthest(under(state, "params"), after.params) <= 1e-6
    assert furthest(under(state, "params"), before.params) > 1e-4  # or it would say little
    assert (state["opt_state/2/count"], state["opt_state/5/count"]) == (adam + 1, schedule + 1)
    assert state["step"] == step + 1
    assert listener.steps[0].step == step + 1
    assert listener.steps[0].learning_rate == pytest.approx(reference.rate(schedule, SETTINGS), rel=1e-6)
    assert metadata["init_from"] == {"path": str(stored.step_directory), "format": "legacy", "step": STEP}
    # The data begin at their start whatever the step.
    assert metadata["position"] == run.train.batch_size and listener.steps[0].tokens == run.train.batch_size * T


@pytest.mark.parametrize(
    ("variant", "how", "said"),
    [
        ("full", {}, ["Adam goes on after 901 updates; schedule and step begin at 0"]),
        ("full", {"keep_schedule": True}, ["901 updates, the schedule after 301"]),
        ("full", {"fresh_optimizer": True}, ["its parameters alone: Adam, schedule and step begin at 0"]),
        ("slim", {}, ["schedule and step begin at 0", "holds no optimizer state: Adam starts afresh"]),
    ],
)  # fmt: skip
def test_it_says_what_is_taken_over(tmp_path: Path, toy: Toy, models: Any, variant: str, how: Any, said: Any) -> None:
    stored = models(8, variant)
    run = toy.run(tmp_path / "run", model=SAME, steps=STEP + 1)
    init_from, told = InitFrom(model=str(stored.path), **how), []
    first_state(run, init_from, open_model(run, init_from, told.append), told.append)
    assert len(told) == len(said)
    assert f"(legacy, step {STEP})" in told[0]
    for note, part in zip(told, said, strict=True):
        assert part in note


# ------------------------------------------------------------------------------------------------ where values belong


def test_the_names_on_the_disk_are_those_of_the_optimizer_s_state(toy: Toy, tmp_path: Path) -> None:
    names = set(arrays.describe(abstract_state(toy.run(tmp_path / "run"))))
    moments = {f"{tree}/{path}" for tree in (native_weights.MU, native_weights.NU) for path in named_specs(MODEL)}
    counts = {native_weights.ADAM_COUNT, native_weights.SCHEDULE_COUNT}
    assert {name for name in names if name.startswith("opt_state/")} == moments | counts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_from_a_model_is_as_one_made_here(
    tmp_path: Path, toy: Toy, models: Any, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    stored = models(8)
    run = toy.run(tmp_path / "run", model=SAME, seed=5, param_dtype=dtype, moment_dtype=dtype)
    how = InitFrom(model=str(stored.path))
    state = first_state(run, how, open_model(run, how, print), print)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    begin = jax.jit(lambda: initial_state(run.model, run.train, run.seed), out_shardings=device)
    place = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type, a.sharding, a.committed), tree)  # noqa: E731
    ours, theirs = state, begin()
    assert place(ours) == place(theirs)
    assert jax.random.key_data(jax.random.key(5)).tolist() == ours.key.tolist() == theirs.key.tolist()
    # Rounded once, to the nearest.
    moments = dict(zip(named_specs(SAME), jax.tree.leaves(state.opt_state[2].nu), strict=True))
    expected = stored.truth.nu["layers/attn/q"].astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(moments["layers/attn/q"]), expected)
    # A step may overwrite all of it: nothing is memory that another holds.
    addresses = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    after = jax.jit(lambda s: jax.tree.map(lambda a: a + a.dtype.type(1), s), donate_argnums=0)(state)
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)} == addresses


def test_another_checkpoint_than_the_newest_and_a_configuration_of_its_own(
    tmp_path: Path, toy: Toy, models: Any
) -> None:
    model, config = tmp_path / "model", tmp_path / "its.json"
    truths = write_model_directory(model, ARCH, 2, [7, 9])
    write_config(config, ARCH.config(2))
    run = toy.run(tmp_path / "run", model=SAME, steps=1, **CHANGES | {"warmup_steps": 1})
    _, metadata = beginning(run, model, step=7, config=str(config))
    assert metadata["init_from"] == {"path": str(model / "step_7"), "format": "legacy", "step": 7}
    # The first rate of a warm-up is 0: the parameters are still the model's.
    for name, values in under(saved_state(run, 1), "params").items():
        np.testing.assert_array_equal(values, truths[7].params[name], err_msg=name)


# ------------------------------------------------------------------------------------------------ stopping, going on


def test_a_run_of_our_own_that_goes_on_elsewhere_takes_the_same_steps_on_the_same_data(
    tmp_path: Path, toy: Toy, ten_steps: RunConfig
) -> None:
    """Source of the native format: the schedule goes on, so two steps more are as from steps 11 and 12."""
    run = toy.run(tmp_path / "run", steps=12)
    listener, metadata = beginning(run, ten_steps.run_directory, keep_schedule=True)
    assert [m.step for m in listener.steps] == trained_steps(run) == [11, 12]
    s = reference.Settings(peak=1e-2, end=1e-3, warmup=2, anneal=30)
    rates = [reference.rate(n, s) for n in (10, 11)]
    assert [m.learning_rate for m in listener.steps] == pytest.approx(rates, rel=1e-6)
    assert checkpoints(run) == ["12"]
    origin = ten_steps.run_directory / "checkpoints" / "10"
    assert metadata["init_from"] == {"path": str(origin), "format": "native", "step": 10}
    counts = saved_state(run, 12)
    assert (counts["opt_state/2/count"], counts["opt_state/5/count"], counts["step"]) == (12, 12, 12)


@pytest.mark.parametrize("keep_schedule", [False, True])
def test_repeating_the_command_goes_on_bit_for_bit(tmp_path: Path, toy: Toy, models: Any, keep_schedule: bool) -> None:
    stored, first = models(8), STEP if keep_schedule else 0
    how = InitFrom(model=str(stored.path), keep_schedule=keep_schedule)
    changes = CHANGES | {"steps": first + 4, "checkpoint_every": 1000}
    undisturbed = toy.run(tmp_path / "undisturbed", model=SAME, **changes)
    assert train(undisturbed, Listener(), init_from=how) == Result(first + 4, None)

    run = toy.run(tmp_path / "run", model=SAME, **changes)
    assert train(run, Listener({first + 2: terminate}), init_from=how) == Result(first + 2, 15)
    # The model may be gone by now, and the flags be others: nothing is read again.
    listener = Listener()
    again = InitFrom(model=str(tmp_path / "gone"), fresh_optimizer=True)
    assert train(run, listener, init_from=again) == Result(first + 4, None)
    assert state_of(run, first + 4) == state_of(undisturbed, first + 4)
    assert trained_steps(run) == trained_steps(undisturbed) == [first + n for n in (1, 2, 3, 4)]
    (told,) = [note for note in listener.notes if "--init-from" in note]
    assert f"going on from checkpoint {first + 2} in {run.run_directory}" in told
    assert "only while a run has no checkpoint" in told and f"began from {stored.step_directory}, step {STEP}" in told
    # What the run began from is still known.
    metadata = json.loads((run.run_directory / "checkpoints" / str(first + 4) / "checkpoint.json").read_text())
    assert metadata["init_from"]["path"] == str(stored.step_directory)


def test_a_run_that_began_at_random_says_so(tmp_path: Path, toy: Toy, ten_steps: RunConfig) -> None:
    run = toy.run(copy_of(ten_steps, tmp_path / "run"), steps=10)
    listener = Listener()
    assert train(run, listener, init_from=InitFrom(model="elsewhere")) == Result(10, None)
    assert any("began from random parameters" in note for note in listener.notes)


def test_lines_of_a_start_that_saved_nothing_are_cut(tmp_path: Path, toy: Toy, models: Any) -> None:
    run = toy.run(tmp_path / "run", model=SAME, steps=STEP + 1, **CHANGES)
    run.run_directory.mkdir()
    (run.run_directory / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n{"step": 1202, "loss": 4.0}\n')
    beginning(run, models(8).path, keep_schedule=True)
    assert [line["step"] for line in lines(run)] == [STEP + 1]


def test_stopped_before_its_first_step_it_claims_no_checkpoint(tmp_path: Path, toy: Toy, models: Any) -> None:
    run = toy.run(tmp_path / "run", model=SAME, steps=STEP + 9, **CHANGES)
    how = InitFrom(model=str(models(8).path), keep_schedule=True)
    stopping = Listener(on_note=lambda text: terminate() if text == "compiling" else None)
    assert train(run, stopping, init_from=how) == Result(0, 15)
    assert not (run.run_directory / "checkpoints").exists()
    # The same command begins from the model once more.
    assert train(run, Listener({STEP + 1: terminate}), init_from=how) == Result(STEP + 1, 15)


def test_a_loss_that_is_not_finite_claims_no_checkpoint(tmp_path: Path, toy: Toy, models: Any, spy: Spy) -> None:
    run = toy.run(tmp_path / "run", model=SAME, steps=STEP + 9, **CHANGES)
    spy.replace_step = lambda state, report: (state, dataclasses.replace(report, grad_norm=jnp.float32(np.nan)))
    with pytest.raises(RunError, match=f"step {STEP + 1}: .*no checkpoint was saved before it"):
        beginning(run, models(8).path, keep_schedule=True)


def test_new_begins_again_from_the_model(tmp_path: Path, toy: Toy, ten_steps: RunConfig, models: Any) -> None:
    where = copy_of(ten_steps, tmp_path / "run")
    run = toy.run(where, model=SAME, steps=1, **CHANGES)
    how = InitFrom(model=str(models(8).path))
    assert train(run, Listener(), new=True, init_from=how) == Result(1, None)
    assert checkpoints(run) == ["1"] and trained_steps(run) == [1]
    assert saved_state(run, 1)["opt_state/2/count"] == ADAM + 1


def test_the_original_s_place_in_its_files_is_taken_over(
    tmp_path: Path, toy: Toy, spy: Spy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its loader had finished the first file, of 25 sequences, and read two batches of four of the second."""
    path = tmp_path_factory.mktemp("placed") / "model"
    loader = {"used": ["gs://elsewhere/train_1.tfrecords"], "file_idx": 1}
    write_model_directory(path, ARCH, 1, [STEP], config=True, aux={STEP: loader})
    files = {"shuffle": False}
    run = toy.run(tmp_path / "in order", model=SAME, steps=STEP + 1, data=files, **CHANGES)
    listener, metadata = beginning(run, path, spy, keep_schedule=True)
    source = open_source(run.data.train, sequence_length=T, n_vocab=64)
    n = len(spy.rows)
    assert spy.rows == [source[25 + 2 * n + i].tolist() for i in range(n)]
    assert metadata["position"] == 25 + 3 * n
    assert any("the data go on after 33 sequences" in note for note in listener.notes)
    for how, data in (({"keep_schedule": True}, {}), ({}, files)):
        spy.rows.clear()
        run = toy.run(tmp_path / f"other {len(data)}", model=SAME, steps=STEP + 1 if how else 1, data=data, **CHANGES)
        listener, metadata = beginning(run, path, spy, **how)
        assert metadata["position"] == n
        wanted = "taken over with data.shuffle = false"
        assert any(wanted in note for note in listener.notes) == bool(how)
