"""A model of the original's to begin runs from, in several forms, and the architecture that such runs have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from run_cases import T

from legacy.generator import Arch, Truth
from mesh_transformer.config.model import ModelConfig

ARCH = Arch(layers=2, d_model=32, n_heads=8, n_vocab=64, seq=24, pe_rotary_dims=4)
# n_ctx is not the model's: with rotary positions it is the configuration's own.
SAME = ModelConfig(n_layers=2, d_model=32, n_heads=8, n_vocab=64, n_ctx=T, d_rotary=4)
STEP, ADAM, SCHEDULE = 1201, 901, 301


@dataclasses.dataclass(frozen=True)
class Stored:
    """A model directory of the original's, and what it means."""

    path: Path
    truth: Truth

    @property
    def step_directory(self) -> Path:
        return self.path / f"step_{STEP}"
