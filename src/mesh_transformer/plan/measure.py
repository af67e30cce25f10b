"""The devices of this machine, measured: `--device here`. The only part of `plan` that looks at a device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config.devices import Device, of_kind

# Rows and columns of the measured product, and bytes of the arrays that are read and sent, by whether it is a CPU.
_SIDE_ON_CPU, _SIDE = 1024, 8192
_READ_ON_CPU, _READ = 1 << 28, 1 << 31
_SENT_ON_CPU, _SENT = 1 << 22, 1 << 28
_ROUNDS = 5


def measured() -> tuple[Device, int]:
    """What a device of this machine does, and how many JAX sees.

    Products: the fastest of a few of square matrices; bandwidth: of sums over an array; links: an all-reduce over all
    devices, by the formula of a ring. The table only says whose device it is.
    """
    devices = jax.local_devices()
    one, on_cpu = devices[0], devices[0].platform == "cpu"
    known = of_kind(one.device_kind)
    side = _SIDE_ON_CPU if on_cpu else _SIDE
    flops = {name: _product_flops(side, name) for name in ("float32", "bfloat16")}
    near = _ring_bandwidth(devices, _SENT_ON_CPU if on_cpu else _SENT)
    device = Device(
        name="cpu" if on_cpu else one.device_kind,
        memory=_memory(one, len(devices) if on_cpu else 1),
        flops=flops,
        bandwidth=_read_bandwidth(_READ_ON_CPU if on_cpu else _READ),
        near=near,
        far=near,
        n_near=jax.device_count(),
        source=f"measured here: {one.device_kind}, jax {jax.__version__}",
        maker="other" if known is None else known.maker,
    )
    return device, jax.device_count()


def _memory(device: Any, shared_by: int) -> int:
    """Bytes that programs may use; of a CPU its part of the machine's memory."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // shared_by


def _seconds(compute: Callable[[], Any]) -> float:
    """The shortest of a few rounds, compiling left out."""
    jax.block_until_ready(compute())
    found = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        jax.block_until_ready(compute())
        found.append(time.perf_counter() - begun)
    return min(found)


def _product_flops(side: int, dtype: str) -> float:
    a = jnp.ones((side, side), dtype)
    precision = "highest" if dtype == "float32" else None
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision, preferred_element_type=jnp.float32))
    return 2 * side**3 / _seconds(lambda: product(a))


def _read_bandwidth(size: int) -> float:
    a = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return a.nbytes / _seconds(lambda: total(a))


def _ring_bandwidth(devices: list[Any], size: int) -> float:
    """Bytes a second that a device sends in an all-reduce of all; of one device alone, infinite."""
    n = len(devices)
    if n == 1:
        return float("inf")
    mesh = jax.sharding.Mesh(np.asarray(devices), ("all",))
    split = jax.sharding.PartitionSpec("all")
    a = jax.device_put(np.ones((n, size // 4), np.float32), jax.sharding.NamedSharding(mesh, split))
    add = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=split, out_specs=jax.P()))
    return 2 * (n - 1) / n * size / _seconds(lambda: add(a))
