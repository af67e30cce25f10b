"""A slow decoder in NumPy float64 for the families beside GPT-J; nothing of the package's arithmetic."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from mesh_transformer.config.model import ModelConfig


def forward(params: Any, tokens: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """Logits [T, V] of one row."""
    p = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), params)
    stream = p["embed"]["tokens"][tokens] + p["embed"].get("bias", 0.0)
    if cfg.position == "fixed":
        stream = stream + p["embed"]["positions"][: len(tokens)]
    for i in range(cfg.n_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        attended = attention(norm(stream, layer["ln_1"], cfg), layer["attn"], i, cfg)
        if cfg.residual == "serial":
            stream = stream + attended
            stream = stream + feed_forward(norm(stream, layer["ln_2"], cfg), layer["mlp"], cfg)
        else:
            second = layer["ln_2"] if cfg.residual == "parallel-two-norms" else layer["ln_1"]
            stream = stream + attended + feed_forward(norm(stream, second, cfg), layer["mlp"], cfg)
    normed = norm(stream, p["head"]["ln"], cfg)
    head = p["embed"]["tokens"].T if cfg.tied_head else p["head"]["w"]
    return normed @ head + p["head"].get("b", 0.0)


def norm(x: np.ndarray, p: Any, cfg: ModelConfig) -> np.ndarray:
    if cfg.norm == "rms":
        return rms(x, p["scale"], cfg)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + cfg.norm_eps) * p["scale"] + p["bias"]


def rms(x: np.ndarray, scale: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + cfg.norm_eps) * scale


def attention(h: np.ndarray, p: Any, layer: int, cfg: ModelConfig) -> np.ndarray:
    q, k, v = (np.einsum("te,ehd->thd", h, p[name]) + p.get(f"b_{name}", 0.0) for name in "qkv")
    if cfg.qk_norm:
        q, k = rms(q, p["q_norm"]["scale"], cfg), rms(k, p["k_norm"]["scale"], cfg)
    if cfg.position == "rotary":
        q, k = (np.stack([turned(x, t, cfg) for t, x in enumerate(each)]) for each in (q, k))
    mixed = np.zeros_like(q)
    shares = cfg.n_heads // cfg.n_kv_heads
    window = cfg.window if cfg.window and (cfg.windowed_layers == "all" or layer % 2) else cfg.n_ctx
    for t in range(len(q)):
        seen = range(max(0, t - window + 1), t + 1)
        for head in range(cfg.n_heads):
            scores = np.array([q[t, head] @ k[s, head // shares] for s in seen])
            scores = scores / math.sqrt(cfg.d_head) if cfg.scale_scores else scores
            weights = np.exp(scores - scores.max())
            mixed[t, head] = sum(w * v[s, head // shares] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return np.einsum("thd,hde->te", mixed, p["o"]) + p.get("b_o", 0.0)


def turned(heads: np.ndarray, position: int, cfg: ModelConfig) -> np.ndarray:
    """Queries or keys of one token, [heads, width]."""
    out = heads.copy()
    for j in range(cfg.d_rotary // 2):
        angle = position * slowed(cfg.rope_theta ** (-2 * j / cfg.d_rotary), cfg)
        a, b = (j, j + cfg.d_rotary // 2) if cfg.rotary_layout == "half" else (2 * j, 2 * j + 1)
        out[:, a] = heads[:, a] * math.cos(angle) - heads[:, b] * math.sin(angle)
        out[:, b] = heads[:, b] * math.cos(angle) + heads[:, a] * math.sin(angle)
    return out


def slowed(frequency: float, cfg: ModelConfig) -> float:
    """Llama 3.1's law, as its authors wrote it: by wavelengths."""
    law = cfg.rope_scaling
    if law is None:
        return frequency
    assert law.kind == "llama3"
    wavelength = 2 * math.pi / frequency
    if wavelength < law.original_ctx / law.high_freq_factor:
        return frequency
    if wavelength > law.original_ctx / law.low_freq_factor:
        return frequency / law.factor
    share = law.original_ctx / wavelength - law.low_freq_factor
    share /= law.high_freq_factor - law.low_freq_factor
    return (1 - share) * frequency / law.factor + share * frequency


def feed_forward(h: np.ndarray, p: Any, cfg: ModelConfig) -> np.ndarray:
    linear = h @ p["w_in"] + p.get("b_in", 0.0)
    if cfg.feed_forward == "glu_silu":
        gate = h @ p["w_gate"] + p.get("b_gate", 0.0)
        wide = linear * gate / (1 + np.exp(-gate))
    elif cfg.feed_forward == "gelu":
        wide = linear * 0.5 * (1 + np.vectorize(math.erf)(linear / math.sqrt(2)))
    else:
        wide = 0.5 * linear * (1 + np.tanh(math.sqrt(2 / math.pi) * (linear + 0.044715 * linear**3)))
    return wide @ p["w_out"] + p.get("b_out", 0.0)
