"""Small models of every family that transformers makes, with weights large enough that a mistake anywhere shows."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"vocab_size": 96, "hidden_size": 48, "max_position_embeddings": 96, "intermediate_size": 80}
_GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 96}
_NEO = SIZES | {"num_layers": 4, "num_heads": 6, "window_size": 8, "intermediate_size": None}
_NEOX = SIZES | {"num_hidden_layers": 4, "num_attention_heads": 6, "rotary_pct": 0.5}
_LLAMA = SIZES | {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
_NO_END = {"bos_token_id": None, "eos_token_id": None}


@dataclasses.dataclass(frozen=True)
class Case:
    """Names of two classes of transformers, and what the first is made with."""

    config: str
    model: str
    options: dict[str, Any]


def _gpt2(**options: Any) -> Case:
    return Case("GPT2Config", "GPT2LMHeadModel", _GPT2 | options)


def _neo(**options: Any) -> Case:
    return Case("GPTNeoConfig", "GPTNeoForCausalLM", _NEO | {"attention_types": [[["global", "local"], 2]]} | options)


def _neox(**options: Any) -> Case:
    return Case("GPTNeoXConfig", "GPTNeoXForCausalLM", _NEOX | options)


def _llama(name: str = "Llama", **options: Any) -> Case:
    return Case(f"{name}Config", f"{name}ForCausalLM", _LLAMA | options)


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **numbers}}


CASES: dict[str, Case] = {
    "gptj": Case("GPTJConfig", "GPTJForCausalLM", _GPT2 | {"rotary_dim": 4, "tie_word_embeddings": False}),
    "gpt2": _gpt2(),
    "gpt2-own-head": _gpt2(tie_word_embeddings=False, scale_attn_weights=False, activation_function="gelu", n_inner=80),
    "gpt_neo": _neo(),
    "gpt_neo-local": _neo(attention_types=[[["local"], 4]]),
    "gpt_neo-global": _neo(attention_types=[[["global"], 4]], activation_function="gelu"),
    "gpt_neox": _neox(),
    "gpt_neox-serial": _neox(use_parallel_residual=False, hidden_act="gelu_fast", rotary_pct=1.0),
    "gpt_neox-few-biases": _neox(attention_bias=False, rope_parameters={"rope_theta": 300.0, "rope_type": "default"}),
    "llama": _llama(),
    "llama-own-keys": _llama(num_key_value_heads=6, rms_norm_eps=0.05),
    "llama-biases": _llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-linear": _llama(**_rope("linear", factor=4.0)),
    "llama-dynamic": _llama(**_rope("dynamic", factor=4.0)),
    "llama-llama3": _llama(
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=48)
    ),
    "llama-yarn": _llama(
        **_rope("yarn", factor=4.0, original_max_position_embeddings=24, beta_fast=4.0, beta_slow=0.5)
    ),
    "mistral": _llama("Mistral", sliding_window=8),
    "mistral-whole": _llama("Mistral", sliding_window=None, head_dim=10),
    "qwen2": _llama("Qwen2", tie_word_embeddings=True),
    "qwen2-window": _llama("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0),
    "qwen3": _llama("Qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3-biases": _llama("Qwen3", head_dim=12, attention_bias=True),
}


def make(case: Case) -> Any:
    """The model in float32 and evaluation mode, whose values depend on their names alone."""
    import torch
    import transformers

    own = {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if "n_embd" in case.options}
    config = getattr(transformers, case.config)(**case.options, **own, **_NO_END, attn_implementation="eager")
    model = getattr(transformers, case.model)(config).to(torch.float32).eval()
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(_values(name, tuple(parameter.shape)))
    return model


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norms around 1.2, biases that are not zero, products that neither grow nor fade much."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        is_norm = name.endswith("weight")
        return (1.2 + 0.2 * normal if is_norm else 0.3 * normal).astype(np.float32)
    if "embed_in" in name:  # GPT-NeoX repeats itself with small ones
        return (1.4 * normal).astype(np.float32)
    if any(part in name for part in ("wte", "wpe", "embed_tokens")):
        return (0.4 * normal).astype(np.float32)
    return (1.2 * normal / math.sqrt(min(shape))).astype(np.float32)


def tokens(batch: int, length: int) -> np.ndarray:
    """int32 ids of the small vocabulary."""
    return np.random.default_rng(11).integers(0, SIZES["vocab_size"], (batch, length)).astype(np.int32)


def in_older_spelling(directory: Path) -> None:
    """Makes the config.json of transformers 5 one that transformers 4 would have written."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["torch_dtype"] = config.pop("dtype", "float32")
    for key in ("layer_types", "attention_layers"):
        config.pop(key, None)
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        kind = rope.pop("rope_type", "default")
        is_neox = config["model_type"] == "gpt_neox"
        config["rotary_emb_base" if is_neox else "rope_theta"] = rope.pop("rope_theta")
        share = rope.pop("partial_rotary_factor", None)
        if share is not None:
            config["rotary_pct" if is_neox else "partial_rotary_factor"] = share
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    file.write_text(json.dumps(config))
