"""Rotary positions: the frequencies of every law, and turning channels by them.

Sources: Su et al. 2021, arXiv 2104.09864; the scaling laws are named in `config.rope.RopeScaling`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from mesh_transformer.config.model import ModelConfig, RotaryLayout
from mesh_transformer.config.rope import RopeScaling
from mesh_transformer.shapes import Array, Float


def rotary_tables(n_positions: int, cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """sin and cos of every position's angles, each float32 [n_positions, d_rotary / 2].

    Computed in float64 and rounded once.
    """
    angle = np.arange(n_positions)[:, None] * frequencies(cfg)[None, :]
    factor = attention_factor(cfg.rope_scaling)
    return (factor * np.sin(angle)).astype(np.float32), (factor * np.cos(angle)).astype(np.float32)


def frequencies(cfg: ModelConfig) -> np.ndarray:
    """Radians that each pair of channels turns by per position, float64 [d_rotary / 2].

    theta^(-2 j / d_rotary), changed as the configuration's scaling says.
    """
    scaling = cfg.rope_scaling
    plain = _plain(cfg.rope_theta, cfg.d_rotary)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "dynamic":
        # The base grows with the length of the text; here that is the context, for every text alike.
        grown = max(scaling.factor * cfg.n_ctx / scaling.original_ctx - (scaling.factor - 1), 1.0)
        return _plain(cfg.rope_theta * grown ** (cfg.d_rotary / (cfg.d_rotary - 2)), cfg.d_rotary)
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, scaling, cfg)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What sines and cosines are multiplied with."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0)


def _plain(theta: float, d_rotary: int) -> np.ndarray:
    return theta ** (-np.arange(0, d_rotary, 2) / d_rotary)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones left alone, those between blended."""
    turns = scaling.original_ctx * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _yarn(plain: np.ndarray, scaling: RopeScaling, cfg: ModelConfig) -> np.ndarray:
    """Channels that turn often within the first context are left alone, slow ones divided, those between blended."""

    def channel(turns: float) -> float:
        wavelength = scaling.original_ctx / (turns * 2 * math.pi)
        return cfg.d_rotary * math.log(wavelength) / (2 * math.log(cfg.rope_theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.d_rotary - 1)
    span = high - low or 0.001
    divided = np.clip((np.arange(cfg.d_rotary // 2) - low) / span, 0.0, 1.0)
    return (1 - divided) * plain + divided * plain / scaling.factor


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    sin: Float[Array, "#batch seq half_rotary"],
    cos: Float[Array, "#batch seq half_rotary"],
    layout: RotaryLayout = "interleaved",
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotary embedding of the first channels of every head, in pairs (2j, 2j + 1) or (j, j + d_rotary / 2)."""
    d_rotary = 2 * sin.shape[-1]
    turned, rest = x[..., :d_rotary], x[..., d_rotary:]
    sin, cos = sin[:, :, None, :], cos[:, :, None, :]
    if layout == "half":
        first, second = turned[..., : d_rotary // 2], turned[..., d_rotary // 2 :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([pairs.reshape(turned.shape), rest], axis=-1)
