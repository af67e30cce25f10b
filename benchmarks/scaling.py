"""Weak and strong scaling of a training step from one processor core to two, for each way of using a second device.

    python benchmarks/scaling.py [--preset gpt-j-demo] [--rounds 3] [--steps 5] [--output FILE.json]

One device on one core, against two devices on two cores: CPU devices share the threads of their process, so that the
cores are what is added. Strong scaling: the same batch on both. Weak: a batch twice as large on two. Each measurement
is a process of its own, pinned to its cores; they take turns, so that a machine whose speed drifts slows all alike.
Efficiency is the rate of tokens on two cores over twice that on one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

CHILD = """
import functools, json, sys, time
from mesh_transformer import compat
compat.prepare_process()
import jax, numpy as np
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.model.policy import default_policy
from mesh_transformer.sharding.layout import layout_for
from mesh_transformer.train.loop import train_batches
from mesh_transformer.train.state import abstract_state, initial_state
from mesh_transformer.train.step import make_train_step
name, steps, batch, mesh = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
model = preset(name)
run = RunConfig(
    name="scaling", model=model, data=DataConfig(train="none", sequence_length=model.n_ctx),
    train=TrainConfig(steps=1000, learning_rate=1e-4, batch_size=batch), mesh=MeshConfig(**mesh),
)
layout = layout_for(run)
where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, layout))
state = jax.jit(functools.partial(initial_state, model, run.train, 0), out_shardings=where)()
batches = train_batches(run, layout)
rows = np.random.default_rng(0).integers(0, model.n_vocab, (batch, model.n_ctx + 1)).astype(np.int32)
with layout.using():
    step = jax.jit(make_train_step(model, run.train, default_policy("float32"), layout.rules), donate_argnums=0)
    step = step.lower(state, batches.abstract).compile()
def one(state):
    state, report = step(state, batches.place(rows))
    return jax.block_until_ready(state)
state = one(state)
begun = time.perf_counter()
for _ in range(steps):
    state = one(state)
print(batch * model.n_ctx * steps / (time.perf_counter() - begun))
"""
BATCH = 8
ALONE = {"data": 1}
MESHES = {
    "data 2": {"data": 2},
    "fsdp 2, zero 1": {"data": 1, "fsdp": 2},
    "fsdp 2, zero 3": {"data": 1, "fsdp": 2, "zero": 3},
    "tensor 2": {"data": 1, "tensor": 2},
    "pipeline 2": {"data": 1, "pipeline": 2},
}


def measure(preset: str, steps: int, batch: int, mesh: dict[str, int], n_cores: int) -> float:
    """Tokens a second of one process with as many devices as cores."""
    cores = sorted(os.sched_getaffinity(0))[:n_cores]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={n_cores}",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, preset, str(steps), str(batch), json.dumps(mesh)],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return float(done.stdout)


def main() -> None:
    """Measures, prints a table, and writes the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt-j-demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two processor cores are needed")
    contenders = {("one core", BATCH): (ALONE, 1)}
    contenders |= {(name, batch): (mesh, 2) for name, mesh in MESHES.items() for batch in (BATCH, 2 * BATCH)}
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in contenders}
    for _ in range(options.rounds):
        for (name, batch), (mesh, n_cores) in contenders.items():
            rates[name, batch].append(measure(options.preset, options.steps, batch, mesh, n_cores))
            print(f"{name}, batch {batch}: {rates[name, batch][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
    median = {key: statistics.median(found) for key, found in rates.items()}
    alone = median["one core", BATCH]
    print("| two devices | strong: tokens/s | efficiency | weak: tokens/s | efficiency |")
    print("| --- | --- | --- | --- | --- |")
    for name in MESHES:
        cells = [f"{median[name, b]:,.0f} | {median[name, b] / alone / 2:.0%}" for b in (BATCH, 2 * BATCH)]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"one device on one core: {alone:,.0f} tokens/s at batch {BATCH}")
    if options.output:
        import jax

        found = [{"mesh": name, "batch": batch, "tokens_per_second": rates[name, batch]} for name, batch in rates]
        facts = {"preset": options.preset, "steps": options.steps, "jax": jax.__version__, "device": "cpu"}
        options.output.write_text(json.dumps({**facts, "measured": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
