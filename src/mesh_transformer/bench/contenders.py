"""Which contenders take part in `bench decode` and `bench serve`, by the names that results have for them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mesh_transformer.bench.export import Exported
from mesh_transformer.bench.machine import machine
from mesh_transformer.bench.rounds import ALLOCATOR, require_peer, spread
from mesh_transformer.config.dtypes import dtype_name
from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig

# Ends the names of our contenders that compute by XLA's products alone.
NO_NATIVE = "without native kernels"
_OFF = {"MESH_TRANSFORMER_NATIVE": "off"}


def ours(precisions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> what it is, for each precision; twice where native kernels are there: with them and without.

    Raises:
        UserError: a precision is neither a dtype nor a quantisation.
    """
    from mesh_transformer.kernels import native
    from mesh_transformer.model.quantize import QUANTIZATIONS

    found: dict[str, dict[str, Any]] = {}
    for given in precisions:
        if given in QUANTIZATIONS:
            precision = given
        else:
            try:
                precision = dtype_name(given)
            except UserError as error:
                raise UserError(f"{error}; or a quantisation: {', '.join(QUANTIZATIONS)}") from error
        spec = {"module": "ours_decode", "precision": precision}
        if native.available():
            found[f"ours {precision}"] = spec
        found[f"ours {precision} {NO_NATIVE}"] = {**spec, "environment": _OFF}
    if not found:
        raise UserError("no precision is given; expected some of float32, bfloat16, " + ", ".join(QUANTIZATIONS))
    return found


def peers(against: Sequence[str], known: Sequence[str] = ("hf", "ctranslate2", "torch")) -> dict[str, dict[str, Any]]:
    """Name -> what it is, for every precision that each peer has on this machine.

    Raises:
        UserError: a peer is not known or not installed.
    """
    for peer in against:
        require_peer(peer, known)
    found: dict[str, dict[str, Any]] = {}
    for peer in against:
        for precision in _precisions(peer):
            module = "ct2" if peer == "ctranslate2" else "hf_decode"
            found[f"{peer} {precision}"] = {"module": module, "precision": precision}
    return found


def with_weights(
    contenders: Mapping[str, dict[str, Any]], weights: Exported, common: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Name -> all that its process is told: what it is, what all have in common, and where its weights lie."""
    places = {
        name: weights.ctranslate2 if c["module"] == "ct2" else weights.huggingface for name, c in contenders.items()
    }
    return {name: {**c, **common, "directory": str(places[name])} for name, c in contenders.items()}


def facts(
    benchmark: str,
    cfg: ModelConfig,
    *,
    random: bool,
    precisions: Sequence[str],
    against: Sequence[str],
    rounds: int,
    warmup: int,
) -> dict[str, Any]:
    """What every result says first: what was measured, when, where and how."""
    return {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "model": cfg.to_dict(),
        "weights": "random" if random else "of a model",
        "precisions": list(precisions),
        "against": list(against),
        "rounds": rounds,
        "warmup": warmup,
        "allocator": ALLOCATOR,
    }


def ratios(
    answers: Mapping[str, Sequence[Mapping[str, Any]]], mine: Iterable[str], theirs: Iterable[str]
) -> dict[str, dict[str, float]]:
    """ "OURS over PEER": the peer's seconds over ours, round by round; above 1 ours is faster."""
    return {
        f"{our} over {their}": spread(
            [b["whole"] / a["whole"] for a, b in zip(answers[our], answers[their], strict=True)]
        )
        for our in mine
        for their in theirs
    }


def _precisions(peer: str) -> list[str]:
    if peer == "hf":
        return ["float32", "bfloat16"]
    if peer == "torch":
        return ["int8"]
    from mesh_transformer.bench.ct2 import compute_types

    return compute_types()
