"""v2 checkpoints for tests: one to read, and what changes its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from legacy.generator_v2 import ArchV2
from legacy.npz import Member, write_npz
from mesh_transformer.checkpoint.legacy.v2 import LegacyV2Weights
from mesh_transformer.checkpoint.weights import (
    InMemory,
    Kind,
    Piece,
    Weights,
    assemble,
    leaf_at,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}
# H * dh = 48 differs from d = 64, and every split axis divides by 16 devices.
ARCH = ArchV2(layers=3, d_head=6, n_vocab=272, cores_per_replica=4)
INTO, OUT_OF = (f"/transformer/transformer_layer_shard_v2/~/{name}/w" for name in ("linear", "linear_1"))
STEP = "step_1201"


def opened(path: Path, arch: ArchV2 = ARCH, **more: Any) -> LegacyV2Weights:
    return LegacyV2Weights(path / STEP, arch.config(**more), "config.json")


def stored(file: Path) -> list[np.ndarray]:
    """The arrays as NumPy reads them; bfloat16 as two raw bytes."""
    with np.load(file) as found:
        return [found[f"arr_{i}"] for i in range(len(found.files))]


def rewrite(file: Path, change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> None:
    """Writes the file again with other arrays, as the generator would."""
    write_npz(file, [Member(a, {"|V2": "<V2"}.get(a.dtype.str, a.dtype.str)) for a in change(stored(file))])


def edit_json(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


class Whole(InMemory):
    """All of another model in memory, optimizer state included, as a resumed run has it."""

    def __init__(self, other: Weights) -> None:
        super().__init__(other.cfg, assemble(other), step=other.step)
        self.counters, self.moment_dtypes = other.counters, other.moment_dtypes
        self._trees = {kind: assemble(other, kind=kind) for kind in other.kinds()}

    def read(self, piece: Piece, kind: Kind = "params") -> np.ndarray:
        leaf = leaf_at(self._trees[kind], piece.path)
        return leaf if piece.layer is None else leaf[piece.layer]
