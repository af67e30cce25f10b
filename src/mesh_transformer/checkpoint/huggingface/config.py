"""config.json of a GPT-J, in and out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.schema import model_config_from_dict

CONFIG = "config.json"

# Their key -> our field.
_FIELDS = {
    "n_layer": "n_layers",
    "n_embd": "d_model",
    "n_head": "n_heads",
    "vocab_size": "n_vocab",
    "n_positions": "n_ctx",
    "rotary_dim": "d_rotary",
    "layer_norm_epsilon": "norm_eps",
}
# What transformers takes where a key is left out.
_DEFAULTS = {"rotary_dim": 64, "layer_norm_epsilon": 1e-5, "n_inner": None}
# Keys that change the arithmetic, and the one value that this architecture has.
_FIXED = {
    "activation_function": "gelu_new",
    "tie_word_embeddings": False,
}


def looks_huggingface(path: str | os.PathLike[str]) -> bool:
    """Whether the directory has a config.json that names a model type."""
    try:
        return "model_type" in json.loads(Path(path, CONFIG).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def read_config(path: Path) -> ModelConfig:
    """The architecture of a Hugging Face directory.

    Raises:
        CheckpointError: it is not a GPT-J, or a key that changes its arithmetic has another value.
    """
    file = path / CONFIG
    try:
        found = _DEFAULTS | json.loads(file.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as a JSON object ({error})") from error
    if found.get("model_type") != "gptj":
        raise CheckpointError(f"{file}: model_type is {found.get('model_type')!r:.80}; expected 'gptj'")
    for key, expected in _FIXED.items():
        if found.get(key, expected) != expected:
            raise CheckpointError(f"{file}: {key} is {found[key]!r:.80}; only {expected!r} is supported")
    missing = [key for key in _FIELDS if key not in found]
    if missing:
        raise CheckpointError(f"{file}: lacks {', '.join(missing)}")
    for key in ("rotary_dim", "n_inner"):  # 0 would stand for our defaults
        if found[key] == 0:
            raise CheckpointError(f"{file}: {key} is 0; expected at least 1")
    fields = {ours: found[theirs] for theirs, ours in _FIELDS.items()}
    if found["n_inner"] is not None:
        fields["d_ff"] = found["n_inner"]
    try:
        return model_config_from_dict(fields)
    except ConfigError as error:
        names = {f"model.{ours}": theirs for theirs, ours in _FIELDS.items()} | {"model.d_ff": "n_inner"}
        theirs = [f"{own} is {name} here" for own, name in names.items() if f"{own} " in str(error)]
        raise CheckpointError(f"{file}: {error}" + (f" ({', '.join(theirs)})" if theirs else "")) from error


def config_document(cfg: ModelConfig, dtype: np.dtype, end_of_text: int | None) -> dict[str, Any]:
    """config.json of a model stored in `dtype`, in the spelling of transformers 5 and of 4."""
    theirs = {key: getattr(cfg, field) for key, field in _FIELDS.items()}
    # torch_dtype is how transformers 4 spells dtype.
    return {
        "model_type": "gptj",
        "architectures": ["GPTJForCausalLM"],
        **theirs,
        **_FIXED,
        "n_inner": None if cfg.d_ff == 4 * cfg.d_model else cfg.d_ff,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tokenizer_class": _tokenizer_class(end_of_text),
        "dtype": dtype.name,
        "torch_dtype": dtype.name,
        "use_cache": True,
    }


def generation_document(end_of_text: int | None) -> dict[str, Any]:
    """generation_config.json."""
    return {"bos_token_id": end_of_text, "eos_token_id": end_of_text}


def tokenizer_document(tokenizer: bytes, end_of_text: int | None) -> dict[str, Any]:
    """tokenizer_config.json, without which transformers does not know which token begins and ends a text.

    tokenizer: the content of tokenizer.json.
    """
    named = {token["id"]: token["content"] for token in json.loads(tokenizer).get("added_tokens") or ()}
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), named.get(end_of_text))
    return {"tokenizer_class": _tokenizer_class(end_of_text), **special}


def _tokenizer_class(end_of_text: int | None) -> str:
    return "GPT2Tokenizer" if end_of_text == 50256 else "PreTrainedTokenizerFast"
