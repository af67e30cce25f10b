"""Whether splash attention and its gradients compile for a TPU, found out without one.

    python benchmarks/splash_ahead.py [--topology v5e:2x2]

Needs libtpu (`pip install 'mesh-transformer[tpu]'`), which compiles for a description of the device. Says for one
device, with and without a sliding window, and for a mesh of data 2, tensor 2, how many kernels the program calls and
what it takes beside its arguments. Nothing here is a speed.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import Any

# What libtpu asks its environment where there is no TPU.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import libtpu

os.environ["TPU_LIBRARY_PATH"] = libtpu.get_library_path()

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from mesh_transformer.kernels.accelerators import causal_attention

SHAPE = (4, 2048, 16, 256)


def main() -> None:
    """Compiles, and prints a line a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2", help="of four devices, as libtpu names it")
    devices = topologies.get_topology_desc(parser.parse_args().topology, "tpu").devices
    print(f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}")
    for window in (2048, 1024):
        report(f"one device, window {window}", window, SingleDeviceSharding(devices[0]))
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        report("mesh 2 x 2", 2048, NamedSharding(mesh, PartitionSpec("data", None, "tensor", None)))


def report(name: str, window: int, there: Any) -> None:
    """Compiles attention with its gradients."""
    compute = functools.partial(causal_attention, scale=SHAPE[-1] ** -0.5, window=window, kind="splash")
    q = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=there)
    gradients = jax.grad(lambda q, k, v: jnp.sum(compute(q, k, v).astype(jnp.float32)), argnums=(0, 1, 2))
    compiled = jax.jit(gradients).lower(q, q, q).compile()
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(f"{name}: {kernels} kernels, {temporaries / 1e6:.1f} MB beside arguments and results", flush=True)


if __name__ == "__main__":
    main()
