"""A mesh and the rules for it, as one thing to hand around: what programs, states and batches are laid out by."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import MeshConfig, RunConfig
from mesh_transformer.sharding.mesh import (
    Sizes,
    bubble_fraction,
    check_model,
    check_run,
    make_mesh,
    mesh_sizes,
    n_microbatches,
)
from mesh_transformer.sharding.rules import ONE_DEVICE, Rules, rules_for


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Devices and how things lie on them; one device without a mesh. Compared by identity."""

    sizes: Sizes
    mesh: Mesh | None
    rules: Rules

    def using(self) -> contextlib.AbstractContextManager[Any]:
        """Within it programs are traced for this mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def sharding(self, spec: PartitionSpec | None = None) -> Sharding:
        """The sharding of a partition spec of the rules; by default the same value on every device."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(self.mesh, spec or PartitionSpec())

    def place_rows(self, values: np.ndarray) -> jax.Array:
        """[batch ...], the same in every process, each row with the device that computes it; see `padded_rows`."""
        return place_array(values, self.sharding(self.rules.use(("batch", *(None,) * (values.ndim - 1)))))

    def padded_rows(self, n: int) -> int:
        """The next number of rows that the devices can share equally."""
        return -(-n // self.sizes.batch_ways) * self.sizes.batch_ways

    def rows(self, n_leading: int = 0) -> Sharding:
        """The sharding of [..., batch, anything] with `n_leading` axes before the batch."""
        return self.sharding(self.rules.use((*(None,) * n_leading, "batch", None)))


ONE_DEVICE_LAYOUT = Layout(sizes=Sizes(), mesh=None, rules=ONE_DEVICE)


def layout_for(run: RunConfig, *, n_processes: int = 1, devices: Sequence[Any] | None = None) -> Layout:
    """The layout of a run on the devices that JAX sees, or on those given.

    Raises:
        ConfigError: something does not divide; the message has the numbers and the nearest that would do.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(run.mesh, len(found), all_devices=n_processes > 1)
    check_run(sizes, run)
    if sizes.n_devices == 1:
        return ONE_DEVICE_LAYOUT
    return Layout(sizes=sizes, mesh=make_mesh(sizes, found), rules=rules_of(run, sizes))


def rules_of(run: RunConfig, sizes: Sizes) -> Rules:
    """Where everything of a run lies on a mesh of these sizes."""
    return rules_for(
        sizes,
        zero=run.mesh.zero,
        gather=run.train.gather,
        shard_sequence=run.mesh.shard_sequence,
        n_microbatches=n_microbatches(sizes, run),
        n_rounds=run.train.pipeline_interleave,
    )


def inference_layout(mesh: MeshConfig, cfg: ModelConfig, *, together: bool = False) -> Layout:
    """The layout of a model that is computed with and not trained, on the devices of this process; where `together`,
    on those of all processes, every one of them used.

    Raises:
        ConfigError: something does not divide, there are fewer devices, or an axis is of use in training alone.
    """
    for name in ("fsdp", "pipeline"):
        if getattr(mesh, name) != 1:
            raise ConfigError(
                f"mesh.{name} = {getattr(mesh, name)} is for training; a model that is not trained lies over "
                "data and tensor, for example data=2,tensor=4"
            )
    devices = jax.devices() if together else jax.local_devices()
    sizes = mesh_sizes(mesh, len(devices), all_devices=together)
    check_model(sizes, cfg)
    if sizes.n_devices == 1:
        return ONE_DEVICE_LAYOUT
    return Layout(sizes=sizes, mesh=make_mesh(sizes, devices), rules=rules_for(sizes))


def describe(layout: Layout, n_devices: int) -> str:
    """One line for the user: the mesh, and what a pipeline leaves idle."""
    sizes, rules = layout.sizes, layout.rules
    unused = (
        f"; {n_devices - sizes.n_devices} of {n_devices} devices are not used" if n_devices > sizes.n_devices else ""
    )
    line = f"mesh: {sizes}{unused}"
    if rules.n_stages > 1:
        idle = bubble_fraction(rules.n_stages, rules.n_microbatches, rules.n_rounds)
        rounds = f" in {rules.n_rounds} rounds" if rules.n_rounds > 1 else ""
        line += f"; {rules.n_stages} stages, {rules.n_microbatches} microbatches{rounds}: each stage idles {idle:.1%}"
        line += " of a step"
    return line


def place_array(values: Any, sharding: Sharding) -> jax.Array:
    """A host array, the same in every process, as a global one; each process moves only what its devices hold."""
    if sharding.is_fully_addressable:
        return jax.device_put(values, sharding)
    values = np.asarray(values)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
