"""What each fast form of the training step on CPU is worth: with all of them, with each one left out, and with none.

    python benchmarks/train_ablation.py [--dtype bfloat16] [--rounds 5] [--output FILE]

All programs are compiled first and stay in one process; then they take a step each in turn, round after round, on one
state that goes from hand to hand. `ratio` divides, round by round, the seconds of the step with everything by those of
the step with something left out, and is the median of that: 0.8 means that without it the step has four fifths of its
speed. With --losses N the fast and the plain step also train N steps each from the same beginning on the same rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer import compat
from mesh_transformer.bench.ours import batch
from mesh_transformer.bench.rounds import spread
from mesh_transformer.bench.train import processor
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import TrainConfig
from mesh_transformer.model.policy import CPU_FORMS, ComputePolicy, default_policy
from mesh_transformer.train.state import initial_state
from mesh_transformer.train.step import make_train_step

BATCH_SIZE = 8


def policies(dtype: str) -> dict[str, ComputePolicy]:
    """The default policy, with one thing after another taken from it."""
    whole = default_policy(dtype)
    change = functools.partial(dataclasses.replace, whole)
    found = {"all": whole}
    forms = default_policy(dtype).forms
    found |= {f"without {form}": change(forms=forms - {form}) for form in sorted(forms)}
    found |= {f"with {form}": change(forms=forms | {form}) for form in sorted(CPU_FORMS - forms)}
    found["without written-out layers"] = change(unroll=False)
    found["recomputing every layer"] = change(remat="full")
    found["plain forms"] = change(forms=frozenset())
    return found


def compiled(model: ModelConfig, train: TrainConfig, policy: ComputePolicy, state: Any, rows: Any) -> Any:
    """The training step as the command compiles it."""
    return jax.jit(make_train_step(model, train, policy), donate_argnums=0).lower(state, rows).compile()


def ablation(model: ModelConfig, train: TrainConfig, rounds: int) -> dict[str, Any]:
    """Name -> seconds, tokens a second, ratio to everything, and megabytes of temporary memory."""
    rows = jnp.asarray(batch(model.n_vocab, BATCH_SIZE, model.n_ctx))[None]
    state = jax.jit(functools.partial(initial_state, model, train, 0))()
    programs = {}
    for name, policy in policies(train.compute_dtype or "float32").items():
        print(f"compiling: {name}", file=sys.stderr)
        programs[name] = compiled(model, train, policy, state, rows)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds + 1):
        for name, program in programs.items():
            begun = time.perf_counter()
            state, _ = program(state, rows)
            jax.block_until_ready(state)
            if i:  # the first is warm-up
                seconds[name].append(time.perf_counter() - begun)
        print(f"round {i} of {rounds}", file=sys.stderr)
    tokens = BATCH_SIZE * model.n_ctx
    return {
        name: {
            "seconds": spread(seconds[name]),
            "tokens_per_second": tokens / statistics.median(seconds[name]),
            "ratio": spread([a / b for a, b in zip(seconds["all"], seconds[name], strict=True)]),
            "temporary_mb": program.memory_analysis().temp_size_in_bytes / 1e6,
        }
        for name, program in programs.items()
    }


def losses(model: ModelConfig, dtype: str, steps: int) -> dict[str, Any]:
    """Losses of the same steps in the fast and the plain forms; rows are arithmetic sequences, which can be learned."""
    train = TrainConfig(steps=steps, learning_rate=1e-3, batch_size=BATCH_SIZE, compute_dtype=dtype)
    found = {}
    for name, forms in (("fast", default_policy(dtype).forms), ("plain", frozenset[Any]())):
        state = jax.jit(functools.partial(initial_state, model, train, 0))()
        policy = dataclasses.replace(default_policy(dtype), forms=forms)
        step, of_this = compiled(model, train, policy, state, rows_of(model, 0)), []
        for i in range(steps):
            state, report = step(state, rows_of(model, i))
            of_this.append(float(report.loss))
        found[name] = of_this
    distance = np.abs(np.subtract(found["fast"], found["plain"]))
    return {"steps": steps, "largest_difference": float(distance.max()), **found}


def rows_of(model: ModelConfig, i: int) -> jax.Array:
    """The rows of step i: ids that go up by a step of their own, int32 [1, batch, n_ctx + 1]."""
    random = np.random.default_rng(i)
    begin, by = random.integers(0, model.n_vocab, BATCH_SIZE), random.integers(1, 8, BATCH_SIZE)
    rows = (begin[:, None] + by[:, None] * np.arange(model.n_ctx + 1)) % model.n_vocab
    return jnp.asarray(rows[None].astype(np.int32))


def main() -> None:
    """Measures, prints a table, and writes the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt-j-77m")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="both unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--losses", type=int, default=0, metavar="N", help="also train gpt-j-demo N steps in both forms"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    compat.prepare_process()
    model = preset(options.preset)
    result: dict[str, Any] = {
        "benchmark": "train_ablation",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "jax": jax.__version__,
        "preset": options.preset,
        "batch_size": BATCH_SIZE,
        "rounds": options.rounds,
        "forms": {},
        "losses": {},
    }
    for dtype in options.dtype or ["bfloat16", "float32"]:
        train = TrainConfig(steps=10_000, learning_rate=1e-4, batch_size=BATCH_SIZE, compute_dtype=dtype)
        found = result["forms"][dtype] = ablation(model, train, options.rounds)
        for name, figures in found.items():
            print(
                f"{dtype:9} {name:28} {figures['tokens_per_second']:8,.0f} tokens/s {figures['ratio']['median']:6.2f}"
            )
        if options.losses:
            result["losses"][dtype] = losses(preset("gpt-j-demo"), dtype, options.losses)
            print(f"{dtype:9} losses apart by {result['losses'][dtype]['largest_difference']:.1e} at the most")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
