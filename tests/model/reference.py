"""A slow model in plain NumPy float64, written from docs/formats.md, sections 3, 4 and 7, and from nothing else.

Parameters come as the package's nested dict (any float dtype); everything else is this file's own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

MASK = -1e10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What the shapes of the parameters do not say."""

    norm: str = "layernorm"
    position: str = "rotary"
    d_rotary: int = 0
    eps: float = 1e-5


def random_params(shapes: Any, seed: int, weight: float = 1.0) -> Any:
    """float32 values for a tree of shapes: large weights, biases that are not zero, norm scales off their start."""
    random = np.random.default_rng(seed)

    def one(path: Any, leaf: Any) -> np.ndarray:
        name = "/".join(key.key for key in path)
        normal = random.standard_normal(leaf.shape)
        if name.endswith("/scale"):
            return (1.5 + 0.3 * normal).astype(np.float32)
        if "bias" in name or name.rsplit("/", 1)[-1].startswith("b"):
            return ((1.0 if name == "relative/bias" else 0.3) * normal).astype(np.float32)
        if name.startswith("embed/"):
            return (0.7 * normal).astype(np.float32)
        fan_in = (
            math.prod(leaf.shape[1:-1]) if name.endswith(("/o", "w_out")) else leaf.shape[-3 if "attn" in name else -2]
        )
        return (weight * normal / math.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def as_float64(params: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a).astype(np.float64), params)


def norm(x: np.ndarray, p: dict[str, np.ndarray], how: Arithmetic) -> np.ndarray:
    """One vector. layernorm-desync is layernorm as long as there is one shard."""
    if how.norm in ("layernorm", "layernorm-desync", "layernorm-nobias"):
        mean = sum(x) / len(x)
        variance = sum((x - mean) ** 2) / len(x)
        y = p["scale"] * (x - mean) / math.sqrt(variance + how.eps)
        return y if how.norm == "layernorm-nobias" else y + p["bias"]
    if how.norm == "rms":
        return x / math.sqrt(sum(x**2) / len(x) + how.eps) * p["scale"]
    y = x / (math.sqrt(sum(x**2)) + how.eps) * p["scale"]
    return y + p["bias"] if how.norm in ("rmsnorm-bias", "scalenorm-bias") else y


def rotary(x: np.ndarray, position: int, d_rotary: int) -> np.ndarray:
    """One head of one token; channels from d_rotary on are left alone."""
    out = x.copy()
    for j in range(d_rotary // 2):
        angle = position * 10000.0 ** (-2 * j / d_rotary)
        out[2 * j] = x[2 * j] * math.cos(angle) - x[2 * j + 1] * math.sin(angle)
        out[2 * j + 1] = x[2 * j + 1] * math.cos(angle) + x[2 * j] * math.sin(angle)
    return out


def t5_bucket(query: int, key: int) -> int:
    n = max(query - key, 0)
    return n if n < 16 else min(31, 16 + math.trunc(16 * math.log(n / 16 + 1.19e-7) / math.log(8)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def turned(heads: np.ndarray, position: int, how: Arithmetic) -> np.ndarray:
    """A query or key of every head ([H, D]) at its place; as it is where positions are not rotary."""
    return np.stack([rotary(x, position, how.d_rotary) for x in heads]) if how.position == "rotary" else heads


def attend(q: np.ndarray, keys: list, values: list, at: int, p: Any, how: Arithmetic) -> np.ndarray:
    """One query ([H, D]) at window position `at` over all keys given, those after it masked."""
    heads, width = q.shape
    out = np.zeros((heads, width))
    for h in range(heads):
        scores = np.stack([key[h] for key in keys]) @ q[h] / math.sqrt(width)
        if how.position == "t5":
            scores += [p["relative"]["bias"][h, t5_bucket(at, s)] for s in range(len(keys))]
        scores[at + 1 :] += MASK
        out[h] = softmax(scores) @ np.stack([value[h] for value in values])
    return out


def embed(p: Any, token: int, position: int, how: Arithmetic) -> np.ndarray:
    table = p["embed"]["tokens"]
    x = table[token] if 0 <= token < len(table) else np.zeros(table.shape[1])
    x = x + p["embed"]["bias"]
    return x + p["embed"]["positions"][position] if how.position == "fixed" else x


def of_layer(p: Any, i: int) -> Any:
    return jax.tree.map(lambda a: a[i], p["layers"])


def project(h: np.ndarray, w: np.ndarray) -> np.ndarray:
    """[E] times [E, H, D]."""
    return (h @ w.reshape(w.shape[0], -1)).reshape(w.shape[1:])


def branches(x: np.ndarray, h: np.ndarray, mixed: np.ndarray, layer: Any) -> np.ndarray:
    """x + attention output + feed-forward, for one token."""
    o, mlp = layer["attn"]["o"], layer["mlp"]
    feed_forward = gelu_tanh(h @ mlp["w_in"] + mlp["b_in"]) @ mlp["w_out"] + mlp["b_out"]
    return x + mixed.reshape(-1) @ o.reshape(-1, o.shape[-1]) + feed_forward


def unembed(p: Any, x: np.ndarray, how: Arithmetic) -> np.ndarray:
    return norm(x, p["head"]["ln"], how) @ p["head"]["w"] + p["head"]["b"]


def forward(params: Any, tokens: np.ndarray, how: Arithmetic, keep: list | None = None) -> np.ndarray:
    """Logits [T, V] of one row; `keep` receives the stream [T, E] after the embedding and after every layer."""
    p = as_float64(params)
    stream = [embed(p, int(t), i, how) for i, t in enumerate(tokens)]
    for i in range(len(p["layers"]["mlp"]["b_in"])):
        if keep is not None:
            keep.append(np.stack(stream))
        layer = of_layer(p, i)
        hs = [norm(x, layer["ln_1"], how) for x in stream]
        q, k, v = ([project(h, layer["attn"][name]) for h in hs] for name in "qkv")
        q, k = ([turned(x, t, how) for t, x in enumerate(heads)] for heads in (q, k))
        mixed = [attend(q[t], k, v, t, p, how) for t in range(len(stream))]
        stream = [branches(x, h, m, layer) for x, h, m in zip(stream, hs, mixed, strict=True)]
    if keep is not None:
        keep.append(np.stack(stream))
    return np.stack([unembed(p, x, how) for x in stream])


class SlidingCache:
    """One row read token by token with a window of keys (not rotated) and values as they were first computed.

    With every token beyond the window the oldest entry goes, and all keys are rotated again by their place in what
    is left.
    """

    def __init__(self, params: Any, how: Arithmetic, window: int) -> None:
        assert how.position != "fixed"
        self.p, self.how, self.window = as_float64(params), how, window
        n_layers = len(self.p["layers"]["mlp"]["b_in"])
        self.keys: list[list[np.ndarray]] = [[] for _ in range(n_layers)]
        self.values: list[list[np.ndarray]] = [[] for _ in range(n_layers)]

    def read(self, token: int) -> np.ndarray:
        """Logits [V] after this token."""
        x = embed(self.p, token, 0, self.how)
        for i, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            layer = of_layer(self.p, i)
            h = norm(x, layer["ln_1"], self.how)
            keys.append(project(h, layer["attn"]["k"]))
            values.append(project(h, layer["attn"]["v"]))
            del keys[: -self.window], values[: -self.window]
            at = len(keys) - 1
            q = turned(project(h, layer["attn"]["q"]), at, self.how)
            again = [turned(key, place, self.how) for place, key in enumerate(keys)]
            x = branches(x, h, attend(q, again, values, at, self.p, self.how), layer)
        return unembed(self.p, x, self.how)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Per position, [..., T]."""

    loss: np.ndarray
    lse_after_max: np.ndarray
    log_partition: np.ndarray
    correct: np.ndarray


def score(logits: np.ndarray, targets: np.ndarray, top: np.ndarray | None = None) -> Scores:
    """`top`: the maximum to subtract, where it must not move with the logits (its gradient is stopped)."""
    logits = logits.astype(np.float64)
    highest = logits.max(axis=-1)
    top = highest if top is None else top
    lse = np.log(np.exp(logits - top[..., None]).sum(axis=-1))
    at_target = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return Scores(lse - (at_target - top), lse, lse + top, at_target == highest)


def total_loss(scores: Scores, weight: float, kind: str) -> float:
    """Mean token loss plus the z term: weight times the mean square of either log-sum."""
    z = scores.lse_after_max if kind == "legacy" else scores.log_partition
    return float(scores.loss.mean() + weight * (z**2).mean())
