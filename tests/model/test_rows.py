"""What a row can hold: documents that see nothing of one another, and tokens that are not learned."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mesh_transformer.config.model import ModelConfig, Position
from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.model.loss import loss_report, score_tokens
from mesh_transformer.model.params import abstract_params
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.layout import layout_for, place_array
from mesh_transformer.train.state import abstract_state, initial_state
from mesh_transformer.train.step import make_train_step

CFG = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_ff=20, n_vocab=24, n_ctx=20, d_rotary=4)
PLAIN = ComputePolicy(dtype="float32")
END = 23
# Documents that begin with the end of the one before, an empty one among them; the row's first is cut off in front.
ROW = np.array([3, 9, 4, END, 1, 2, 3, 4, END, END, 7, 7, 9, 1, 0, 5, END, 2, 8, 8, 1], np.int32)


def of_position(position: str) -> tuple[ModelConfig, Any]:
    cfg = dataclasses.replace(CFG, position=position, d_rotary=4 if position == "rotary" else 0)
    return cfg, jax.tree.map(jnp.asarray, reference.random_params(abstract_params(cfg), 3))


@pytest.mark.parametrize("position", get_args(Position))
def test_separate_documents_are_as_each_alone(position: str) -> None:
    cfg, params = of_position(position)
    score = jax.jit(functools.partial(score_tokens, cfg=cfg, policy=PLAIN), static_argnames="separator")
    inputs, targets = ROW[None, :-1], ROW[None, 1:]
    together = np.asarray(score(params, inputs, targets, separator=END).loss[0])
    bounds = [0, *np.flatnonzero(inputs[0] == END).tolist(), inputs.shape[1]]
    for start, stop in itertools.pairwise(bounds):
        alone = score(params, inputs[:, start:stop], targets[:, start:stop]).loss[0]
        np.testing.assert_allclose(together[start:stop], alone, rtol=2e-5, atol=2e-5)
    # Otherwise they do see one another.
    joined = np.asarray(score(params, inputs, targets).loss[0])
    np.testing.assert_allclose(joined[:3], together[:3], rtol=2e-5)
    assert np.abs(joined[4:] - together[4:]).max() > 1e-2


def masked_rows() -> np.ndarray:
    """Four rows of which one learns nothing, one all, and two a part."""
    rows = np.random.default_rng(5).integers(0, CFG.n_vocab, (4, 13)).astype(np.int32)
    rows[0] = ~rows[0]
    rows[2, :9] = ~rows[2, :9]
    rows[3, [0, 4, 12]] = ~rows[3, [0, 4, 12]]
    return rows


def test_only_what_is_learned_counts() -> None:
    cfg, params = of_position("rotary")
    rows = masked_rows()
    counts, ids = rows[:, 1:] >= 0, np.where(rows < 0, ~rows, rows)
    scores = jax.jit(functools.partial(score_tokens, cfg=cfg, policy=PLAIN))(params, ids[:, :-1], ids[:, 1:])
    report = jax.jit(functools.partial(loss_report, cfg=cfg, policy=PLAIN, z_loss=0.1))(params, rows)
    assert counts.sum() == 12 + 4 + 10
    assert float(report.loss) == pytest.approx(float(np.asarray(scores.loss)[counts].mean()), rel=1e-6)
    assert float(report.z_loss) == pytest.approx(0.1 * float(np.square(scores.log_sum)[counts].mean()), rel=1e-6)
    assert float(report.last) == pytest.approx(float(np.asarray(scores.loss)[1:3, -1].mean()), rel=1e-6)
    assert float(report.correct) == pytest.approx(float(np.asarray(scores.correct)[counts].mean()), abs=1e-7)


def test_rows_of_which_nothing_is_learned() -> None:
    cfg, params = of_position("rotary")
    rows = ~np.abs(masked_rows())
    total = lambda p: loss_report(p, jnp.asarray(rows), cfg, PLAIN, z_loss=0.1).total  # noqa: E731
    loss, grads = jax.jit(jax.value_and_grad(total))(params)
    assert float(loss) == 0 and all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


@functools.cache
def stepped(mesh: MeshConfig, accumulation: int, separator: int | None) -> tuple[Any, Any]:
    """Parameters after a step, and what it reported."""
    rows = masked_rows()
    rows[1, [3, 8]] = END
    train = TrainConfig(
        steps=9, batch_size=len(rows), gradient_accumulation=accumulation, learning_rate=1e-2, warmup_steps=0
    )
    data = DataConfig(train="t", sequence_length=rows.shape[1] - 1)
    run = RunConfig(name="r", model=CFG, data=data, train=train, mesh=mesh)
    layout = layout_for(run)
    step = jax.jit(make_train_step(CFG, train, PLAIN, layout.rules, separator=separator))
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, layout))
    parts = rows.reshape(accumulation, -1, rows.shape[1])
    with layout.using():
        state = jax.jit(functools.partial(initial_state, CFG, train, 4), out_shardings=where)()
        after, report = step(state, place_array(parts, layout.rows(1)))
    return jax.device_get(after.params), report


@pytest.mark.parametrize(
    ("mesh", "accumulation", "separator"),
    [
        (MeshConfig(data=2, tensor=2), 2, END),
        pytest.param(MeshConfig(data=1), 4, END, marks=pytest.mark.long),
        pytest.param(MeshConfig(data=1), 4, None, marks=pytest.mark.long),
        pytest.param(MeshConfig(data=1, fsdp=4, zero=3), 1, None, marks=pytest.mark.long),
        pytest.param(MeshConfig(data=1, fsdp=4, zero=3), 1, END, marks=pytest.mark.long),
        pytest.param(MeshConfig(data=2, tensor=2, shard_sequence=True), 1, END, marks=pytest.mark.long),
    ],
)
def test_parts_of_a_batch_and_meshes_change_nothing(mesh: MeshConfig, accumulation: int, separator: int | None) -> None:
    """Though every part holds another number of targets."""
    wanted, report = stepped(MeshConfig(data=1), 1, separator)
    found, found_report = stepped(mesh, accumulation, separator)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert float(found_report.loss) == pytest.approx(float(report.loss), rel=1e-5)
    assert float(found_report.grad_norm) == pytest.approx(float(report.grad_norm), rel=1e-4)
