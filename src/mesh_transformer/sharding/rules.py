"""Where logical axes lie on a mesh. Mesh axis names appear in this room and nowhere else.

A strategy is three maps from logical axis to mesh axes: how parameters rest (`store`), how the optimizer's moments
and the gradients they are fed rest (`moments`), and how parameters and activations lie while in use (`compute`). The
difference of the first and the last is what ZeRO-style sharding gathers; where they agree nothing moves. Without a
mesh (`on_mesh` False: one device) every question is answered by None and every placement is the identity, so that one
forward pass serves both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from mesh_transformer.config.run import Gather
from mesh_transformer.sharding.mesh import AXES, Sizes
from mesh_transformer.sharding.moving import moved

Where = Mapping[str, tuple[str, ...]]  # logical axis -> mesh axes, outermost first
Axes = tuple[str | None, ...]  # logical axis names; None for an axis that is never split

# The residual stream, on which norms and sums act; "stream" is its sequence axis.
STREAM: Axes = ("batch", "stream", "embed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """A sharding strategy.

    n_stages, n_rounds, n_microbatches: of the pipeline; 1 without one. gather: when parameters that rest apart are
    brought together, in each layer or once a step.
    """

    store: Where = dataclasses.field(default_factory=dict)
    moments: Where = dataclasses.field(default_factory=dict)
    compute: Where = dataclasses.field(default_factory=dict)
    n_stages: int = 1
    n_rounds: int = 1
    n_microbatches: int = 1
    gather: Gather = "per_layer"
    on_mesh: bool = True

    def param(self, axes: Axes) -> PartitionSpec | None:
        """How a parameter rests."""
        return self._spec(self.store, axes)

    def moment(self, axes: Axes) -> PartitionSpec | None:
        """How a parameter's gradient and its moments rest."""
        return self._spec(self.moments, axes)

    def use(self, axes: Axes) -> PartitionSpec | None:
        """How an array lies while it is computed with."""
        return self._spec(self.compute, axes)

    def partial(self, axes: Axes, over: str) -> PartitionSpec | None:
        """As `use`, for a product not yet summed over the mesh axes that hold the contracted axis `over`."""
        spec, held = self.use(axes), self.compute.get(over)
        if spec is None or held is None:
            return spec
        return PartitionSpec(*spec, unreduced=set(held))

    def weight(self, axes: Axes) -> PartitionSpec | None:
        """As `use`, for a matrix whose gradient stays unsummed over the batch's devices until somebody asks for it.

        The sum is then made once, where gradients are placed, and not in every microbatch or tick.
        """
        spec, held = self.use(axes), self.compute.get("batch")
        if spec is None or held is None or self._staged(axes):
            return spec
        return PartitionSpec(*spec, reduced=set(held))

    def waiting(self, axes: Axes) -> PartitionSpec | None:
        """As `param`, with a gradient unsummed over those of the batch's devices that hold the same of it."""
        spec, held = self.param(axes), self.compute.get("batch", ())
        alike = set(held) - {name for axis in axes if axis for name in self.store.get(axis, ())}
        if spec is None or not alike or self._staged(axes):
            return spec
        return PartitionSpec(*spec, reduced=alike)

    def _staged(self, axes: Axes) -> bool:
        """Whether a parameter is divided over stages: `jax.vmap` over them takes no promise about its gradient."""
        return self.n_stages > 1 and "layers" in axes

    def share(self, x: Any, axes: Axes, *, over: str) -> Any:
        """`x` placed for products whose results are divided by `over`.

        The gradients of all these products are added before they are summed over the mesh: the one all-reduce of the
        backward pass (Megatron's f; Shoeybi et al. 2019, section 3).
        """
        spec, held = self.use(axes), self.compute.get(over)
        return self._moved(x, spec if spec is None or held is None else PartitionSpec(*spec, reduced=set(held)))

    def place(self, x: Any, axes: Axes) -> Any:
        """`x` moved to where `use(axes)` says; sums a partial product (the layer's all-reduce)."""
        return self._moved(x, self.use(axes))

    def place_param(self, w: Any, axes: Axes) -> Any:
        """`w` moved to where the parameter rests."""
        return self._moved(w, self.param(axes))

    def place_moment(self, g: Any, axes: Axes) -> Any:
        """A gradient, or a parameter that is about to be updated, moved to where the moments rest."""
        return self._moved(g, self.moment(axes))

    def place_weight(self, w: Any, axes: Axes) -> Any:
        """A matrix moved to where `weight` says."""
        return self._moved(w, self.weight(axes))

    def place_waiting(self, w: Any, axes: Axes) -> Any:
        """A matrix marked as `waiting` says; nothing moves."""
        return self._moved(w, self.waiting(axes))

    @property
    def gathers(self) -> bool:
        """Whether parameters rest in another layout than they are used in."""
        return any(held != self.compute.get(axis) for axis, held in self.store.items())

    @property
    def gathered(self) -> Rules:
        """The rules for parameters that were brought together beforehand."""
        return dataclasses.replace(self, store=self.compute)

    @property
    def after_stages(self) -> Rules:
        """The rules behind a pipeline, which leaves the batch spread over its stages too: none repeats the head."""
        if self.n_stages == 1:
            return self
        batch = (*self.compute.get("batch", ()), "pipeline")
        return dataclasses.replace(
            self, compute={**self.compute, "batch": batch}, n_stages=1, n_rounds=1, n_microbatches=1
        )

    def ways(self, axis: str) -> int:
        """Among how many devices a logical axis is divided while in use. Asks the mesh in use."""
        if not self.on_mesh:
            return 1
        sizes = jax.sharding.get_abstract_mesh().shape
        return math.prod(sizes[name] for name in self.compute.get(axis, ()))

    def _moved(self, x: Any, spec: PartitionSpec | None) -> Any:
        if spec is None or jax.typeof(x).sharding.spec == spec:
            return x
        # Within `jax.vmap` over the stages nothing can be done by hand.
        return moved(x, spec) if self.n_stages == 1 else jax.sharding.reshard(x, spec)

    def _spec(self, where: Where, axes: Axes) -> PartitionSpec | None:
        if not self.on_mesh:
            return None
        return PartitionSpec(*(_entry(where.get(axis, ())) if axis else None for axis in axes))


def _entry(held: tuple[str, ...]) -> Any:
    return held[0] if len(held) == 1 else held or None


ONE_DEVICE = Rules(on_mesh=False)


def rules_for(
    sizes: Sizes,
    *,
    zero: int = 1,
    gather: Gather = "per_layer",
    shard_sequence: bool = False,
    n_microbatches: int = 1,
    n_rounds: int = 1,
) -> Rules:
    """The strategy that a mesh of these sizes means; ONE_DEVICE for a mesh of one.

    Heads, feed-forward width and vocabulary lie over `tensor`, layers over `pipeline`, the batch over `data` and
    `fsdp`. `fsdp` also holds the `embed` axis of the moments (`zero` 1) or of parameters and moments (3).

    Args:
        shard_sequence: norms and residual stream lie over `tensor` by their sequence axis.
        n_microbatches, n_rounds: of a pipeline.
    """
    if sizes.n_devices == 1:
        return ONE_DEVICE
    widths = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), "tensor")
    model = _present({**widths, "layers": "pipeline"}, sizes)
    apart = _present({"embed": "fsdp"}, sizes)
    batch = tuple(name for name in ("data", "fsdp") if getattr(sizes, name) > 1)
    stream = _present({"stream": "tensor"} if shard_sequence else {}, sizes)
    return Rules(
        store=model | (apart if zero == 3 else {}),
        moments=model | apart,
        compute=model | stream | ({"batch": batch} if batch else {}),
        n_stages=sizes.pipeline,
        n_rounds=n_rounds if sizes.pipeline > 1 else 1,
        n_microbatches=n_microbatches if sizes.pipeline > 1 else 1,
        gather=gather,
    )


def _present(where: Mapping[str, str], sizes: Sizes) -> dict[str, tuple[str, ...]]:
    """The entries whose mesh axis has more than one device."""
    assert set(where.values()) <= set(AXES)
    return {axis: (name,) for axis, name in where.items() if getattr(sizes, name) > 1}
