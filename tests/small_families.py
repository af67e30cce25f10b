"""One small model of every family beside GPT-J, each with what its family has that GPT-J has not."""

from __future__ import annotations

import functools
from typing import Any

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.rope import RopeScaling
from mesh_transformer.model.params import abstract_params
from model import reference

_GPT2: dict[str, Any] = {"position": "fixed", "residual": "serial", "tied_head": True}
_LLAMA: dict[str, Any] = {
    "norm": "rms", "residual": "serial", "rotary_layout": "half", "feed_forward": "glu_silu", "d_head": 8,
    "n_kv_heads": 4,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2 | {"biases": ("qkv", "out", "mlp")},
    "gpt_neo": _GPT2 | {"window": 5, "windowed_layers": "odd", "scale_scores": False, "biases": ("out", "mlp")},
    "gpt_neox": {
        "residual": "parallel-two-norms", "rotary_layout": "half", "d_rotary": 2, "feed_forward": "gelu",
        "biases": ("qkv", "out", "mlp"),
    },
    "llama": _LLAMA
    | {
        "rope_theta": 500.0,
        "rope_scaling": RopeScaling(
            kind="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_ctx=8
        ),
        "biases": (),
    },
    "mistral": _LLAMA | {"window": 6, "biases": ()},
    "qwen2": _LLAMA | {"tied_head": True, "biases": ("qkv",)},
    "qwen3": _LLAMA | {"tied_head": True, "qk_norm": True, "biases": ()},
}  # fmt: skip
NAMES = tuple(_OWN)
# No family, but most of what they have: default tests have no time for the whole list.
_SHARED = _OWN["qwen2"] | {
    "window": 6, "windowed_layers": "odd", "qk_norm": True, "biases": ("qkv", "out", "mlp", "head"),
}  # fmt: skip


@functools.cache
def small(name: str, **sizes: int) -> ModelConfig:
    """The small model of a family, or "shared"; sizes that are not named are those of two layers of width 32."""
    usual = {"n_layers": 2, "d_model": 32, "n_heads": 8, "d_ff": 48, "n_vocab": 40, "n_ctx": 16}
    own = _SHARED if name == "shared" else _OWN[name]
    return ModelConfig(**(usual | own | sizes))


def params_of(cfg: ModelConfig, seed: int = 2, weight: float = 1.3) -> Any:
    """float32 values for NumPy, every one of which counts: `reference.random_params`, but for a table that is also the
    head: a smaller one, or the likeliest next token would be the newest.
    """
    params = reference.random_params(abstract_params(cfg), seed, weight=weight)
    if cfg.tied_head:
        params["embed"]["tokens"] *= 0.4
    return params
