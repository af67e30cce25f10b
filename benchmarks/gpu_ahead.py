"""What XLA makes of the programs of benchmarks/gpu.py for an H200, found out without one.

    python benchmarks/gpu_ahead.py --out benchmarks/results/DATE-gpu-ahead-of-time.json [--only TEXT]

Needs JAX with its CUDA plugin (`pip install 'jax[cuda13]'`), and no GPU: the plugin compiles for a description of the
device. Of every program: bytes of its arguments and temporaries as the compiler lays them out (without what cuDNN takes
at run time), and the arrays of 16 MiB or more that it makes of weights. Which library computes a product is chosen by
timing on the device itself and may differ there; nothing here is a speed.
"""

# ruff: noqa: E402 (JAX reads the environment when it is imported)
from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "src"), str(Path(__file__).resolve().parent)]

import jax
import jax.numpy as jnp
from gpu_train import VARIANTS, Variant
from jax.experimental import topologies
from plan_calibration import adapted

from mesh_transformer import compat
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import DataConfig, RunConfig, TrainConfig
from mesh_transformer.config.tuning import LoraConfig
from mesh_transformer.engine.pages import page_size
from mesh_transformer.engine.programs import decode
from mesh_transformer.model.cache import empty_cache
from mesh_transformer.model.params import is_multiplied, map_table, shape
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.model.quantize import described
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT
from mesh_transformer.train.state import initial_state
from mesh_transformer.train.step import make_train_step

# As XLA writes it down for such a device.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4814259200000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
ITEMSIZE = {"f32": 4, "bf16": 2, "s8": 1, "u8": 1}
LARGE = 16 << 20
# What a step of training takes where a variant says nothing else.
USUAL: dict[str, Any] = {"loss_chunk": 4096, "attention": "cudnn"}
ADAPTER = LoraConfig(rank=8, targets=("q", "v"))


def main() -> None:
    """Compiles what is asked for and not in the file yet, and writes the file anew after each program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="programs whose name holds this")
    arguments = parser.parse_args()
    let_jax_lower_for_hopper()
    device = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices[0]
    there = jax.sharding.SingleDeviceSharding(device)
    result: dict[str, Any] = {
        "command": "python benchmarks/gpu_ahead.py --out FILE",
        "jax": jax.__version__,
        "cudnn": compat.cudnn_version(),
        "target": "NVIDIA H200, 150,754,820,096 bytes",
        "programs": json.loads(arguments.out.read_text())["programs"] if arguments.out.exists() else [],
    }
    done = {row["program"] for row in result["programs"]}
    described_by = {name: what for name, what, _ in steps_of_training()}
    for name, lower in programs(there).items():
        if arguments.only not in name or name in done:
            continue
        began = time.perf_counter()
        compiled = lower().compile()
        memory = compiled.memory_analysis()
        row = {
            "program": name,
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "compile_s": round(time.perf_counter() - began),
        }
        if name in described_by:
            row["step"] = described_by[name]
        if "decode" in name:
            row["made_of_weights"] = made_of_weights(compiled.as_text())
        print(json.dumps(row), flush=True)
        result["programs"].append(row)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def let_jax_lower_for_hopper() -> None:
    """JAX asks the GPU that is there how wide heads may be, and there is none."""
    from jax._src.cudnn import fused_attention_stablehlo

    fused_attention_stablehlo.check_compute_capability = lambda capability: True


def programs(there: Any) -> dict[str, Callable[[], Any]]:
    """Every program by name, as a function that lowers it."""
    found: dict[str, Callable[[], Any]] = {
        name: functools.partial(train, variant, there, base=what.get("base"))
        for name, what, variant in steps_of_training()
    }
    for kind in ("bfloat16", "int8", "int4"):
        for rows in (1, 2, 128):
            for unroll in (False, True):
                name = f"decode {kind}, {rows} rows, four layers {'written out' if unroll else 'in a loop'}"
                found[name] = functools.partial(step, kind, rows, unroll, there)
    return found


def steps_of_training() -> list[tuple[str, dict[str, Any], Variant]]:
    """Name, what `mesh-transformer plan` needs to know, and the variant."""
    variants = {f"train {name}: {variant.says}": variant for name, variant in VARIANTS.items()}
    plain = {"attention": "plain", "loss_chunk": 1024}
    variants["train: remat full, plain attention, batch 8"] = Variant("", remat="full", policy=plain)
    found = [(name, described_step(variant), variant) for name, variant in variants.items()]
    for remat, batch, base in (
        ("full", 1, "bfloat16"),
        ("full", 8, "bfloat16"),
        ("dots", 4, "bfloat16"),
        ("full", 8, "float32"),
    ):
        variant = Variant("", batch=batch, remat=remat, moments="float32")
        name = f"adapter of rank {ADAPTER.rank} on q and v, base in {base}, remat {remat}, batch {batch}"
        found.append((name, described_step(variant) | {"base": base}, variant))
    return found


def described_step(variant: Variant) -> dict[str, Any]:
    """What tells the step's bytes."""
    chosen = {**USUAL, **variant.policy}
    return {
        "batch_size": variant.batch,
        "remat": variant.remat,
        "moment_dtype": variant.moments,
        "attention": chosen["attention"],
        "loss_chunk": chosen["loss_chunk"],
        "unroll": chosen.get("unroll", False),
    }


def put(tree: Any, there: Any) -> Any:
    """Descriptions of arrays, on the device."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), tree)


def train(variant: Variant, there: Any, base: str | None = None) -> Any:
    """The training step of GPT-J-6B, or of ADAPTER on a GPT-J-6B in the dtype `base`."""
    cfg = preset("gpt-j-6b")
    how = TrainConfig(
        steps=1000,
        learning_rate=1e-4,
        batch_size=variant.batch,
        compute_dtype="bfloat16",
        moment_dtype=variant.moments,
        remat=variant.remat,  # type: ignore[arg-type]
    )
    policy = ComputePolicy(dtype="bfloat16", remat=how.remat, **{**USUAL, **variant.policy})
    lora = ADAPTER if base else None
    if lora:
        run = RunConfig(
            name="adapter", model=cfg, data=DataConfig(train="none", sequence_length=2048), train=how, lora=lora
        )
        state = adapted(run, ONE_DEVICE_LAYOUT, base or "float32")
    else:
        state = jax.eval_shape(lambda: initial_state(cfg, how, 0))
    state = put(state, there)
    rows = put(jax.ShapeDtypeStruct((1, variant.batch, 2049), jnp.int32), there)
    return jax.jit(make_train_step(cfg, how, policy, lora=lora), donate_argnums=0).lower(state, rows)


def step(kind: str, rows: int, unroll: bool, there: Any) -> Any:
    """A step of decoding with four of GPT-J-6B's layers, and tables of four pages."""
    cfg = dataclasses.replace(preset("gpt-j-6b"), n_layers=4)
    policy = ComputePolicy(dtype="bfloat16", unroll=unroll, attention="cudnn")

    def one(spec: Any) -> Any:
        if kind != "bfloat16" and is_multiplied(spec):
            return described(kind, spec, shape(spec, cfg))
        return jax.ShapeDtypeStruct(shape(spec, cfg), jnp.bfloat16)

    params = put(map_table(one, cfg), there)
    size = page_size(cfg.n_ctx)
    cache = put(jax.eval_shape(lambda: empty_cache(cfg, 1 + 4 * rows, size, cfg.n_ctx, jnp.bfloat16)), there)
    columns = put(jax.ShapeDtypeStruct((rows, 6), jnp.int32), there)
    compiled = jax.jit(functools.partial(decode, cfg=cfg, policy=policy), donate_argnames="cache")
    return compiled.lower(params, columns, cache=cache)


def made_of_weights(text: str) -> list[str]:
    """Arrays that the program makes with the sizes of one layer's matrix, as "dtype[shape]", once for each making."""
    fused = set(re.findall(r"calls=%([\w.\-]+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        header = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            computation = header[1]
        made = re.match(r"\s+(?:ROOT )?%[\w.\-]+ = (.*?) (fusion|fusion-start|copy|copy-start|convert)\(", line)
        if made is None or computation in fused:
            continue
        result = made[1].partition(", s32[]), ")[2] or made[1]  # of one that is begun: without what it reads
        for dtype, sizes in re.findall(r"(f32|bf16|s8|u8)\[([\d,]+)\]", result):
            numbers = [int(n) for n in sizes.split(",")]
            if math.prod(numbers) in (4096 * 4096, 4096 * 16384) and math.prod(numbers) * ITEMSIZE[dtype] >= LARGE:
                found.append(f"{dtype}[{sizes}]")
    return found


if __name__ == "__main__":
    main()
