"""The texts that every contender is given, as functions of their description: no contender can get others."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from mesh_transformer.config.model import ModelConfig


def prompts(n_vocab: int, batch: int, length: int) -> list[list[int]]:
    """Random token ids, another prompt for each row: no row can use what was computed for its neighbour."""
    return np.random.default_rng(0).integers(0, n_vocab, (batch, length)).tolist()


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt, and how many tokens are written after it."""

    prompt: list[int]
    n_tokens: int


def texts(spec: dict[str, Any], turn: int) -> list[Text]:
    """`spec["texts"]` texts of mixed lengths: in every turn the same lengths, with other ids.

    Lengths are uniform from "prompt_tokens" and "output_tokens", each [smallest, largest]. Ids differ from turn to
    turn because a server may keep what it computed for a prompt.
    """
    lengths = np.random.default_rng(0)
    n_prompt, n_output = (
        lengths.integers(low, high + 1, spec["texts"]).tolist()
        for low, high in (spec["prompt_tokens"], spec["output_tokens"])
    )
    ids = np.random.default_rng(1 + turn)
    n_vocab = spec["n_vocab"]
    return [Text(ids.integers(0, n_vocab, n).tolist(), m) for n, m in zip(n_prompt, n_output, strict=True)]


def weight_bytes(cfg: ModelConfig, precision: str) -> int:
    """Bytes of weights that a decoding step reads, however many texts it writes.

    Every matrix that tokens are multiplied with, the head among them (which may be the token table), once; of int8 with
    a float32 scale for each output channel, of int4 with a float16 scale for each group of 32 (or "int4-128": 128)
    along the last contracted axis. Rows looked up in tables, norms and biases are left out: less than a thousandth.
    """
    from mesh_transformer.model import tied
    from mesh_transformer.model.params import is_multiplied, named_specs, size

    total = 0.0
    multiplied = [spec for spec in named_specs(cfg).values() if is_multiplied(spec)]
    for spec in [*multiplied, tied.SPEC] if cfg.tied_head else multiplied:
        n, contracted = size(spec, cfg), [cfg.axis_sizes[axis] for axis in spec.inputs]
        if precision == "int8":
            total += n + 4 * n / math.prod(contracted)
        elif precision.startswith("int4"):
            total += n / 2 + 2 * n / math.gcd(128 if precision == "int4-128" else 32, contracted[-1])
        else:
            total += n * (4 if precision == "float32" else 2)
    return round(total)
