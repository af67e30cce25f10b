"""Twenty training steps are the same on every mesh: each loss, the first gradients and moments, the gradient norm."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from generation_cases import Agreement, greedy_agreement
from mesh_cases import CASES, MODEL, QUICKLY, learnable_rows, program_of, run_of

from mesh_transformer.api import Model
from mesh_transformer.engine.generator import Generator
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sample.options import SamplingOptions
from mesh_transformer.sharding.layout import layout_for
from mesh_transformer.sharding.mesh import AXES
from mesh_transformer.train.state import abstract_state, initial_state

STEPS = 20
PROMPTS = [[1, 2, 3], [10, 12], [40, 43, 46, 49], [7]]
GREEDY = SamplingOptions(max_tokens=12, temperature=0.0)
# Together they use every axis and every feature; the others run with `make test-long`.
QUICK = (
    "data x tensor, sequence",
    "data x fsdp, zero 3, accumulation",
    "pipeline x fsdp x tensor, zero 3",
    "pipeline x tensor, interleaved",
)
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in CASES if name != "one device"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """losses, norms: of every step. mu, nu: the moments after the first, whose gradients they are up to a factor.

    params: after the last step; texts: what they write greedily, on one device.
    """

    losses: np.ndarray
    norms: np.ndarray
    mu: Any
    nu: Any
    params: Any
    texts: list[list[int]]


@functools.cache
def trained(name: str) -> Trained:
    program = program_of(name)
    state, reports = program.initial_state(), []
    for step in range(STEPS):
        state, report = program(state, learnable_rows(program.run, step))
        # As the training loop does. Of several steps under way, one can keep threads that another waits for.
        reports.append(jax.block_until_ready(report))
        if step == 0:
            (adam,) = (part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState))
            mu, nu = jax.tree.map(np.asarray, (adam.mu, adam.nu))
    losses, norms = (np.array([float(getattr(r, field)) for r in reports]) for field in ("loss", "grad_norm"))
    params = writer().params = jax.tree.map(np.asarray, state.params)
    texts = [c.tokens for c in writer().generate(PROMPTS, [GREEDY] * len(PROMPTS))]
    return Trained(losses=losses, norms=norms, mu=mu, nu=nu, params=params, texts=texts)


@functools.cache
def writer() -> Generator:
    """Writes with whatever parameters it is given, so that its programs are compiled once."""
    return Generator(MODEL, {}, ComputePolicy(), None)


def assert_close(tree: Any, expected: Any, tolerance: float) -> None:
    """Every array, within `tolerance` of the largest value that is expected in it."""
    for (path, b), a in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(tree), strict=True):
        name, largest = jax.tree_util.keystr(path), np.abs(b).max()
        assert largest > 0, f"{name}: nothing to compare"
        assert np.abs(a - b).max() <= tolerance * largest, name


def test_the_quick_meshes_use_every_axis_and_feature() -> None:
    quick = [CASES[name] for name in QUICK]
    assert all(any(getattr(case.mesh, axis) > 1 for case in quick) for axis in AXES)
    assert any(case.mesh.shard_sequence for case in quick)
    assert {case.mesh.zero for case in quick} == {1, 3}
    used = set().union(*(case.train for case in quick))
    assert {"gather", "gradient_accumulation", "pipeline_microbatches", "pipeline_interleave"} <= used


def test_initial_values_do_not_depend_on_the_mesh() -> None:
    run = run_of(CASES["data x fsdp x tensor, zero 3"])
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, layout_for(run)))
    start = functools.partial(initial_state, run.model, run.train, run.seed)
    alone, here = (
        jax.jit(start, compiler_options=QUICKLY)(),
        jax.jit(start, out_shardings=where, compiler_options=QUICKLY)(),
    )
    jax.tree.map(np.testing.assert_array_equal, alone, here)


def test_one_device_learns() -> None:
    losses = trained("one device").losses
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", EVERY)
def test_a_mesh_trains_as_one_device_does(name: str) -> None:
    alone, here = trained("one device"), trained(name)
    np.testing.assert_allclose(here.losses, alone.losses, rtol=1e-5)
    np.testing.assert_allclose(here.norms, alone.norms, rtol=1e-4)
    # From zero moments Adam's first is a tenth of the gradient after clipping, its second a thousandth of the square.
    assert_close(here.mu, alone.mu, 1e-5)
    assert_close(here.nu, alone.nu, 2e-5)
    assert_writes_alike(name)


def assert_writes_alike(name: str) -> Agreement:
    """The same tokens wherever the two likeliest are further apart than trained parameters differ."""
    alone = trained("one device")
    model = Model(MODEL, alone.params, None, ComputePolicy())
    return greedy_agreement(PROMPTS, alone.texts, trained(name).texts, model, bound=1e-3)
