"""This project as a contender: the training step that `mesh-transformer train` runs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import TrainConfig
from mesh_transformer.model.policy import default_policy
from mesh_transformer.train.state import initial_state
from mesh_transformer.train.step import make_train_step


class TrainContender:
    """Float32 parameters and moments; products in the dtype asked for."""

    def __init__(self, spec: dict[str, Any]) -> None:
        cfg = ModelConfig(**spec["model"])
        train = TrainConfig(
            steps=10_000, learning_rate=1e-4, batch_size=spec["batch_size"], compute_dtype=spec["dtype"]
        )
        self._rows = jnp.asarray(batch(cfg.n_vocab, spec["batch_size"], spec["sequence_length"]))[None]
        self._state = jax.jit(functools.partial(initial_state, cfg, train, 0))()
        policy = default_policy(spec["dtype"], train.remat)
        step = jax.jit(make_train_step(cfg, train, policy), donate_argnums=0)
        self._step = step.lower(self._state, self._rows).compile()

    def step(self) -> dict[str, Any]:
        self._state, report = self._step(self._state, self._rows)
        jax.block_until_ready(self._state)
        return {"loss": float(report.loss)}

    def describe(self) -> dict[str, Any]:
        return {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "optimizer": "optax AdamW chain"}


class MatmulCeiling:
    """A large square product, in the form that the platform runs fastest: the ceiling of the same run."""

    size = 2048

    def __init__(self, dtype: str) -> None:
        a = jax.random.normal(jax.random.key(0), (self.size, self.size), jnp.float32).astype(dtype)
        dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        self._a = a
        self._dot = jax.jit(dot).lower(a, a).compile()

    def step(self) -> dict[str, Any]:
        jax.block_until_ready([self._dot(self._a, self._a) for _ in range(8)])
        return {"flops": 8 * 2.0 * self.size**3}

    def describe(self) -> dict[str, Any]:
        return {"jax": jax.__version__, "product": f"{self.size} x {self.size} x {self.size}"}


def batch(n_vocab: int, batch_size: int, sequence_length: int) -> np.ndarray:
    """The rows that every contender trains on: int32 [batch_size, sequence_length + 1]."""
    return np.random.default_rng(0).integers(0, n_vocab, (batch_size, sequence_length + 1), dtype=np.int32)


def make(spec: dict[str, Any]) -> TrainContender | MatmulCeiling:
    """The contender that `spec["kind"]` names."""
    return MatmulCeiling(spec["dtype"]) if spec["kind"] == "matmul" else TrainContender(spec)
