"""`mesh-transformer train`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mesh_transformer.config.run import RunConfig
    from mesh_transformer.train.init_from import InitFrom


def train(
    config: str = typer.Argument(help="A TOML configuration, or the original's JSON as it stands."),
    set_: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Override one value, e.g. train.steps=100. May be repeated."
    ),
    new: bool = typer.Option(False, "--new", help="Begin again instead of going on from the newest checkpoint."),
    init_from: str | None = typer.Option(
        None,
        "--init-from",
        metavar="MODEL",
        help="Begin from this model (any that `inspect` opens) with its optimizer state, if it has one; schedule and "
        "step begin at 0. Has no effect once the run has a checkpoint.",
    ),
    fresh_optimizer: bool = typer.Option(
        False, "--fresh-optimizer", help="With --init-from: take the parameters alone; Adam starts afresh."
    ),
    keep_schedule: bool = typer.Option(
        False,
        "--keep-schedule",
        help="With --init-from: go on with the model's interrupted run, at its step and its place in the schedule.",
    ),
    init_step: int | None = typer.Option(
        None, "--init-step", min=0, metavar="N", help="With --init-from: its checkpoint of this step, not the newest."
    ),
    init_config: str | None = typer.Option(
        None, "--init-config", metavar="FILE", help="With --init-from: its configuration, where it has none beside it."
    ),
    yes: bool = typer.Option(False, "--yes", help="With --new: delete the earlier run without asking."),
    profile: int = typer.Option(
        0, "--profile", min=0, metavar="STEPS", help="Trace so many steps after the first two, for Perfetto."
    ),
) -> None:
    """Train, going on by itself from the newest complete checkpoint of the run directory."""
    from mesh_transformer.cli.session import start_session

    start_session()
    from mesh_transformer.cli.console import TrainingDisplay, note, stopped_note
    from mesh_transformer.config.load import load_run_config
    from mesh_transformer.doctor import faults_before_start, faults_of_run
    from mesh_transformer.evaluate.in_loop import evaluation_of
    from mesh_transformer.processes import join
    from mesh_transformer.sharding.mesh import device_count
    from mesh_transformer.train.data import count_steps
    from mesh_transformer.train.loop import Observer, Silence
    from mesh_transformer.train.profile import PROFILE, Profiler
    from mesh_transformer.train.run import train as run_training

    begin_from = begin_from_options(
        init_from, fresh_optimizer=fresh_optimizer, keep_schedule=keep_schedule, step=init_step, config=init_config
    )
    for fault in faults_before_start():  # a wrong flag ends the process as soon as JAX starts
        note(fault.as_line())
    processes = join(note)
    with processes.agree("configuration"):
        run, notes = load_run_config(config, set_, n_devices=device_count)
        run = count_steps(run)
        if processes.is_first:
            check_new(run, new=new, yes=yes)
    for line in notes if processes.is_first else ():
        note(line)
    for fault in faults_of_run(run, processes.count) if processes.is_first else ():
        note(fault.as_line())
    with contextlib.ExitStack() as stack:
        observer: Observer = Silence()
        if processes.is_first:
            observer = stack.enter_context(TrainingDisplay(run.train.steps))
            if profile:
                observer = stack.enter_context(Profiler(observer, run.run_directory / PROFILE, profile))
        result = run_training(run, observer, new=new, init_from=begin_from, processes=processes, evaluate=evaluation_of)
    if result.stopped_by is not None:
        if processes.is_first:
            note(stopped_note(result.step, result.stopped_by))
        raise typer.Exit(128 + result.stopped_by)
    if processes.is_first:
        note(f"done: step {result.step}; see {run.run_directory}")


def check_new(run: RunConfig, *, new: bool, yes: bool) -> None:
    """Returns if no earlier run would be deleted without `yes`.

    Raises:
        UserError: one would.
    """
    from mesh_transformer.config.errors import UserError
    from mesh_transformer.train.run import has_run

    if new and not yes and has_run(run.run_directory):
        raise UserError(
            f"{run.run_directory} holds an earlier run, which --new would delete\nadd --yes to delete it, "
            "or give this run another name"
        )


def begin_from_options(
    model: str | None, *, fresh_optimizer: bool, keep_schedule: bool, step: int | None, config: str | None
) -> InitFrom | None:
    """What the options say of the model to begin from; None without one.

    Raises:
        ConfigError: an option says how to begin from a model, and none is given.
    """
    from mesh_transformer.config.errors import ConfigError
    from mesh_transformer.train.init_from import InitFrom

    if model is not None:
        return InitFrom(
            model=model, step=step, config=config, fresh_optimizer=fresh_optimizer, keep_schedule=keep_schedule
        )
    how = {
        "--fresh-optimizer": fresh_optimizer,
        "--keep-schedule": keep_schedule,
        "--init-step": step is not None,
        "--init-config": config is not None,
    }
    given = [flag for flag, is_given in how.items() if is_given]
    if given:
        raise ConfigError(f"{given[0]} says how to begin from a model, and none is given\nadd --init-from MODEL")
    return None
