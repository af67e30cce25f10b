"""An adapter as the directory that the peft library loads: adapter_config.json and adapter_model.safetensors.

It is loaded onto the Hugging Face export of the base: peft finds each matrix by its module's name there. Where q, k and
v are one tensor (GPT-2, GPT-NeoX), one adapter stands for those of them that were trained: their ranks side by side,
with zeros where a rank of one would reach another.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.huggingface import check_target
from mesh_transformer.checkpoint.lora import LoraWeights, hf_modules
from mesh_transformer.checkpoint.names import HfTensor, hf_family, hf_table
from mesh_transformer.checkpoint.weights import Piece, Weights
from mesh_transformer.config.errors import CheckpointError, UserError
from mesh_transformer.files import atomic_directory, clear_leftovers

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write_peft(weights: Weights, target: Path, *, base_name: str | None = None, overwrite: bool = False) -> int:
    """Writes the adapter of `weights` at `target`, whole or not at all; returns the number of its values.

    Args:
        target: a directory that must not exist; with `overwrite` it may be an earlier adapter.
        base_name: what peft is to load the base from, a path or a Hub id; None: where the base is.

    Raises:
        UserError: the model is no adapter, no family of Hugging Face's has such an architecture, or the target exists.
        CheckpointError: the adapter is damaged, or the target cannot be written.
    """
    if not isinstance(weights, LoraWeights):
        raise UserError(f"{weights.where}: is no run with [lora], so there is no adapter to write; leave --to peft out")
    check_target(weights.cfg)
    clear_leftovers(target.absolute().parent, re.escape(target.name))
    if (target.exists() or target.is_symlink()) and not (overwrite and (target / CONFIG).is_file()):
        mend = "choose another place" if overwrite else "choose another place, or --overwrite"
        what = "exists already and is no adapter" if overwrite else "exists already"
        raise CheckpointError(f"{target}: {what}; {mend}")
    tensors = _tensors(weights)
    try:
        with atomic_directory(target, overwrite=overwrite) as temporary:
            from safetensors.numpy import save

            config = _config(weights, base_name if base_name is not None else str(weights.base.where.absolute()))
            (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (temporary / TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from error
    return sum(tensor.size for tensor in tensors.values())


def _tensors(weights: LoraWeights) -> dict[str, np.ndarray]:
    """peft's names; float32, A as [rank, in] and B as [out, rank], whichever way round the matrix is stored."""
    found = {}
    for name, tensor in hf_table(weights.cfg).items():
        if set(tensor.paths) & set(weights.record.targets):
            module = f"base_model.model.{_module(name.removesuffix('.weight'))}"
            a, b = _factors(weights, tensor)
            found[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
            found[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
    return found


def _factors(weights: LoraWeights, tensor: HfTensor) -> tuple[np.ndarray, np.ndarray]:
    """A [in, ranks] and B [ranks, out] of one tensor, which may hold several targets."""
    n_in, n_out = tensor.matrix_shape(weights.cfg)
    rank, all_a, all_b = weights.record.rank, [], []
    for path in tensor.paths:
        if path in weights.record.targets:
            a, b = (weights.factor(Piece(path, tensor.layer), factor) for factor in ("a", "b"))
            all_a.append(a.reshape(n_in, rank))
            whole = tensor.together([b if other == path else np.zeros_like(b) for other in tensor.paths])
            all_b.append(whole.reshape(rank, n_out))
    return np.concatenate(all_a, axis=1), np.concatenate(all_b, axis=0)


def _module(name: str) -> str:
    """A module's name in a model in memory: transformers 5 calls GPT-NeoX's head otherwise there than in files."""
    return "lm_head" if name == "embed_out" else name


def _config(weights: LoraWeights, base_name: str) -> dict[str, Any]:
    record = weights.record
    modules = {path: _module(module) for path, module in hf_modules(weights.cfg).items() if path in record.targets}
    held = Counter(modules.values())
    several = {module: n for module, n in held.items() if n > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": record.rank,
        "lora_alpha": record.alpha,
        "rank_pattern": {module: n * record.rank for module, n in several.items()},
        "alpha_pattern": {module: n * record.alpha for module, n in several.items()},
        "target_modules": sorted(held),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": hf_family(weights.cfg).inputs_first,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
