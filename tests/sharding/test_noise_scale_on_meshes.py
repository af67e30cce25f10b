"""The gradient noise scale on meshes, from the gradients of single sequences, and what it costs to find."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hlo import collectives
from mesh_cases import BATCH, CASES, MODEL, QUICKLY, learnable_rows, program_of, run_of

from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import is_multiplied, named_specs
from mesh_transformer.model.policy import ComputePolicy

RUN = run_of(CASES["data, accumulation"])
ROWS = learnable_rows(RUN, 0)


@functools.cache
def squares_of_parts() -> dict[str, dict[int, float]]:
    """Name -> sequences in a part -> mean over the batch's parts of the squared norm of a part's mean gradient."""
    state = program_of("data, accumulation").initial_state()
    params = jax.tree.map(np.asarray, state.params)
    how = {"z_loss": RUN.train.z_loss, "z_loss_kind": RUN.train.z_loss_kind}
    total = lambda p, row: loss_report(p, row[None], MODEL, ComputePolicy(unroll=False), **how).total  # noqa: E731
    gradient = jax.jit(jax.grad(total), compiler_options=QUICKLY)
    each = [jax.tree.map(lambda g: np.asarray(g, np.float64).ravel(), gradient(params, row)) for row in ROWS]
    found: dict[str, dict[int, float]] = {}
    leaves = zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in each), strict=True)
    for leaf in leaves:
        name = "/".join(key.key for key in leaf[0][0])
        rows = np.stack([gradient for _, gradient in leaf])
        found[name] = {
            size: float(np.mean(np.sum(rows.reshape(BATCH // size, size, -1).mean(axis=1) ** 2, axis=-1)))
            for size in (1, 2, 4, 8, BATCH)
        }
    return found


# Mesh -> (sequences whose gradient of a matrix a device has unsummed, sequences of a microbatch).
MESHES = {
    "data, accumulation": (2, 8),
    "data x tensor, accumulation": (2, 4),
    "data x fsdp, zero 3, accumulation": (1, 8),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if "fsdp" in n else n for n in MESHES])
def test_a_mesh_against_numpy(name: str) -> None:
    matrices = {n for n, spec in named_specs(MODEL).items() if is_multiplied(spec)}
    parts, micro = MESHES[name]
    signal = trace = 0.0
    for leaf, squares in squares_of_parts().items():
        small = parts if leaf in matrices else micro
        signal += (BATCH * squares[BATCH] - small * squares[small]) / (BATCH - small)
        trace += (squares[small] - squares[BATCH]) / (1 / small - 1 / BATCH)
    program = program_of(name)
    report = program(program.initial_state(), ROWS)[1]
    assert float(report.noise_signal) == pytest.approx(signal, rel=1e-4)  # type: ignore[arg-type]
    assert float(report.noise_trace) == pytest.approx(trace, rel=1e-4)  # type: ignore[arg-type]


def test_norms_are_sent_once_a_step_and_not_with_every_microbatch() -> None:
    n_arrays = len(named_specs(MODEL))
    sent = [m for m in collectives(program_of("data, accumulation").step) if any(s == (n_arrays,) for s in m.shapes)]
    assert [m.loops for m in sent] == [0]


def test_the_cases_named_here_accumulate() -> None:
    assert all(CASES[name].train["gradient_accumulation"] > 1 for name in MESHES)
