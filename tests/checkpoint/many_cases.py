"""A state of arrays that lie in many ways on a mesh, equal to the bit wherever it lies."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mesh_transformer.config.presets import preset

META = {"model": preset("gpt-j-tiny").to_dict()}
# A row of 1 MiB or more is stored in chunks of its own.
SPECS = {
    "params": {
        "inner": ((3, 512, 512), np.float32, P(None, "data", "tensor")),
        "rows": ((8, 256, 1024), np.float32, P("data", None, "tensor")),
        "half": ((4, 512, 1024), ml_dtypes.bfloat16, P(None, ("data", "tensor"))),
        "one_axis": ((3, 8, 32768), np.float32, P(None, "tensor")),
        "replicated": ((3, 512, 1024), ml_dtypes.bfloat16, P()),
        "indivisible": ((5, 3), np.float32, P()),
        "bias": ((16,), np.float32, P("tensor")),
    },
    "moments": {"bias": ((16,), np.float32, P(("data", "tensor")))},
    "step": ((), np.int32, P()),
    "key": ((2,), np.uint32, P()),
}


def mesh(n_devices: int, *, across: bool = False) -> Mesh:
    """The first devices as data x tensor; `across`: those of one process differ in data, not in tensor."""
    devices = np.array(jax.devices()[:n_devices])
    n_data = 2 if n_devices > 2 else 1
    grid = devices.reshape(-1, n_data).T if across else devices.reshape(n_data, -1)
    return Mesh(grid, ("data", "tensor"))


def values(seed: int) -> Any:
    """The state as np.ndarray; not numbers, signed zeros and subnormal numbers among them."""
    random = np.random.default_rng(seed)

    def one(spec: tuple) -> np.ndarray:
        shape, dtype, _ = spec
        return np.frombuffer(random.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)

    return jax.tree.map(one, SPECS, is_leaf=lambda spec: isinstance(spec, tuple))


def place(seed: int, on: Mesh) -> Any:
    """The state on a mesh, of which each process makes its own part."""

    def one(array: np.ndarray, spec: tuple) -> jax.Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(on, spec[2]), lambda index: array[index])

    return jax.tree.map(one, values(seed), SPECS, is_leaf=lambda leaf: isinstance(leaf, tuple))


def abstract(on: Mesh) -> Any:
    """What to restore onto that mesh."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec[0], spec[1], sharding=NamedSharding(on, spec[2])),
        SPECS,
        is_leaf=lambda spec: isinstance(spec, tuple),
    )


def differing(state: Any, seed: int) -> list[str]:
    """Names of the arrays of which a shard in this process is not `values(seed)` to the bit."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(values(seed)), strict=True)
    return [
        jax.tree_util.keystr(path)
        for (path, array), expected in pairs
        if array.dtype != expected.dtype
        or any(np.asarray(s.data).tobytes() != expected[s.index].tobytes() for s in array.addressable_shards)
    ]
