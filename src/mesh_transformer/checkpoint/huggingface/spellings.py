"""How the config.json of each family spells the fields of `ModelConfig`, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh_transformer.checkpoint.huggingface.keys import Keys, Spelling
from mesh_transformer.checkpoint.huggingface.rope import read_rope, write_rope
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import Bias, ModelConfig

# What transformers calls each activation.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}
_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu"}


def _biases(*parts: tuple[Any, tuple[Bias, ...]]) -> list[Bias]:
    return [name for there, names in parts if there for name in names]


# ------------------------------------------------------------------------------------------ GPT-J, GPT-2, GPT-Neo


def _read_gptj(keys: Keys) -> dict[str, Any]:
    keys.only("activation_function", "gelu_new")
    keys.only("tie_word_embeddings", False)
    keys.only("scale_attn_weights", True)  # this and the next stand in the published file
    keys.only("rotary", True)
    keys.get("n_ctx")
    return {"d_rotary": keys.size("rotary_dim", 64)}


def _write_gptj(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "rotary_dim": cfg.d_rotary,
        "n_inner": None if cfg.d_ff == 4 * cfg.d_model else cfg.d_ff,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _read_gpt2(keys: Keys) -> dict[str, Any]:
    keys.only("scale_attn_by_inverse_layer_idx", False)
    keys.only("add_cross_attention", False)
    keys.get("n_ctx")  # an older name of n_positions, never read
    return {
        "position": "fixed",
        "residual": "serial",
        "feed_forward": _ACTIVATIONS[keys.only("activation_function", *_ACTIVATIONS)],
        "tied_head": keys.get("tie_word_embeddings", True),
        "scale_scores": keys.get("scale_attn_weights", True),
        "biases": ["qkv", "out", "mlp"],
    }


def _write_gpt2(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "n_inner": None if cfg.d_ff == 4 * cfg.d_model else cfg.d_ff,
        "activation_function": _NAMES[cfg.feed_forward],
        "scale_attn_weights": cfg.scale_scores,
        "tie_word_embeddings": cfg.tied_head,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _read_gpt_neo(keys: Keys) -> dict[str, Any]:
    n_layers = keys.get("num_layers")
    kinds = keys.get("attention_types", [[["global", "local"], 12]])
    try:
        layers = [str(kind) for pattern, times in kinds for _ in range(min(int(times), 4096)) for kind in pattern]
    except (TypeError, ValueError) as error:
        raise keys.refuse("attention_types", 'expected a list such as [[["global", "local"], 12]]') from error
    if len(layers) != n_layers:
        raise keys.refuse("attention_types", f"it is for {len(layers)} layers, and num_layers is {n_layers}")
    window: dict[str, Any] = {"window": keys.size("window_size", 256)}
    if layers == [("global", "local")[i % 2] for i in range(len(layers))]:
        window["windowed_layers"] = "odd"
    elif set(layers) == {"global"}:
        window = {}
    elif set(layers) != {"local"}:
        raise keys.refuse("attention_types", "only global, local, and the two in turn are supported")
    return {
        "position": "fixed",
        "residual": "serial",
        "feed_forward": _ACTIVATIONS[keys.only("activation_function", *_ACTIVATIONS)],
        "tied_head": keys.get("tie_word_embeddings", True),
        "scale_scores": False,
        "biases": ["out", "mlp"],
        **window,
    }


def _write_gpt_neo(cfg: ModelConfig) -> dict[str, Any]:
    if cfg.windowed_layers == "odd":
        # Two lists where the number of layers is odd: a pattern is repeated whole.
        types: list[Any] = [[["global", "local"], cfg.n_layers // 2]] + ([[["global"], 1]] if cfg.n_layers % 2 else [])
    else:
        types = [[["local" if cfg.window else "global"], cfg.n_layers]]
    return {
        "attention_types": types,
        "attention_layers": [kind for pattern, times in types for _ in range(times) for kind in pattern],
        "window_size": cfg.window or 256,
        "activation_function": _NAMES[cfg.feed_forward],
        "tie_word_embeddings": cfg.tied_head,
        "attention_dropout": 0.0,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
    }


# ------------------------------------------------------------------------------------------ GPT-NeoX


def _rope(keys: Keys, n_ctx: Any, theta: str = "rope_theta") -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Our rotary fields, and what config.json says of them."""
    base = keys.get(theta, 10000.0)
    scaling, parameters = keys.get("rope_scaling"), keys.get("rope_parameters")
    given = scaling or parameters or {}
    if not isinstance(given, Mapping):
        raise keys.refuse("rope_scaling" if scaling else "rope_parameters", "expected an object")
    return read_rope(given, base, n_ctx), given


def _turned(keys: Keys, given: Mapping[str, Any], key: str, default: float) -> int:
    """Channels of each head that are turned: a share that is `given` among the rotary numbers or has a key."""
    share = given.get("partial_rotary_factor", keys.get(key, default))
    try:
        n_turned = int(keys.get("hidden_size") // keys.get("num_attention_heads") * share)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise keys.refuse(key, "expected the share of each head that is turned, such as 0.25") from error
    if n_turned < 1:
        raise keys.refuse(key, f"the share of each head that is turned is {share}, which is no channel at all")
    return n_turned


def _read_gpt_neox(keys: Keys) -> dict[str, Any]:
    keys.get("rope_theta")
    fields, given = _rope(keys, keys.get("max_position_embeddings"), "rotary_emb_base")
    keys.get("partial_rotary_factor")
    return fields | {
        "d_rotary": _turned(keys, given, "rotary_pct", 0.25),
        "rotary_layout": "half",
        "residual": "parallel-two-norms" if keys.get("use_parallel_residual", True) else "serial",
        "feed_forward": _ACTIVATIONS[keys.only("hidden_act", "gelu", *_ACTIVATIONS)],
        "tied_head": keys.get("tie_word_embeddings", False),
        "biases": ["mlp", *_biases((keys.get("attention_bias", True), ("qkv", "out")))],
    }


def _write_gpt_neox(cfg: ModelConfig) -> dict[str, Any]:
    share = cfg.d_rotary / cfg.d_head
    return {
        **write_rope(cfg, partial=share),
        "rotary_emb_base": cfg.rope_theta,
        "rotary_pct": share,
        "use_parallel_residual": cfg.residual == "parallel-two-norms",
        "hidden_act": "gelu" if cfg.feed_forward == "gelu" else "gelu_fast",  # as GPT-NeoX-20B has it
        "tie_word_embeddings": cfg.tied_head,
        "attention_bias": "qkv" in cfg.biases,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


# ------------------------------------------------------------------------------------------ Llama and its kin


def _read_llama_like(keys: Keys) -> dict[str, Any]:
    """What Llama, Mistral and Qwen have in common; biases apart."""
    keys.only("hidden_act", "silu")
    heads = keys.get("num_attention_heads")
    fields, given = _rope(keys, keys.get("max_position_embeddings"))
    if (share := given.get("partial_rotary_factor")) not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor is {share!r:.80}; only 1.0 is supported")
    width = keys.size("head_dim")
    return fields | {
        "norm": "rms",
        "residual": "serial",
        "rotary_layout": "half",
        "feed_forward": "glu_silu",
        "n_kv_heads": keys.size("num_key_value_heads") or heads,
        "tied_head": keys.get("tie_word_embeddings", False),
        **({} if width is None else {"d_head": width}),
    }


def _write_llama_like(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_rope(cfg),
        "hidden_act": "silu",
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.d_head,
        "tie_word_embeddings": cfg.tied_head,
        "attention_dropout": 0.0,
    }


def _read_llama(keys: Keys) -> dict[str, Any]:
    attention, mlp = keys.get("attention_bias", False), keys.get("mlp_bias", False)
    return _read_llama_like(keys) | {"biases": _biases((attention, ("qkv", "out")), (mlp, ("mlp",)))}


def _write_llama(cfg: ModelConfig) -> dict[str, Any]:
    return _write_llama_like(cfg) | {"attention_bias": "qkv" in cfg.biases, "mlp_bias": "mlp" in cfg.biases}


def _read_mistral(keys: Keys) -> dict[str, Any]:
    return _read_llama_like(keys) | {
        "biases": [],
        "n_kv_heads": keys.size("num_key_value_heads", 8) or keys.get("num_attention_heads"),
        "window": keys.size("sliding_window", 4096) or 0,
    }


def _write_mistral(cfg: ModelConfig) -> dict[str, Any]:
    return _write_llama_like(cfg) | {"sliding_window": cfg.window or None}


def _read_qwen_window(keys: Keys) -> dict[str, Any]:
    """Layers from max_window_layers on see a window; all or none are supported."""
    layers = keys.whole("num_hidden_layers")
    keys.get("max_window_layers")
    window, kinds = keys.size("sliding_window", 4096), keys.get("layer_types")
    if not keys.get("use_sliding_window", False) or window is None:
        windowed = 0
    else:
        windowed = max(0, layers - keys.whole("max_window_layers", 28))
    if kinds is not None:
        if not isinstance(kinds, list):
            raise keys.refuse("layer_types", "expected a list of one kind for every layer")
        windowed = sum(kind != "full_attention" for kind in kinds) if window is not None else 0
    if windowed not in (0, layers):
        raise keys.refuse(
            "layer_types" if kinds else "max_window_layers", "a window is supported in all layers or none"
        )
    return {"window": window} if windowed else {}


def _write_qwen_window(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": bool(cfg.window),
        "sliding_window": cfg.window or None,
        "max_window_layers": 0 if cfg.window else cfg.n_layers,
    }


def _read_qwen2(keys: Keys) -> dict[str, Any]:
    return _read_llama_like(keys) | {"biases": ["qkv"]} | _read_qwen_window(keys)


def _write_qwen2(cfg: ModelConfig) -> dict[str, Any]:
    return _write_llama_like(cfg) | _write_qwen_window(cfg)


def _read_qwen3(keys: Keys) -> dict[str, Any]:
    biases = _biases((keys.get("attention_bias", False), ("qkv", "out")))
    fields = _read_llama_like(keys) | {"biases": biases, "qk_norm": True} | _read_qwen_window(keys)
    return {"d_head": 128} | fields


def _write_qwen3(cfg: ModelConfig) -> dict[str, Any]:
    return _write_qwen2(cfg) | {"attention_bias": "qkv" in cfg.biases}


_GPTJ_SIZES = {
    "n_layers": "n_layer",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "norm_eps": "layer_norm_epsilon",
}
_LLAMA_SIZES = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
_NEO_SIZES = _LLAMA_SIZES | {"n_layers": "num_layers", "n_heads": "num_heads", "norm_eps": "layer_norm_epsilon"}
_WIDE = "intermediate_size"
_RMS = {"norm_eps": 1e-6}

SPELLINGS: dict[str, Spelling] = {
    "gptj": Spelling(_GPTJ_SIZES, "n_inner", _read_gptj, _write_gptj),
    "gpt2": Spelling(_GPTJ_SIZES, "n_inner", _read_gpt2, _write_gpt2),
    "gpt_neo": Spelling(_NEO_SIZES, _WIDE, _read_gpt_neo, _write_gpt_neo),
    "gpt_neox": Spelling(_LLAMA_SIZES | {"norm_eps": "layer_norm_eps"}, _WIDE, _read_gpt_neox, _write_gpt_neox),
    "llama": Spelling(_LLAMA_SIZES, _WIDE, _read_llama, _write_llama, _RMS),
    "mistral": Spelling(_LLAMA_SIZES, _WIDE, _read_mistral, _write_mistral, _RMS),
    "qwen2": Spelling(_LLAMA_SIZES, _WIDE, _read_qwen2, _write_qwen2, _RMS),
    "qwen3": Spelling(_LLAMA_SIZES, _WIDE, _read_qwen3, _write_qwen3, _RMS),
}
