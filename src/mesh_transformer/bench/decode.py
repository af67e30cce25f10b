"""`bench decode`: how fast one model writes, ours in each precision and peers in theirs, in turn."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mesh_transformer.bench.contenders import NO_NATIVE, facts, ours, peers, ratios, with_weights
from mesh_transformer.bench.export import exported
from mesh_transformer.bench.rounds import spread, take_turns
from mesh_transformer.bench.work import weight_bytes
from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig

Answers = Mapping[str, Sequence[Mapping[str, Any]]]


def bench_decode(
    model: ModelConfig | str,
    *,
    batch: int,
    prompt: int,
    tokens: int,
    precisions: Sequence[str],
    against: Sequence[str],
    rounds: int,
    warmup: int,
    progress: Callable[[str], None],
    options: Sequence[str] = (),
    bandwidth: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Greedy generations of every contender in turn; JSON-serialisable.

    A turn is a generation of one token and one of `tokens`, T_1 and T_n seconds, prompt included. End to end:
    batch x tokens / T_n tokens a second. Per decoded token: (T_n - T_1) / (tokens - 1) seconds a step, in which the
    weights are read once (`work.weight_bytes`); the share is of the read bandwidth measured in the same rounds.
    `ratios` divide, round by round, a peer's T_n by ours: above 1 ours is faster.

    Args:
        model: an architecture, whose weights are random then, or where a model lies.
        options: of `convert`, where `model` is a path.
        warmup: rounds that are not counted, at least one: a peer tries its ways in its first turn.
        bandwidth: rows and columns of the matrix whose reading is timed, by default 4096 x 16384.

    Raises:
        UserError: a peer or a precision is not known, a peer is not installed, or the lengths do not fit the context.
        RunError: a contender or a converter failed.
    """
    mine, theirs = ours(precisions), peers(against)
    work = {"batch": batch, "prompt": prompt, "tokens": tokens}
    threads = {"threads": os.cpu_count() or 1}
    with exported(model, ctranslate2="ctranslate2" in against, progress=progress, options=options) as found:
        cfg = found.cfg
        _check_lengths(prompt, tokens, cfg.n_ctx)
        common = {"kind": "decode", "n_vocab": cfg.n_vocab, **threads, **work}
        specs = with_weights({**mine, **theirs}, found, common)
        memory = {"module": "ours_decode", "kind": "bandwidth", **threads, **(bandwidth or {})}
        descriptions, answers = take_turns({**specs, "bandwidth": memory}, rounds, warmup, progress)
    readable = _bandwidth(answers.pop("bandwidth"))
    contenders = {
        name: _figures(cfg, spec, answers, name, readable["median"])
        | {"precision": spec["precision"], "described": descriptions[name]}
        for name, spec in specs.items()
    }
    how: dict[str, Any] = {"precisions": precisions, "against": against, "rounds": rounds, "warmup": warmup}
    return {
        **facts("decode", cfg, random=isinstance(model, ModelConfig), **how),
        **threads,
        **work,
        "read_bytes_per_second": readable,
        "contenders": contenders,
        "ratios": ratios(answers, mine, theirs),
        "best": _best(contenders, list(mine), list(theirs)),
    }


def _check_lengths(prompt: int, tokens: int, n_ctx: int) -> None:
    if tokens < 2:
        raise UserError(f"--tokens {tokens}: at least 2 are needed, to tell writing from reading the prompt")
    if prompt + tokens > n_ctx:
        raise UserError(
            f"--prompt {prompt} and --tokens {tokens} do not fit the model's context of {n_ctx} together; "
            "give smaller ones"
        )


def _figures(cfg: ModelConfig, spec: Mapping[str, Any], answers: Answers, name: str, readable: float) -> dict[str, Any]:
    turns = answers[name]
    step = [(turn["whole"] - turn["first"]) / (spec["tokens"] - 1) for turn in turns]
    n_bytes = weight_bytes(cfg, spec["precision"])
    middle = statistics.median(step)
    reference = next(iter(answers.values()))[0]["tokens"]
    return {
        "seconds": spread([turn["whole"] for turn in turns]),
        "first_token_seconds": spread([turn["first"] for turn in turns]),
        "tokens_per_second": spread([spec["batch"] * spec["tokens"] / turn["whole"] for turn in turns]),
        "seconds_per_step": spread(step),
        "decoded_tokens_per_second": spec["batch"] / middle if middle > 0 else None,
        "weight_bytes_per_step": n_bytes,
        "share_of_bandwidth": n_bytes / middle / readable if middle > 0 else None,
        # Tokens at the beginning that are those of the first contender, of batch x tokens: the same model computes.
        "same_tokens": sum(_common(a, b) for a, b in zip(turns[0]["tokens"], reference, strict=True)),
    }


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _bandwidth(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the way that reads fastest, by its median."""
    ways = {name: [turn["bytes_per_second"][name] for turn in turns] for name in turns[0]["bytes_per_second"]}
    best = max(ways, key=lambda name: statistics.median(ways[name]))
    return {**spread(ways[best]), "way": best}


def _best(contenders: Mapping[str, Any], mine: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """The fastest of ours, of ours without native kernels and of the peers, by their medians; those that took part."""
    groups = {
        "ours": mine,
        "ours without native kernels": [name for name in mine if NO_NATIVE in name],
        "peers": theirs,
    }
    rate = lambda name: contenders[name]["tokens_per_second"]["median"]  # noqa: E731
    return {group: max(names, key=rate) for group, names in groups.items() if names}
