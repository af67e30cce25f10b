"""config.json of every family, in and out; how each spells its fields is in `spellings`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.huggingface.keys import Keys
from mesh_transformer.checkpoint.huggingface.spellings import SPELLINGS
from mesh_transformer.checkpoint.names import hf_family
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.model import ModelConfig, differing_fields
from mesh_transformer.config.schema import model_config_from_dict

CONFIG = "config.json"
# Our fields -> their keys, in the families that have them.
_OPTIONAL = {"d_rotary": "rotary_dim", "d_head": "head_dim", "n_kv_heads": "num_key_value_heads"}


def looks_huggingface(path: str | os.PathLike[str]) -> bool:
    """Whether the directory has a config.json that names a model type."""
    try:
        return "model_type" in json.loads(Path(path, CONFIG).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def read_config(path: Path) -> ModelConfig:
    """The architecture of a Hugging Face directory.

    Raises:
        CheckpointError: it is of no family that is known here, or a key that changes its arithmetic is unknown or has
            a value that is not supported; the key is named.
    """
    file = path / CONFIG
    try:
        found = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as a JSON object ({error})") from error
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in SPELLINGS:
        raise CheckpointError(f"{file}: model_type is {kind!r:.80}; expected one of: {', '.join(map(repr, SPELLINGS))}")
    spelling = SPELLINGS[kind]
    try:
        return model_config_from_dict(spelling.read(Keys(file, found)))
    except ConfigError as error:
        sizes = {**spelling.sizes, "d_ff": spelling.d_ff, **_OPTIONAL}
        theirs = [
            f"{ours} is {name} here"
            for own, name in sizes.items()
            if name in found and f"{(ours := f'model.{own}')} " in str(error)
        ]
        raise CheckpointError(f"{file}: {error}" + (f" ({', '.join(theirs)})" if theirs else "")) from error


def config_document(cfg: ModelConfig, dtype: np.dtype, end_of_text: int | None) -> dict[str, Any]:
    """config.json of a model stored in `dtype`, in the spelling of transformers 5 and of 4.

    Raises:
        ConfigError: no family has such an architecture.
    """
    family = hf_family(cfg)
    # torch_dtype is how transformers 4 spells dtype.
    return {
        "model_type": family.model_type,
        "architectures": [family.class_name],
        **SPELLINGS[family.model_type].write(cfg),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tokenizer_class": _tokenizer_class(end_of_text),
        "dtype": dtype.name,
        "torch_dtype": dtype.name,
        "use_cache": True,
    }


def named_ends(generation: bytes | None) -> dict[str, Any]:
    """What config.json says of the ids that begin and end a text, as the generation_config.json beside it does."""
    found = json.loads(generation) if generation is not None else {}
    return {key: found[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in found}


def check_can_be_said(cfg: ModelConfig) -> None:
    """Returns if a config.json, as it is written and read here, says the whole architecture.

    Raises:
        ConfigError: no family has such an architecture, or its config.json has no word for a field; it is named.
    """
    family = hf_family(cfg)
    spelling = SPELLINGS[family.model_type]
    said = model_config_from_dict(spelling.read(Keys(Path(CONFIG), spelling.write(cfg))))
    for name, (own, theirs) in differing_fields(cfg, said).items():
        raise ConfigError(
            f"model.{name} = {own!r}: the config.json of Hugging Face's {family.title} would say {theirs!r}; "
            "keep this model in the native format"
        )


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
