"""`bench train`: training speed of one model, ours and a peer's side by side."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from mesh_transformer.bench.machine import machine, processor
from mesh_transformer.bench.rounds import ALLOCATOR, cpp_compiler, require_peer, spread, take_turns
from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig

__all__ = ["bench_train", "processor"]

# hf: as its documentation trains, in eager mode; torch: the same model compiled by torch.compile.
PEERS = ("hf", "torch")


def bench_train(
    model: ModelConfig,
    *,
    batch_size: int,
    sequence_length: int,
    dtypes: Sequence[str],
    against: Sequence[str],
    rounds: int,
    warmup: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Steps of every contender in turn; JSON-serialisable.

    For each: seconds a step, tokens a second and model FLOP/s (train.metrics.flops_per_token) as median, min and max,
    and the share of a bare matrix product of the same dtype timed in the same rounds. `ratios` divides, round by
    round, a peer's seconds by ours in the same dtype: above 1 ours is faster.

    Raises:
        UserError: a peer is not known or not installed.
    """
    # Imported here: everything above runs without JAX in this process.
    from mesh_transformer.train.metrics import flops_per_token

    for peer in against:
        require_peer(peer, PEERS)
        if peer == "torch" and cpp_compiler() is None:
            raise UserError("--against torch compiles the model and needs a C++ compiler: install g++, or set CXX")
    common = {
        "model": model.to_dict(),
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "threads": os.cpu_count() or 1,
    }
    specs: dict[str, dict[str, Any]] = {}
    for dtype in dtypes:
        specs[f"ours {dtype}"] = {"module": "ours", "kind": "train", "dtype": dtype, **common}
        for peer in against:
            peer_spec = {"module": "hf", "kind": "train", "compiled": peer == "torch"}
            specs[f"{peer} {dtype}"] = {**peer_spec, "dtype": dtype, **common}
        specs[f"matmul {dtype}"] = {"module": "ours", "kind": "matmul", "dtype": dtype, **common}
    descriptions, answers = take_turns(specs, rounds, warmup, progress)
    tokens = batch_size * sequence_length
    flops = tokens * flops_per_token(model, sequence_length)
    ceilings = {
        dtype: statistics.median(a["flops"] / a["seconds"] for a in answers[f"matmul {dtype}"]) for dtype in dtypes
    }
    contenders = {}
    for name, spec in specs.items():
        if spec["kind"] == "matmul":
            continue
        seconds = [a["seconds"] for a in answers[name]]
        contenders[name] = {
            "seconds": spread(seconds),
            "tokens_per_second": spread([tokens / s for s in seconds]),
            "model_flops_per_second": spread([flops / s for s in seconds]),
            "share_of_matmul": flops / statistics.median(seconds) / ceilings[spec["dtype"]],
            "loss": [answers[name][0]["loss"], answers[name][-1]["loss"]],
            "described": descriptions[name],
        }
    ratios = {}
    for dtype in dtypes:
        ours = [a["seconds"] for a in answers[f"ours {dtype}"]]
        for peer in against:
            theirs = [a["seconds"] for a in answers[f"{peer} {dtype}"]]
            ratios[f"ours over {peer}, {dtype}"] = spread([t / o for t, o in zip(theirs, ours, strict=True)])
    return {
        "benchmark": "train",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "model": model.to_dict(),
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "against": list(against),
        "rounds": rounds,
        "warmup": warmup,
        "allocator": ALLOCATOR,
        "flops_per_token": flops / tokens,
        "matmul_flops_per_second": ceilings,
        "contenders": contenders,
        "ratios": ratios,
    }
