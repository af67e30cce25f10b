"""From `[mesh]` of a configuration to devices in a grid, and everything that must divide.

The grid's axes, slowest first: pipeline, data, fsdp, tensor. Devices that exchange most lie closest together: what is
summed in every layer is innermost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import MeshConfig, RunConfig

AXES = ("pipeline", "data", "fsdp", "tensor")
# Microbatches a stage where train.pipeline_microbatches does not say: the pipeline then idles for at most a fifth.
_MICROBATCHES_A_STAGE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Devices along every axis of a mesh; all at least 1."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def n_devices(self) -> int:
        """Devices in the mesh."""
        return self.data * self.fsdp * self.tensor * self.pipeline

    @property
    def batch_ways(self) -> int:
        """Among how many devices the rows of a batch are divided."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name)}" for name in ("data", "fsdp", "tensor", "pipeline")]
        return " x ".join(part for part in parts if not part.endswith(" 1")) or "one device"


def mesh_sizes(mesh: MeshConfig, n_devices: int, *, all_devices: bool = False) -> Sizes:
    """The sizes with `data = -1` filled in.

    Args:
        n_devices: that there are.
        all_devices: every one must be used, as among several processes; otherwise a mesh of fewer takes the first.

    Raises:
        ConfigError: the mesh does not divide the devices, or needs more.
    """
    rest = mesh.fsdp * mesh.tensor * mesh.pipeline
    if mesh.data == -1:
        if n_devices % rest:
            raise ConfigError(
                f"mesh.fsdp x tensor x pipeline = {mesh.fsdp} x {mesh.tensor} x {mesh.pipeline} = {rest} must divide "
                f"the {n_devices} devices; {_nearest_product(mesh, n_devices)}"
            )
        return Sizes(data=n_devices // rest, fsdp=mesh.fsdp, tensor=mesh.tensor, pipeline=mesh.pipeline)
    sizes = Sizes(data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor, pipeline=mesh.pipeline)
    if sizes.n_devices > n_devices or (all_devices and sizes.n_devices != n_devices):
        raise ConfigError(
            f"mesh.data x fsdp x tensor x pipeline = {mesh.data} x {mesh.fsdp} x {mesh.tensor} x {mesh.pipeline} = "
            f"{sizes.n_devices}, but there are {n_devices} devices; "
            + (
                f"mesh.data = {n_devices // rest} would do"
                if n_devices % rest == 0
                else "mesh.data = -1 with " + _nearest_product(mesh, n_devices)
            )
        )
    return sizes


def _nearest_product(mesh: MeshConfig, n_devices: int) -> str:
    """The smallest change of one size that makes the product divide the devices."""
    changes = []
    for name in ("tensor", "fsdp", "pipeline"):
        size = getattr(mesh, name)
        others = mesh.fsdp * mesh.tensor * mesh.pipeline // size
        if n_devices % others == 0:
            best = _nearest_divisor(n_devices // others, size)
            changes.append((abs(best - size), f"mesh.{name} = {best} would do"))
    return min(changes)[1] if changes else "mesh.fsdp = mesh.tensor = mesh.pipeline = 1 would do"


def check_model(sizes: Sizes, cfg: ModelConfig) -> None:
    """Returns if the model's axes can be divided as the mesh asks.

    Raises:
        ConfigError: one cannot, or the model is defined by another number of shards; the message has both numbers.
    """
    widths = cfg.axis_sizes
    heads = "model.n_heads" if cfg.architecture == "v1" else "model.n_shards (the attention heads of v2)"
    shared = {} if widths["kv_heads"] == widths["heads"] else {"model.n_kv_heads": widths["kv_heads"]}
    divided = {
        "tensor": {heads: widths["heads"], **shared, "model.d_ff": widths["mlp"], "model.n_vocab": widths["vocab"]},
        "pipeline": {"model.n_layers": widths["layers"]},
        "fsdp": {"model.d_model": widths["embed"]},
    }
    for axis, whole in divided.items():
        ways = getattr(sizes, axis)
        for name, size in whole.items():
            if size % ways:
                common = math.gcd(*whole.values())
                raise ConfigError(
                    f"mesh.{axis} = {ways} must divide {name} = {size}; "
                    f"mesh.{axis} = {_nearest_divisor(common, ways)} would do"
                )
    if cfg.alternates and sizes.pipeline > 1 and cfg.n_layers // sizes.pipeline % 2:
        raise ConfigError(
            f"mesh.pipeline = {sizes.pipeline} gives every stage {cfg.n_layers // sizes.pipeline} layers, an odd "
            'number, and with model.windowed_layers = "odd" stages must begin alike; expected an even number'
        )
    if cfg.norm == "layernorm-desync" and sizes.tensor != 1:
        raise ConfigError(
            f'model.norm = "layernorm-desync" does not work with mesh.tensor = {sizes.tensor}: each shard normalises '
            "with its own values, so the number of shards defines the model; expected mesh.tensor = 1"
        )


def check_run(sizes: Sizes, run: RunConfig) -> None:
    """Returns if model, batch and sequence of a run can be divided as the mesh asks.

    Raises:
        ConfigError: one cannot; the message has both numbers and the nearest that would do.
    """
    check_model(sizes, run.model)
    batch, parts = run.train.batch_size, run.train.gradient_accumulation
    unit = parts * sizes.batch_ways
    if batch % unit:
        raise ConfigError(
            f"train.batch_size = {batch} must be a multiple of mesh.data x mesh.fsdp x train.gradient_accumulation = "
            f"{sizes.data} x {sizes.fsdp} x {parts} = {unit}; "
            f"train.batch_size = {_nearest_multiple(batch, unit)} would do"
        )
    if sizes.pipeline > 1:
        _check_microbatches(sizes, run)
        _check_rounds(sizes, run)
    for name, idle in (("pipeline_microbatches", 0), ("pipeline_interleave", 1)):
        given = getattr(run.train, name)
        if sizes.pipeline == 1 and given != idle:
            raise ConfigError(
                f"train.{name} = {given} needs stages, and mesh.pipeline is 1; leave it out, or set mesh.pipeline"
            )
    if run.mesh.shard_sequence and run.data.sequence_length % sizes.tensor:
        length = run.data.sequence_length
        nearest = _nearest_multiple(length, sizes.tensor)
        fits = nearest if nearest <= run.model.n_ctx else nearest - sizes.tensor
        mend = f"data.sequence_length = {fits} would do" if fits else "expected mesh.shard_sequence = false"
        raise ConfigError(
            f"mesh.shard_sequence needs mesh.tensor = {sizes.tensor} to divide data.sequence_length = {length}; {mend}"
        )


def _check_microbatches(sizes: Sizes, run: RunConfig) -> None:
    given = run.train.pipeline_microbatches
    rows = run.train.batch_size // run.train.gradient_accumulation // sizes.batch_ways
    if rows % sizes.pipeline:
        whole = run.train.batch_size // rows
        raise ConfigError(
            f"mesh.pipeline = {sizes.pipeline} must divide the {rows} sequences of a device's batch (train.batch_size "
            "over mesh.data, mesh.fsdp and train.gradient_accumulation); "
            f"train.batch_size = {_nearest_multiple(rows, sizes.pipeline) * whole} would do"
        )
    if given and (given % sizes.pipeline or rows % given):
        fitting = (n for n in range(sizes.pipeline, rows + 1, sizes.pipeline) if rows % n == 0)
        raise ConfigError(
            f"train.pipeline_microbatches = {given} must be a multiple of mesh.pipeline = {sizes.pipeline} that "
            f"divides the {rows} sequences of a device's batch (train.batch_size over mesh.data, mesh.fsdp and "
            f"train.gradient_accumulation); {min(fitting, key=lambda n: abs(n - given))} would do"
        )


def _check_rounds(sizes: Sizes, run: RunConfig) -> None:
    held, rounds = run.model.n_layers // sizes.pipeline, run.train.pipeline_interleave
    if held % rounds:
        raise ConfigError(
            f"train.pipeline_interleave = {rounds} must divide the {held} layers of a stage (model.n_layers = "
            f"{run.model.n_layers} over mesh.pipeline = {sizes.pipeline}); {_nearest_divisor(held, rounds)} would do"
        )
    if run.model.alternates and held // rounds % 2:
        raise ConfigError(
            f"train.pipeline_interleave = {rounds} gives a stage {held // rounds} layers at a time, an odd number, and "
            'with model.windowed_layers = "odd" all must begin alike; expected an even number'
        )


def n_microbatches(sizes: Sizes, run: RunConfig) -> int:
    """Microbatches of the run's pipeline: as configured, or the most that divide the batch, up to four a stage."""
    if run.train.pipeline_microbatches or sizes.pipeline == 1:
        return run.train.pipeline_microbatches or 1
    rows = run.train.batch_size // run.train.gradient_accumulation // sizes.batch_ways
    choices = (n * sizes.pipeline for n in range(_MICROBATCHES_A_STAGE, 0, -1))
    return next(n for n in choices if rows % n == 0)


def bubble_fraction(n_stages: int, n_microbatches: int, n_rounds: int = 1) -> float:
    """Share of the time that a stage idles: (stages - 1) / (rounds microbatches + stages - 1).

    Source: Huang et al. 2019, GPipe, section 2.3; Narayanan et al. 2021, section 2.2, for more rounds than one.
    """
    return (n_stages - 1) / (n_rounds * n_microbatches + n_stages - 1)


def device_count() -> int:
    """Devices that JAX sees, those of all processes together. Starts JAX's platform."""
    return jax.device_count()


def make_mesh(sizes: Sizes, devices: Sequence[Any] | None = None) -> Mesh:
    """The devices in a grid, in the order that JAX finds fast for them; several slices meet on the data axis.

    Args:
        devices: by default all that JAX sees, of which a smaller mesh takes the first.
    """
    found = list(jax.devices() if devices is None else devices)[: sizes.n_devices]
    shape = tuple(getattr(sizes, axis) for axis in AXES)
    return Mesh(_in_grid(found, shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _in_grid(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    from jax.experimental import mesh_utils

    n_slices = len({getattr(device, "slice_index", 0) for device in devices})
    data = shape[AXES.index("data")]
    if n_slices > 1 and data % n_slices == 0:  # the slow network between slices carries the data axis alone
        across = tuple(n_slices if axis == "data" else 1 for axis in AXES)
        within = tuple(n // slices for n, slices in zip(shape, across, strict=True))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    # Splitting: an axis may be a part of one of a TPU's torus axes, as tensor 2 in a row of 4.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))


def _nearest_multiple(n: int, unit: int) -> int:
    below = n // unit * unit
    return below if below and n - below <= below + unit - n else below + unit
