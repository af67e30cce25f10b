"""Disk for the checkpoints of a run, and memory for its state: the least that they need, from the parameter table."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from mesh_transformer.checkpoint.opening import step_directories
from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.config.dtypes import ITEMSIZE
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import RunConfig
from mesh_transformer.doctor.finding import Finding, failed, ok, warning
from mesh_transformer.doctor.machine import gib, memory
from mesh_transformer.doctor.storage import PlaceError, nearest_directory
from mesh_transformer.model.lora import factor_shape
from mesh_transformer.model.params import ParamSpec, named_specs, shape
from mesh_transformer.sharding.layout import rules_of
from mesh_transformer.sharding.memory import state_bytes
from mesh_transformer.sharding.mesh import Sizes
from mesh_transformer.sharding.rules import Axes
from mesh_transformer.train.state import trained_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes. checkpoint: of one on the disk. device: what rests on each device, with the gradients of a step."""

    checkpoint: int
    device: int


def checkpoint_bytes(run: RunConfig) -> int:
    """Of the arrays of one checkpoint: what is trained and its two moments; with [lora] the adapter's alone."""
    train = run.train
    values = sum(math.prod(dimensions) for _, dimensions in _trained(run))
    param = 4 if run.lora else ITEMSIZE[train.param_dtype]
    return values * (param + 2 * ITEMSIZE[train.moment_dtype])


def needs_of(run: RunConfig, sizes: Sizes) -> Needs:
    """The least that the run needs on a mesh of these sizes. Activations, logits and workspace come on top."""
    rules = rules_of(run, sizes)
    sizes_of = {
        "param_itemsize": 4 if run.lora else ITEMSIZE[run.train.param_dtype],
        "moment_itemsize": ITEMSIZE[run.train.moment_dtype],
    }
    held = state_bytes(_trained(run), rules, sizes, **sizes_of)
    device = held.params + held.gradients + held.moments
    if run.lora:  # the model under the adapter is held as it is stored: in 16 bits at the least
        base = _with_shapes(run.model, list(named_specs(run.model).values()))
        device += state_bytes(base, rules, sizes, param_itemsize=2).params
    return Needs(checkpoint=checkpoint_bytes(run), device=device)


def _trained(run: RunConfig) -> list[tuple[Axes, tuple[int, ...]]]:
    if run.lora is None:
        return _with_shapes(run.model, list(named_specs(run.model).values()))
    table = trained_table(run.model, run.lora)
    leaves = jax.tree.leaves(table, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    return [(leaf.axes, factor_shape(leaf, run.model, run.lora.rank)) for leaf in leaves]


def _with_shapes(model: ModelConfig, specs: list[ParamSpec]) -> list[tuple[Axes, tuple[int, ...]]]:
    return [(spec.axes, shape(spec, model)) for spec in specs]


# --------------------------------------------------------------------------------------------------------------- disk


def check_disk(run: RunConfig) -> Iterator[Finding]:
    """Room for the newest checkpoints, one more while it is written, and those that are kept for good."""
    directory = RunDirectory(run.run_directory).checkpoints
    one = checkpoint_bytes(run)
    try:
        place = nearest_directory(directory)
    except PlaceError as error:
        yield failed("disk", str(error), error.mend)
        return
    status = os.statvfs(place)
    # What is there already will be replaced, or is kept and counted as needed.
    free = status.f_bavail * status.f_frsize + _bytes_under(directory)
    saves = math.ceil(run.train.steps / run.train.checkpoint_every) if run.train.steps else run.train.keep_last + 1
    newest = min(saves, run.train.keep_last + 1)
    steps, every = run.train.steps or 0, run.train.keep_every
    for_good = max(0, steps // every - newest) if every else 0
    whole = f"{newest + for_good} of {gib(one)}"
    mend = "free space, lower train.keep_last and train.keep_every, or set log.directory to another disk"
    if free < newest * one:
        message = f"{gib(free)} free at {place}; checkpoints at one time: {newest} of {gib(one)}"
        yield failed("disk", message, mend)
    elif free < (newest + for_good) * one:
        yield warning("disk", f"{gib(free)} free at {place}; checkpoints in the end: {whole}", mend)
    else:
        yield ok("disk", f"{gib(free)} free at {place}; checkpoints at one time: {whole}")


def _bytes_under(directory: Path) -> int:
    steps = step_directories(directory).values()
    files = (Path(parent, name) for step in steps for parent, _, names in os.walk(step) for name in names)
    return sum(path.lstat().st_size for path in files)


# ------------------------------------------------------------------------------------------------------------- memory


def check_memory(
    run: RunConfig, sizes: Sizes, *, platform: str, n_local: int, device_memory: int | None
) -> Iterator[Finding]:
    """The state against the devices' memory, and the copy that a checkpoint is written from against this machine's.

    Args:
        n_local: devices of this machine.
        device_memory: bytes of one; None where the platform does not say, as the CPU's, whose devices share this
            machine's memory.
    """
    needs = needs_of(run, sizes)
    # Each process copies what its own devices hold; a replicated array is copied once.
    copy = needs.checkpoint * min(n_local, sizes.n_devices) // sizes.n_devices
    host = copy
    if platform == "cpu":
        host += needs.device * min(n_local, sizes.n_devices)
    elif device_memory is not None:
        yield _of_device(needs.device, device_memory)
    total, available = memory()
    parts = (
        f"{gib(host)} at the least for state and a checkpoint's copy" if platform == "cpu" else f"{gib(host)} for it"
    )
    what = parts if platform == "cpu" else f"a checkpoint is copied to this machine before it is written, {parts}"
    mend = "use a smaller model, bfloat16 moments (train.moment_dtype), more machines, or a machine with more memory"
    if host > total:
        yield failed("memory", f"{what}; this machine has {gib(total)}", mend)
    elif host > available:
        message = f"{what}; {gib(available)} of this machine's {gib(total)} are free"
        yield warning("memory", message, "end what else runs here")
    else:
        yield ok("memory", f"{what}; {gib(available)} are free")


def _of_device(needed: int, there: int) -> Finding:
    what = f"{gib(needed)} for parameters, gradients and moments; a device has {gib(there)}"
    if needed > there:
        mend = "mesh.fsdp with mesh.zero = 3 or mesh.tensor divides them; `mesh-transformer plan CONFIG` says what fits"
        return failed("device memory", what, mend)
    return ok("device memory", f"{what}; activations come on top (`mesh-transformer plan CONFIG`)")
