"""Starts JAX in a process of its own and says what it found, as one line of JSON on standard output.

In a process of its own, because a wrong flag or driver ends the process in which JAX starts, or never answers.
"""

from __future__ import annotations

import json
import time
from typing import Any

_ROUNDS = 5
# Bytes that every device gives into the sum.
_BYTES = {"cpu": 4 << 20}
_BYTES_OF_ACCELERATOR = 64 << 20


def look() -> dict[str, Any]:
    """{"platform", "devices": [{"kind", "memory"}], "collective": {"bytes", "seconds", "right"} or null}.

    memory: bytes, null where the platform does not say. The collective is a sum over all devices; seconds: of the
    fastest of some.
    """
    import jax

    devices = jax.local_devices()
    described = [{"kind": device.device_kind, "memory": _memory(device)} for device in devices]
    together = _sum_over(devices) if len(devices) > 1 else None
    return {"platform": devices[0].platform, "devices": described, "collective": together}


def _memory(device: Any) -> int | None:
    statistics = device.memory_stats()
    return statistics.get("bytes_limit") if statistics else None


def _sum_over(devices: list[Any]) -> dict[str, Any]:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    n = len(devices)
    n_bytes = _BYTES.get(devices[0].platform, _BYTES_OF_ACCELERATOR)
    mesh = Mesh(np.array(devices), ("devices",))
    # Device i gives i + 1 in every place: a device that is left out, or counted twice, shows in the sum.
    values = np.repeat(np.arange(1, n + 1, dtype=np.float32), n_bytes // 4).reshape(n, -1)
    given = jax.device_put(values, NamedSharding(mesh, PartitionSpec("devices")))
    summed = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "devices"),
            mesh=mesh,
            in_specs=PartitionSpec("devices"),
            out_specs=PartitionSpec(),
        )
    )
    result = jax.block_until_ready(summed(given))
    right = all(bool(np.all(np.asarray(shard.data) == n * (n + 1) / 2)) for shard in result.addressable_shards)
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(summed(given))
        seconds.append(time.perf_counter() - began)
    return {"bytes": n_bytes, "seconds": min(seconds), "right": right}


if __name__ == "__main__":
    try:
        print(json.dumps(look()))
    except Exception as error:  # told to the process that asked
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
