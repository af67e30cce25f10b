"""Hugging Face directories for tests: parameters in memory to files and back, as the package does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mesh_transformer.checkpoint.huggingface import MAX_SHARD_BYTES, HuggingFaceWeights, write_huggingface
from mesh_transformer.checkpoint.logical import logical_piece
from mesh_transformer.checkpoint.names import hf_table
from mesh_transformer.checkpoint.weights import InMemory, Piece, assemble
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.files import atomic_directory


def hf_tensors(cfg: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Every tensor as it is stored, before it is rounded."""
    weights = InMemory(cfg, params)
    return {
        name: np.ascontiguousarray(tensor.to_stored(logical_piece(weights, Piece(tensor.path, tensor.layer)), cfg))
        for name, tensor in hf_table(cfg).items()
    }


def write(
    path: Path,
    cfg: ModelConfig,
    params: Any,
    tokenizer: Mapping[str, bytes],
    end_of_text: int | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    weights = InMemory(cfg, params)
    with atomic_directory(path) as target:
        write_huggingface(
            target,
            weights,
            dtype=weights.main_dtype,
            tokenizer=tokenizer,
            end_of_text=end_of_text,
            max_shard_bytes=max_shard_bytes,
        )


def read(path: Path) -> tuple[ModelConfig, Any, bytes | None]:
    weights = HuggingFaceWeights(path)
    return weights.cfg, assemble(weights), weights.tokenizer()


def same(a: Any, b: Any) -> None:
    """Trees of equal structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def equal(x: np.ndarray, y: np.ndarray) -> None:
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()

    jax.tree.map(equal, a, b)
