"""Named architectures.

`gpt-j-6b` is the published model. `2.7b` to `23b` are the shapes on which the original reported throughput, all with
GPT-J's vocabulary, context and rotary width (the original measured the three smaller ones on 256 byte values). `40b` is
GPT-J enlarged to the size that the original named as its limit on TPU v3, a shape of this project's own.
`gpt-j-77m`, `gpt-j-0.6b` and `llama-77m` are the models of the CPU benchmarks, the last with as many values in every
layer's matrices as the first; `gpt-j-demo` is what `mesh-transformer demo` trains in minutes on two CPU cores;
`gpt-j-tiny` is for tests. The other families' presets are their published models, with
the vocabularies that their files hold, padding included.
"""

from __future__ import annotations

import dataclasses

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.rope import RopeScaling


def _gpt_j(n_layers: int, d_model: int, n_heads: int) -> ModelConfig:
    return ModelConfig(
        n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_vocab=50400, n_ctx=2048, position="rotary", d_rotary=64
    )


def _gpt2(n_layers: int, d_model: int, n_heads: int) -> ModelConfig:
    return ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_vocab=50257,
        n_ctx=1024,
        position="fixed",
        residual="serial",
        tied_head=True,
        biases=("qkv", "out", "mlp"),
    )


def _gpt_neo(n_layers: int, d_model: int, n_heads: int) -> ModelConfig:
    return dataclasses.replace(
        _gpt2(n_layers, d_model, n_heads),
        n_ctx=2048,
        window=256,
        windowed_layers="odd",
        scale_scores=False,
        biases=("out", "mlp"),
    )


def _gpt_neox(n_layers: int, d_model: int, n_heads: int, n_vocab: int = 50304) -> ModelConfig:
    """A Pythia; GPT-NeoX-20B differs in its gelu."""
    return ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_vocab=n_vocab,
        n_ctx=2048,
        d_rotary=d_model // n_heads // 4,
        residual="parallel-two-norms",
        rotary_layout="half",
        feed_forward="gelu",
        biases=("qkv", "out", "mlp"),
    )


_LLAMA_2_7B = ModelConfig(
    n_layers=32,
    d_model=4096,
    n_heads=32,
    d_ff=11008,
    n_vocab=32000,
    n_ctx=4096,
    norm="rms",
    residual="serial",
    rotary_layout="half",
    feed_forward="glu_silu",
    biases=(),
)

PRESETS: dict[str, ModelConfig] = {
    "gpt-j-6b": _gpt_j(28, 4096, 16),
    "gpt-j-2.7b": _gpt_j(24, 3072, 24),
    "gpt-j-4.8b": _gpt_j(24, 4096, 32),
    "gpt-j-10b": _gpt_j(32, 5120, 40),
    "gpt-j-13b": _gpt_j(28, 6144, 32),
    "gpt-j-23b": _gpt_j(28, 8192, 32),
    "gpt-j-40b": _gpt_j(64, 7168, 32),
    "gpt-j-77m": ModelConfig(n_layers=8, d_model=512, n_heads=8, n_vocab=50400, n_ctx=256, d_rotary=64),
    "gpt-j-0.6b": _gpt_j(8, 2048, 16),
    "gpt-j-demo": ModelConfig(n_layers=4, d_model=256, n_heads=4, n_vocab=2048, n_ctx=128, d_rotary=32),
    "gpt-j-tiny": ModelConfig(n_layers=2, d_model=64, n_heads=4, n_vocab=512, n_ctx=128, d_rotary=8),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt-neo-125m": _gpt_neo(12, 768, 12),
    "gpt-neo-1.3b": _gpt_neo(24, 2048, 16),
    "gpt-neo-2.7b": _gpt_neo(32, 2560, 20),
    "pythia-70m": _gpt_neox(6, 512, 8),
    "pythia-160m": _gpt_neox(12, 768, 12),
    "pythia-410m": _gpt_neox(24, 1024, 16),
    "pythia-1b": _gpt_neox(16, 2048, 8),
    "pythia-1.4b": _gpt_neox(24, 2048, 16),
    "pythia-2.8b": _gpt_neox(32, 2560, 32),
    "pythia-6.9b": _gpt_neox(32, 4096, 32, 50432),
    "pythia-12b": _gpt_neox(36, 5120, 40, 50688),
    "gpt-neox-20b": dataclasses.replace(_gpt_neox(44, 6144, 64, 50432), feed_forward="gelu_tanh"),
    "llama-2-7b": _LLAMA_2_7B,
    "llama-3.1-8b": dataclasses.replace(
        _LLAMA_2_7B,
        n_kv_heads=8,
        d_ff=14336,
        n_vocab=128256,
        n_ctx=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_ctx=8192),
    ),
    "llama-77m": dataclasses.replace(
        _LLAMA_2_7B,
        n_layers=8,
        d_model=512,
        n_heads=8,
        n_kv_heads=4,
        d_head=64,
        d_rotary=64,
        d_ff=1536,
        n_vocab=50400,
        n_ctx=256,
    ),
    "qwen3-0.6b": dataclasses.replace(
        _LLAMA_2_7B,
        n_layers=28,
        d_model=1024,
        n_heads=16,
        n_kv_heads=8,
        d_head=128,
        d_rotary=128,
        d_ff=3072,
        n_vocab=151936,
        n_ctx=40960,
        norm_eps=1e-6,
        tied_head=True,
        qk_norm=True,
        rope_theta=1000000.0,
    ),
}
# Short names: those by which the original's benchmark page calls its shapes, and one more after their pattern.
ALIASES = {name: f"gpt-j-{name}" for name in ("2.7b", "4.8b", "10b", "13b", "23b", "40b")}


def preset(name: str) -> ModelConfig:
    """The architecture called `name`.

    Raises:
        ConfigError: there is no such preset; the message lists those that exist.
    """
    found = PRESETS.get(ALIASES.get(name, name))
    if found is None:
        raise ConfigError(f"model.preset = {name!r} is not known; expected one of: {', '.join([*PRESETS, *ALIASES])}")
    return found
