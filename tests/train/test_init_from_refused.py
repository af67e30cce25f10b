"""Models that a run cannot begin from, and the flags that say how it begins."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from init_from_cases import ARCH, SAME, STEP
from run_cases import (
    Listener,
    T,
    Toy,
    command,
    contents,
    copy_of,
    flip_bit,
)

from legacy.generator import write_config, write_model_directory, write_v1
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import RunConfig
from mesh_transformer.evaluate.in_loop import evaluation_of
from mesh_transformer.train.init_from import InitFrom, open_model
from mesh_transformer.train.run import Result, train

pytestmark = pytest.mark.usefixtures("quick_compile")


def refused(run: RunConfig, how: InitFrom, *, new: bool = False) -> str:
    """The message; nothing was written."""
    directory = run.run_directory
    before = contents(directory) if directory.exists() else None
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        train(run, Listener(), new=new, init_from=how)
    assert (contents(directory) if directory.exists() else None) == before
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


def test_another_architecture_is_refused_with_every_field(tmp_path: Path, toy: Toy, models: Any) -> None:
    other = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_vocab=64, n_ctx=T, d_rotary=4, norm="rmsnorm")
    message = refused(toy.run(tmp_path / "run", model=other), InitFrom(model=str(models(8).path)))
    for part in (
        "n_heads is 8 there, 4 here",
        "d_head is 4 there, 8 here",
        "norm is 'layernorm' there, 'rmsnorm' here",
    ):
        assert part in message
    assert "[model]" in message and "n_ctx" not in message and str(models(8).step_directory) in message


def test_with_fixed_positions_the_context_is_part_of_the_architecture(tmp_path: Path, toy: Toy) -> None:
    fixed = dataclasses.replace(ARCH, pe="fixed", seq=24)
    write_model_directory(tmp_path / "model", fixed, 8, [1], config=True)
    model = dataclasses.replace(SAME, position="fixed", d_rotary=0)
    message = refused(toy.run(tmp_path / "run", model=model), InitFrom(model=str(tmp_path / "model")))
    assert f"n_ctx is 24 there, {T} here" in message
    run = toy.run(tmp_path / "run", model=dataclasses.replace(model, n_ctx=24))
    assert open_model(run, InitFrom(model=str(tmp_path / "model")), print).cfg == run.model


def test_a_schedule_that_is_not_there_is_not_kept(tmp_path: Path, toy: Toy, models: Any) -> None:
    run = toy.run(tmp_path / "run", model=SAME, steps=STEP + 1)
    message = refused(run, InitFrom(model=str(models(8, "slim").path), keep_schedule=True))
    assert "holds no optimizer state" in message and "leave --keep-schedule out" in message


def test_a_run_that_is_over_is_not_gone_on_with(tmp_path: Path, toy: Toy, models: Any) -> None:
    run = toy.run(tmp_path / "run", model=SAME, steps=STEP)
    message = refused(run, InitFrom(model=str(models(8).path), keep_schedule=True))
    assert f"train.steps = {STEP} is not above {STEP}" in message


def test_a_counter_that_cannot_be_is_refused(tmp_path: Path, toy: Toy) -> None:
    write_v1(tmp_path / "step_1", ARCH, 8, adam_count=-1)
    write_config(tmp_path / "config.json", ARCH.config(8))
    message = refused(toy.run(tmp_path / "run", model=SAME), InitFrom(model=str(tmp_path / "step_1")))
    assert "-1" in message and str(tmp_path / "step_1") in message


def test_a_model_that_new_would_delete_is_refused(tmp_path: Path, toy: Toy, ten_steps: RunConfig) -> None:
    run = toy.run(copy_of(ten_steps, tmp_path / "run"), steps=12)
    message = refused(run, InitFrom(model=str(run.run_directory)), new=True)
    assert "which --new deletes" in message and str(run.run_directory / "checkpoints" / "10") in message


def test_new_deletes_nothing_for_a_damaged_model(tmp_path: Path, toy: Toy, ten_steps: RunConfig) -> None:
    write_model_directory(tmp_path / "model", ARCH, 2, [1], config=True)
    flip_bit(tmp_path / "model" / "step_1" / "shard_1" / "9.npz")
    run = toy.run(copy_of(ten_steps, tmp_path / "run"), model=SAME)
    assert "9.npz" in refused(run, InitFrom(model=str(tmp_path / "model")), new=True)


def test_a_model_that_is_not_there(tmp_path: Path, toy: Toy) -> None:
    assert "absent" in refused(toy.run(tmp_path / "run"), InitFrom(model=str(tmp_path / "absent")))


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--fresh-optimizer"], "--fresh-optimizer says how to begin from a model.*\nadd --init-from MODEL"),
        (["--keep-schedule"], "--keep-schedule says how"),
        (["--init-step", "0"], "--init-step says how"),
        (["--init-config", "a.json"], "--init-config says how"),
        (["--init-from", "M", "--fresh-optimizer", "--keep-schedule"], "contradict each other"),
        (["--init-from", ""], "--init-from names no model"),
        (["--init-from", "M", "--init-step", "-1"], "--init-step"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_make_no_sense(
    tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: list[str], named: str
) -> None:
    run = toy.run(tmp_path / "run")
    assert command(run, tmp_path, monkeypatch, *flags) == 2
    assert re.search(named, capsys.readouterr().err)
    assert not run.run_directory.exists()


def test_the_command_passes_everything_on(
    tmp_path: Path, toy: Toy, models: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        sys.modules["mesh_transformer.train.run"],
        "train",
        lambda run, observer, *, processes, **how: seen.append(how) or Result(1, None),
    )
    run = toy.run(tmp_path / "run")
    flags = ["--init-from", "M", "--init-step", "7", "--init-config", "c.json"]
    assert command(run, tmp_path, monkeypatch, *flags, "--keep-schedule", "--new") == 0
    assert command(run, tmp_path, monkeypatch, "--init-from", "M", "--fresh-optimizer") == 0
    assert command(run, tmp_path, monkeypatch) == 0
    assert [how.pop("evaluate") for how in seen] == [evaluation_of] * 3
    assert seen == [
        {"new": True, "init_from": InitFrom(model="M", step=7, config="c.json", keep_schedule=True)},
        {"new": False, "init_from": InitFrom(model="M", fresh_optimizer=True)},
        {"new": False, "init_from": None},
    ]
