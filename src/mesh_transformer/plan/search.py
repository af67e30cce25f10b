"""Which meshes, remats, accumulations and precisions fit, best first; and where none does, what would."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from mesh_transformer.config.devices import Device
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.run import MESH_AXES, MeshConfig, RunConfig
from mesh_transformer.plan.memory import StepBytes, step_bytes
from mesh_transformer.plan.speed import PRODUCTS_REACH, StepTime, step_time
from mesh_transformer.plan.work import Work, attention_kernel, default_dtype, loss_chunk, work_of

_REMATS = ("none", "dots", "full")
# Two speeds closer than this count as equal: then the plan with fewer changes stands first.
_ALIKE = 1.02
# Devices that are tried where fewer do not hold the model.
_MOST_DEVICES = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on so many devices: bytes and time. changes: keys that differ from the configuration, with their values."""

    run: RunConfig
    device: Device
    work: Work
    bytes: StepBytes
    time: StepTime
    changes: dict[str, Any]

    @property
    def room(self) -> float:
        """Bytes left on a device; below 0: missing."""
        return self.device.usable - self.bytes.total

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.room >= 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumed:
    """What a plan cannot know: the part of the peak that products reach, and with [lora] the dtype in which the model
    is stored that rests (None: `train.param_dtype`).
    """

    products_reach: float = PRODUCTS_REACH
    base: str | None = None


AS_USUAL = Assumed()


def plan(run: RunConfig, device: Device, n_devices: int, *, assumed: Assumed = AS_USUAL) -> Plan:
    """One plan, of the configuration as it is given.

    Raises:
        ConfigError: something does not divide, or [lora] cannot be had.
    """
    kernel = attention_kernel(run, device)
    work = work_of(
        run, n_devices, dtype=default_dtype(run, device), kernel=kernel, chunk=loss_chunk(device), base=assumed.base
    )
    time = step_time(run, work, device, reach=assumed.products_reach)
    n_bytes = step_bytes(run, work, update_in_place=device.maker == "nvidia" and n_devices == 1)
    return Plan(run=run, device=device, work=work, bytes=n_bytes, time=time, changes={})


def changed(run: RunConfig, **values: Any) -> tuple[RunConfig, dict[str, Any]]:
    """The run with dotted keys (mesh__tensor=4) set, and those of them that are changes.

    Raises:
        ConfigError: the values do not go together.
    """
    differing = {}
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split("__")
        if getattr(getattr(run, section), name) != value:
            differing[f"{section}.{name}"] = value
            by_section.setdefault(section, {})[name] = value
    parts: dict[str, Any] = {name: dataclasses.replace(getattr(run, name), **new) for name, new in by_section.items()}
    return (dataclasses.replace(run, **parts) if parts else run), differing


def meshes(run: RunConfig, n_devices: int, device: Device) -> Iterator[dict[str, Any]]:
    """Meshes of so many devices, as keys for `changed`; `tensor` stays within a machine."""
    for tensor in _divisors(n_devices):
        if tensor > min(device.n_near, 64):
            continue
        for stages in _divisors(n_devices // tensor):
            if run.model.n_layers % stages:
                continue
            for fsdp in _divisors(n_devices // tensor // stages):
                data = n_devices // tensor // stages // fsdp
                sizes = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor, "mesh__pipeline": stages}
                for zero in (1, 3) if fsdp > 1 else (1,):
                    yield {**sizes, "mesh__zero": zero}


def ranked(
    run: RunConfig,
    device: Device,
    n_devices: int,
    *,
    only_mesh: bool = False,
    assumed: Assumed = AS_USUAL,
    precisions: bool = True,
) -> list[Plan]:
    """All plans of the run on so many devices, with the same batch: those that fit first, then by speed.

    only_mesh: the mesh stays. precisions: moments in bfloat16 are tried too.
    """
    laid = _resolved(run, n_devices)
    places: list[dict[str, Any]] = [{}] if only_mesh else list(meshes(run, n_devices, device))
    moments = dict.fromkeys((run.train.moment_dtype, *(("bfloat16",) if precisions else ())))
    remats = dict.fromkeys((run.train.remat, *_REMATS))
    found = []
    for place in places:
        fixed = _sizes_of(laid, place)
        if run.train.batch_size % (fixed["data"] * fixed["fsdp"]):
            continue
        a_device = run.train.batch_size // (fixed["data"] * fixed["fsdp"])
        for parts in _divisors(a_device):
            for remat in remats:
                for moment in moments:
                    how = {"train__gradient_accumulation": parts, "train__remat": remat, "train__moment_dtype": moment}
                    try:
                        new, changes = changed(laid, **place, **how)
                        found.append(plan(new, device, n_devices, assumed=assumed))
                    except ConfigError:  # something does not divide: no plan
                        continue
                    found[-1].changes.update(changes)
    return sorted(found, key=_worth)


def nearness(one: Plan) -> tuple[int, float]:
    """The smaller, the fewer keys a plan changes; then the faster it is."""
    return _weight(one.changes), one.time.seconds


def more_devices(run: RunConfig, device: Device, n_devices: int, *, assumed: Assumed = AS_USUAL) -> Plan | None:
    """The fastest plan on the smallest number of devices that holds the run, doubled from `n_devices`; None: none does.

    The batch grows with the devices where it does not divide among them.
    """
    n = 2 * n_devices
    while n <= _MOST_DEVICES:
        batches = [run.train.batch_size, math.lcm(run.train.batch_size, n)]
        for batch in dict.fromkeys(batches):
            anywhere = {"mesh__data": -1, "mesh__fsdp": 1, "mesh__tensor": 1, "mesh__pipeline": 1}
            new, _ = changed(run, **anywhere, train__batch_size=batch, train__gradient_accumulation=1)
            fitting = [one for one in ranked(new, device, n, assumed=assumed, precisions=False) if one.fits]
            if fitting:
                return fitting[0]
        n *= 2
    return None


def shorter_sequence(run: RunConfig, device: Device, n_devices: int, *, assumed: Assumed = AS_USUAL) -> int | None:
    """The longest half, quarter ... of the sequence with which the run would fit as it is laid out; None: none does."""
    length = run.data.sequence_length // 2
    while length >= 128:
        try:
            new, _ = changed(run, data__sequence_length=length)
            if plan(new, device, n_devices, assumed=assumed).fits:
                return length
        except ConfigError:  # shard_sequence divides no such length
            return None
        length //= 2
    return None


def _resolved(run: RunConfig, n_devices: int) -> RunConfig:
    """The run with `mesh.data = -1` filled in, so that only real changes count as such."""
    mesh = run.mesh
    rest = mesh.fsdp * mesh.tensor * mesh.pipeline
    if mesh.data != -1 or n_devices % rest:
        return run
    return dataclasses.replace(run, mesh=dataclasses.replace(mesh, data=n_devices // rest))


def _sizes_of(run: RunConfig, place: dict[str, Any]) -> dict[str, int]:
    mesh: MeshConfig = run.mesh
    return {axis: place.get(f"mesh__{axis}", getattr(mesh, axis)) for axis in MESH_AXES}


def _weight(changes: dict[str, Any]) -> int:
    """How far a plan is from the configuration: a mesh counts once, whatever its axes."""
    meshes_changed = any(key.startswith("mesh.") for key in changes)
    return meshes_changed + sum(not key.startswith("mesh.") for key in changes)


def _worth(one: Plan) -> tuple[Any, ...]:
    speed = round(math.log(one.time.tokens_per_second) / math.log(_ALIKE))
    return (not one.fits, -speed if one.fits else -one.room, _weight(one.changes), one.bytes.total)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
