"""Runs that several tests look at, and quick compilation for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from init_from_cases import ARCH, STEP, Stored
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from run_cases import Listener, Spy, Toy

from legacy.generator import write_model_directory
from mesh_transformer.config.run import RunConfig
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.layout import Layout
from mesh_transformer.train import run as train_run
from mesh_transformer.train.loop import Programs, compile_programs
from mesh_transformer.train.plot import plot_loss
from mesh_transformer.train.run import train


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def quick_compile(compile_cache: Path) -> Iterator[None]:
    """Every program is compiled once for all tests, and quickly: no test here is about its speed."""
    settings = {
        "jax_compilation_cache_dir": str(compile_cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_enable_xla_caches": "none",
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_run, "compile_programs", _compile_once)
        patch.setattr(train_run, "plot_loss", _draw_once)
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            reset_cache()


_CADENCE = {"steps": 1, "validate_every": 0, "validation_batches": 1, "checkpoint_every": 1, "keep_every": 0}
_programs: dict[Any, Programs] = {}


def _compile_once(run: RunConfig, state: Any, policy: ComputePolicy, layout: Layout, separator: int | None) -> Programs:
    assert layout.mesh is None
    # Its schedule is in a program; how long the run is and when it saves are not.
    dtypes = tuple(str(leaf.dtype) for leaf in jax.tree.leaves(state))  # a base keeps its own
    settings = dataclasses.replace(run.train, **_CADENCE)
    key = (run.model, settings, run.data.sequence_length, policy, separator, run.lora, dtypes)
    if key not in _programs:
        _programs[key] = compile_programs(run, state, policy, separator=separator)
    return _programs[key]


_picture: list[bytes] = []


def _draw_once(records: list[dict[str, Any]], target: Path, title: str) -> None:
    """A third of a second for each of a hundred runs is left out: the first one's picture serves all."""
    if _picture:
        target.write_bytes(_picture[0])
    else:
        plot_loss(records, target, title)
        _picture.append(target.read_bytes())


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def whole(toy: Toy, quick_compile: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of twelve steps that nothing disturbed; not to be changed."""
    run = toy.run(tmp_path_factory.mktemp("whole") / "run")
    train(run, Listener())
    return run


@pytest.fixture(scope="module")
def ten_steps(toy: Toy, quick_compile: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The first ten steps of `whole`, with checkpoints 5 and 10; not to be changed."""
    run = toy.run(tmp_path_factory.mktemp("ten") / "run", steps=10)
    train(run, Listener())
    return run


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    seen = Spy()
    compile_them = train_run.compile_programs

    def compile_and_watch(*arguments: Any) -> Programs:
        programs = compile_them(*arguments)
        seen.compiled += 1

        def step(state: Any, rows: np.ndarray) -> Any:
            seen.rows.extend(rows.reshape(-1, rows.shape[-1]).tolist())
            state, report = programs.step(state, rows)
            return seen.replace_step(state, report) if seen.replace_step else (state, report)

        return dataclasses.replace(programs, step=step)

    monkeypatch.setattr(train_run, "compile_programs", compile_and_watch)
    return seen


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Stored]:
    """Models of the original's by their number of shards and their variant; not to be changed."""
    made: dict[tuple[int, str], Stored] = {}

    def model(shards: int, variant: str = "full") -> Stored:
        if (shards, variant) not in made:
            path = tmp_path_factory.mktemp("models") / "model"
            truths = write_model_directory(path, ARCH, shards, [STEP], config=True, style="unequal", variant=variant)
            made[shards, variant] = Stored(path, truths[STEP])
        return made[shards, variant]

    return model
