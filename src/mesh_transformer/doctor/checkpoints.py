"""The run directory that is there already, its checkpoints against the configuration, and the model to begin from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mesh_transformer.checkpoint.opening import newest_intact, read_metadata, step_directories
from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.config.run import RunConfig
from mesh_transformer.doctor.finding import Check, Finding, failed, ok, warning
from mesh_transformer.doctor.inputs import Inputs
from mesh_transformer.train.beginning import check_goes_on
from mesh_transformer.train.init_from import InitFrom, open_model
from mesh_transformer.train.lora import check_beginning

_OTHER_RUN = "give this run another name, or begin again with --new"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def checks_of_checkpoints(inputs: Inputs, init_from: InitFrom | None) -> list[Check]:
    """Lock, newest checkpoint, agreement with the configuration, and the model of --init-from."""
    run = inputs.run
    return [
        Check(name="run directory", look=lambda: check_lock(run), mend=_OTHER_RUN),
        Check(name="checkpoints", look=lambda: check_checkpoints(inputs, init_from), mend=_OTHER_RUN),
    ]


def check_lock(run: RunConfig) -> Iterator[Finding]:
    """Whether another process uses the run."""
    directory = RunDirectory(run.run_directory)
    holder = directory.holder()
    if holder:
        mend = "wait for that process or end it, or give this run another name"
        yield failed("run directory", f"{directory.path} is in use by {holder}", mend)
    elif directory.path.exists():
        yield ok("run directory", f"{directory.path}: there, and used by nobody")
    else:
        yield ok("run directory", f"{directory.path}: will be made")


def check_checkpoints(inputs: Inputs, init_from: InitFrom | None) -> Iterator[Finding]:
    """The newest intact one and whether the run may go on from it; where there is none, the model to begin from."""
    run, name = inputs.run, "checkpoints"
    directory = RunDirectory(run.run_directory).checkpoints
    steps = step_directories(directory)
    damaged: list[str] = []
    newest = newest_intact(directory, damaged.append)
    if newest is None and steps:
        there = ", ".join(map(str, steps))
        mend = "restore one from a copy, or begin again with --new"
        yield failed(name, f"{directory}: none of {there} is intact: {damaged[0].partition(';')[0]}", mend)
        return
    for line in damaged:
        mend = f"restore it from a copy; without that `train` goes on from checkpoint {newest}"
        yield warning(name, line.partition("; checkpoint")[0], mend)
    if newest is None:
        yield from _beginning(run, init_from)
        return
    metadata = read_metadata(steps[newest])
    check_goes_on(metadata, run, inputs.record, steps[newest])
    yield from _going_on(run, newest, directory)


def _going_on(run: RunConfig, newest: int, directory: Path) -> Iterator[Finding]:
    name = "checkpoints"
    if run.train.steps is not None and newest >= run.train.steps:
        message = f"{directory}: complete at step {newest}; `train` has nothing to do"
        yield warning(name, message, f"raise train.steps above {newest}, or give this run another name")
    else:
        yield ok(name, f"{directory}: `train` goes on from checkpoint {newest}, which is intact and fits")


def _beginning(run: RunConfig, init_from: InitFrom | None) -> Iterator[Finding]:
    name = "--init-from"
    check_beginning(run, init_from)
    if init_from is None:
        yield ok("checkpoints", "none yet: `train` begins from random parameters, unless --init-from names a model")
        return
    if not Path(init_from.model).exists() and _HUB_ID.fullmatch(init_from.model):
        message = f"there is no such path as {init_from.model}; `train` will ask the Hugging Face Hub for it"
        yield warning(
            name, message, "if it is a path, write it as it is from this directory; else nothing need be done"
        )
        return
    notes: list[str] = []
    weights = open_model(run, init_from, notes.append)
    yield ok(name, f"{weights.where} ({weights.format}) is of this architecture")
    for line in notes:
        yield warning(name, line, "see that this is meant")
