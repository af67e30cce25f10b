"""Training steps of GPT-J-6B, with every choice that they leave."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_rows import Rows, in_turns, peak_bytes

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import TrainConfig
from mesh_transformer.model.policy import ComputePolicy, default_policy
from mesh_transformer.train.metrics import flops_per_token, peak_flops
from mesh_transformer.train.state import initial_state
from mesh_transformer.train.step import make_train_step

STEPS, WARMUP = 10, 2


@dataclasses.dataclass(frozen=True)
class Variant:
    """A step: its batch, and what differs from the policy that `mesh-transformer train` takes on this platform."""

    says: str
    batch: int = 8
    remat: str = "dots"
    moments: str = "bfloat16"
    policy: dict[str, Any] = dataclasses.field(default_factory=dict)
    compiler: dict[str, Any] = dataclasses.field(default_factory=dict)


_SCHEDULED = {"xla_gpu_enable_latency_hiding_scheduler": True}
VARIANTS: dict[str, Variant] = {
    "default": Variant("batch 8, moments in bfloat16, remat dots"),
    "unrolled": Variant("its layers written out", policy={"unroll": True}),
    "batch-10": Variant("batch 10", batch=10),
    "batch-12-unrolled": Variant("batch 12, layers written out", batch=12, policy={"unroll": True}),
    "full": Variant("remat full, batch 8", remat="full"),
    "full-batch-32": Variant("remat full, batch 32", batch=32, remat="full"),
    "plain-attention": Variant("attention in its plain form, batch 4", batch=4, policy={"attention": "plain"}),
    "float32-moments": Variant("moments in float32, batch 6", batch=6, moments="float32"),
}
# Of four layers: one choice changed at a time.
CHANGES: dict[str, Variant] = {
    "default": Variant(""),
    "layers written out": Variant("", policy={"unroll": True}),
    "attention in its plain form": Variant("", policy={"attention": "plain"}),
    "remat full": Variant("", remat="full"),
    "remat none": Variant("", remat="none"),
    "loss in chunks of 1024": Variant("", policy={"loss_chunk": 1024}),
    "loss in chunks of 16384": Variant("", policy={"loss_chunk": 16384}),
    "latency-hiding scheduler": Variant("", compiler=_SCHEDULED),
    "no command buffers": Variant("", compiler={"xla_gpu_enable_command_buffer": ""}),
    "no Triton products": Variant("", compiler={"xla_gpu_enable_triton_gemm": False}),
}


class Step:
    """One variant, compiled and with its state on the device."""

    def __init__(self, cfg: ModelConfig, variant: Variant, seq: int) -> None:
        self._n_tokens = variant.batch * seq
        train = TrainConfig(
            steps=1000,
            learning_rate=1e-4,
            batch_size=variant.batch,
            compute_dtype="bfloat16",
            moment_dtype=variant.moments,
            remat=variant.remat,  # type: ignore[arg-type]
        )
        self.policy: ComputePolicy = dataclasses.replace(default_policy("bfloat16", train.remat), **variant.policy)
        began = time.perf_counter()
        self._state = jax.block_until_ready(jax.jit(functools.partial(initial_state, cfg, train, 0))())
        self.init_s = time.perf_counter() - began
        ids = np.random.default_rng(0).integers(0, cfg.n_vocab, (1, variant.batch, seq + 1), np.int32)
        self._rows = jnp.asarray(ids)
        began = time.perf_counter()
        step = jax.jit(
            make_train_step(cfg, train, self.policy),
            donate_argnums=0,
            compiler_options=variant.compiler or None,
        )
        self._step = step.lower(self._state, self._rows).compile()
        self.compile_s = time.perf_counter() - began
        memory = self._step.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes if memory else None

    def __call__(self) -> jax.Array:
        """One step; its loss, which the device still computes."""
        self._state, report = self._step(self._state, self._rows)
        return report.loss

    def speed(self, cfg: ModelConfig, seq: int, seconds: float) -> dict[str, float | None]:
        """Tokens a second, and the share of the device's peak that the model's own FLOPs are."""
        tokens, peak = self._n_tokens / seconds, peak_flops(1)
        flops = tokens * flops_per_token(cfg, seq)
        return {
            "tokens_per_second": tokens,
            "TFLOP_per_s": flops / 1e12,
            "mfu": flops / peak if peak else None,
        }


def train(variant: Variant, rows: Rows) -> None:
    """Steps of the whole model; each is waited for, as the command's loop does."""
    cfg, seq = preset("gpt-j-6b"), 2048
    if rows.rehearse:
        cfg, seq = dataclasses.replace(preset("gpt-j-tiny"), n_layers=1), 32
    variant = dataclasses.replace(variant, batch=2) if rows.rehearse else variant

    def measure() -> dict[str, Any]:
        step = Step(cfg, variant, seq)
        seconds, losses = [], []
        for _ in range(WARMUP + STEPS):
            began = time.perf_counter()
            losses.append(float(step()))
            seconds.append(time.perf_counter() - began)
        counted = seconds[WARMUP:]
        return {
            **step.speed(cfg, seq, statistics.median(counted)),
            "seconds": statistics.median(counted),
            "fastest": min(counted),
            "slowest": max(counted),
            "losses": [losses[0], losses[-1]],
            "policy": dataclasses.asdict(step.policy),
            "batch": variant.batch,
            "sequence": seq,
            "moments": variant.moments,
            "init_s": step.init_s,
            "compile_s": step.compile_s,
            "temporary_bytes": step.temporary_bytes,
            "peak_bytes": peak_bytes(),
        }

    rows.row(variant.says, measure)


def ablation(rows: Rows) -> None:
    """Four layers at full width, every change beside the default in turns; the ratio is default over changed."""
    cfg = dataclasses.replace(preset("gpt-j-tiny" if rows.rehearse else "gpt-j-6b"), n_layers=1 if rows.rehearse else 4)
    seq, batch = (32, 2) if rows.rehearse else (2048, 8)
    default = Step(cfg, dataclasses.replace(CHANGES["default"], batch=batch), seq)

    def measure(changed: Variant) -> dict[str, Any]:
        compiler = {} if rows.rehearse else changed.compiler
        other = Step(cfg, dataclasses.replace(changed, batch=batch, compiler=compiler), seq)
        found = in_turns({"default": default, "changed": other}, rounds=2 if rows.rehearse else 9)
        seconds = {name: each["seconds"] for name, each in found.items()}
        return {
            "ratio": seconds["default"] / seconds["changed"],
            **found,
            "compile_s": other.compile_s,
            "temporary_bytes": other.temporary_bytes,
        }

    for name, changed in CHANGES.items():
        if name == "default" or (rows.rehearse and name != "remat full"):
            continue
        rows.row(name, functools.partial(measure, changed))
        gc.collect()
