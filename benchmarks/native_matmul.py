"""The native product beside XLA's float32 product and a bare read of memory, in turn.

    python benchmarks/native_matmul.py [--shapes 4096x16384,2048x8192] [--rows 1,8] [--seconds 1.5] [--out FILE]

Every contender multiplies once a round, each time with another matrix of a stack that is larger than the caches (except
where a shape is so small that 64 of them are not). `read`: the maximum of an array by NumPy, in as many threads as
there are cores: what memory gives. Prints milliseconds and gigabytes of weights a second, medians over the rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mesh_transformer.compat import prepare_process

prepare_process()  # the allocator's settings count only before JAX is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from mesh_transformer.bench.machine import machine  # noqa: E402
from mesh_transformer.kernels import native  # noqa: E402

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}
STACK_BYTES = 192 << 20


def contender(kind: str, inner: int, columns: int) -> Callable[[jax.Array, int], None]:
    """Multiplies once, with the next layer of a stack of this kind."""
    layers = int(min(64, max(1, STACK_BYTES // (inner * columns * BYTES[kind]))))
    scale: tuple[jax.Array, ...] = ()
    if kind == "int8":
        scale = (jnp.ones((layers, columns)),)
    if kind == "int4":
        scale = (jnp.ones((layers, inner // 32, columns), jnp.float16),)
    w = jnp.ones((layers, inner // 2 if kind == "int4" else inner, columns), native.KINDS[kind])
    indices = [jnp.int32(i) for i in range(layers)]
    product = jax.jit(lambda x, w, layer, *scale: native.matmul(x, w, layer, *scale, kind=kind))
    return lambda x, turn: product(x, w, indices[turn % layers], *scale).block_until_ready()


def xla(inner: int, columns: int) -> Callable[[jax.Array, int], None]:
    """XLA's float32 product, with matrices of their own: no copy of a slice."""
    layers = int(min(64, max(1, STACK_BYTES // (4 * inner * columns))))
    stack = [jnp.ones((inner, columns)) for _ in range(layers)]
    product = jax.jit(lambda x, w: x @ w)
    return lambda x, turn: product(x, stack[turn % layers]).block_until_ready()


def measure(shape: str, rows: int, seconds: float, pool: ThreadPoolExecutor) -> dict[str, dict[str, float]]:
    """Milliseconds and GB/s of every contender."""
    inner, columns = map(int, shape.split("x"))
    contenders = {kind: contender(kind, inner, columns) for kind in BYTES}
    contenders["xla float32"] = xla(inner, columns)
    parts = np.array_split(np.ones(STACK_BYTES // 4, np.float32), os.cpu_count() or 1)
    contenders["read"] = lambda x, turn: list(pool.map(np.max, parts)) and None
    bytes_of = {kind: inner * columns * each for kind, each in BYTES.items()}
    bytes_of |= {"xla float32": 4 * inner * columns, "read": STACK_BYTES}
    x = jnp.ones((rows, inner))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end, turn = time.perf_counter() + seconds, 0
    while turn < 6 or time.perf_counter() < end:
        for name, run in contenders.items():
            begun = time.perf_counter()
            run(x, turn)
            times[name].append(time.perf_counter() - begun)
        turn += 1
    medians = {name: statistics.median(each[2:]) for name, each in times.items()}  # the first two compile and warm up
    return {name: {"ms": s * 1e3, "gb_s": bytes_of[name] / s / 1e9} for name, s in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x16384,2048x8192,512x2048,512x50400")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "jax": jax.__version__, "path": native.description(), "rows": []}
    print(native.description(), flush=True)
    show = functools.partial(print, flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for shape in options.shapes.split(","):
            for rows in map(int, options.rows.split(",")):
                found = measure(shape, rows, options.seconds, pool)
                show(f"{shape}, {rows} rows: ", end="")
                show("; ".join(f"{name} {of['ms']:.3f} ms {of['gb_s']:.1f} GB/s" for name, of in found.items()))
                result["rows"].append({"shape": shape, "rows": rows, "contenders": found})
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
