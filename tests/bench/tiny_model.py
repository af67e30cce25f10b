"""A model of a few thousand random parameters on disk, for servers that are tested from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mesh_transformer as mt
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.model.params import abstract_params

CFG = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=264, n_ctx=64, d_rotary=4)


def save_tiny_model(path: Path) -> Path:
    """Writes the model, with the tokenizer `bytes`, to `path`, and returns it."""
    random = np.random.default_rng(7)

    def one(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray((keys[-1].key == "scale") + 0.4 * random.normal(size=leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(one, abstract_params(CFG))
    mt.Model(CFG, dict(params), load_tokenizer("bytes")).save(path)
    return path
