"""The v2 architecture in plain NumPy float64, written from docs/formats.md, section 8, over its twelve fused arrays.

The arrays are whole (one host), under short names of their own; `split` gives them the package's names and shapes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import reference

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the configuration: layers, d_model, n_heads, d_head, n_vocab, cores_per_replica, pe_rotary_dims."""

    layers: int
    d: int
    heads: int
    d_head: int
    vocab: int
    shards: int
    rotary: int

    @property
    def loc(self) -> int:
        return self.heads * self.d_head // self.shards

    @property
    def f(self) -> int:
        return 4 * self.d // self.shards


def random_arrays(at: Sizes, seed: int) -> Arrays:
    """float32 in the shapes of section 8.2: large weights, biases that are not zero, norm scales off one."""
    random = np.random.default_rng(seed)
    total = at.heads * at.d_head
    made = {
        "embed.b": 0.3 * random.standard_normal(at.d),
        "embed.w": 0.7 * random.standard_normal((at.vocab, at.d)),
        "final.offset": 0.3 * random.standard_normal(at.d),
        "final.scale": 1.5 + 0.3 * random.standard_normal(at.d),
        "head.b": 0.3 * random.standard_normal(at.vocab),
        "head.w": random.standard_normal((at.d, at.vocab)) / math.sqrt(at.d),
        "norm.offset": 0.3 * random.standard_normal((at.layers, at.d)),
        "norm.scale": 1.0 + 0.2 * random.standard_normal((at.layers, at.d)),
        "in.b": 0.3 * random.standard_normal((at.layers, 3 * total + 8 * at.d)),
        "in.w": random.standard_normal((at.layers, at.d, 3 * total + 8 * at.d)) / math.sqrt(at.d),
        "out.b": 0.3 * random.standard_normal((at.layers, at.d)),
        "out.w": random.standard_normal((at.layers, total + 4 * at.d, at.d)) / math.sqrt(total + 4 * at.d),
    }
    return {name: array.astype(np.float32) for name, array in made.items()}


def forward(arrays: Arrays, tokens: np.ndarray, at: Sizes) -> np.ndarray:
    """Logits [T, V] of one row."""
    p = {name: array.astype(np.float64) for name, array in arrays.items()}
    how = reference.Arithmetic()
    x = p["embed.w"][tokens] + p["embed.b"]
    for i in range(at.layers):
        own = {"scale": p["norm.scale"][i], "bias": p["norm.offset"][i]}
        h = np.stack([reference.norm(row, own, how) for row in x])
        inner = h @ p["in.w"][i] + p["in.b"][i]
        mixed = []
        for group in np.split(inner, at.shards, axis=-1):
            q, v, k, linear, gate = np.split(group, np.cumsum([at.loc, at.loc, at.loc, at.f]), axis=-1)
            mixed += [attend(q, k, v, at), linear * reference.gelu_tanh(gate)]
        x = x + np.concatenate(mixed, axis=-1) @ p["out.w"][i] + p["out.b"][i]
    own = {"scale": p["final.scale"], "bias": p["final.offset"]}
    return np.stack([reference.norm(row, own, how) for row in x]) @ p["head.w"] + p["head.b"]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, at: Sizes) -> np.ndarray:
    """One shard's heads, [T, loc] each, which the reshape merges into one."""
    q, k = (np.stack([reference.rotary(row, t, at.rotary) for t, row in enumerate(a)]) for a in (q, k))
    scores = q @ k.T / math.sqrt(at.d_head)
    scores += np.triu(np.full(scores.shape, reference.MASK), 1)
    return np.stack([reference.softmax(row) for row in scores]) @ v


def split(arrays: Arrays, at: Sizes) -> Any:
    """The package's parameters: the same values, each matrix on its own."""
    lead, total = (at.layers, at.d, at.shards), at.heads * at.d_head
    q, v, k, linear, gate = np.split(
        arrays["in.w"].reshape(*lead, -1), np.cumsum([at.loc, at.loc, at.loc, at.f]), axis=-1
    )
    b_q, b_v, b_k, b_linear, b_gate = np.split(
        arrays["in.b"].reshape(at.layers, at.shards, -1), np.cumsum([at.loc, at.loc, at.loc, at.f]), axis=-1
    )
    o, w_out = np.split(arrays["out.w"].reshape(at.layers, at.shards, -1, at.d), [at.loc], axis=2)
    assert q[0].size == at.d * total
    return {
        "embed": {"tokens": arrays["embed.w"], "bias": arrays["embed.b"]},
        "layers": {
            "ln_1": {"scale": arrays["norm.scale"], "bias": arrays["norm.offset"]},
            "attn": {"q": q, "k": k, "v": v, "o": o, "b_q": b_q, "b_k": b_k, "b_v": b_v},
            "mlp": {
                "w_in": linear.reshape(at.layers, at.d, -1),
                "b_in": b_linear.reshape(at.layers, -1),
                "w_gate": gate.reshape(at.layers, at.d, -1),
                "b_gate": b_gate.reshape(at.layers, -1),
                "w_out": w_out.reshape(at.layers, -1, at.d),
                "b_out": arrays["out.b"],
            },
        },
        "head": {
            "ln": {"scale": arrays["final.scale"], "bias": arrays["final.offset"]},
            "w": arrays["head.w"],
            "b": arrays["head.b"],
        },
    }
