"""A batch read through the cache as the engine does it: chunks of the prompts first, then one token a row."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.engine.programs import decode, prefill
from mesh_transformer.model.cache import empty_cache
from mesh_transformer.model.policy import ComputePolicy

PAGE = 4


class Reader:
    """Rows that keep `n_slots` tokens each, on pages in an order that is anything but regular."""

    def __init__(self, cfg: ModelConfig, params: Any, batch: int, n_slots: int, n_positions: int) -> None:
        self.params, width = params, -(-n_slots // PAGE) + 1
        self.cache = empty_cache(cfg, batch * width + 1, PAGE, n_positions + PAGE, jnp.float32)
        order = np.random.default_rng(5).permutation(batch * width) + 1
        self.tables = order.reshape(batch, width).astype(np.int32)
        how = {"cfg": cfg, "policy": ComputePolicy(dtype="float32")}
        self._prefill = jax.jit(functools.partial(prefill, n_copies=2, **how))
        self._decode = jax.jit(functools.partial(decode, **how))

    def read(self, texts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Logits after the first lengths[b] tokens of row b; it would be noticed if what follows them were seen."""
        last = [np.zeros(0)] * len(texts)
        for at in range(0, int(lengths.max()), PAGE):
            tokens = np.zeros((len(texts), PAGE), np.int32)
            n = np.clip(lengths - at, 1, PAGE)
            for row, text in enumerate(texts):
                tokens[row, : len(text[at : at + PAGE])] = text[at : at + PAGE]
            over = (lengths <= at)[:, None]  # such a row writes unheard, into page 0
            rows = np.concatenate([np.full_like(n, at)[:, None], n[:, None], np.where(over, 0, self.tables)], axis=1)
            logits, self.cache, _ = self._prefill(self.params, tokens, rows.astype(np.int32), cache=self.cache)
            for row in np.flatnonzero((lengths > at) & (lengths <= at + PAGE)):
                last[row] = np.asarray(logits).reshape(len(texts), -1, logits.shape[-1])[row, 0]
        return np.stack(last)

    def step(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits after one token more of every row, at its position."""
        rows = np.concatenate([tokens[:, None], positions[:, None], self.tables], axis=1).astype(np.int32)
        logits, self.cache = self._decode(self.params, rows, cache=self.cache)
        return np.asarray(logits)
