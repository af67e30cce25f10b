"""A model's tensors as the world names them, equal for equal models in every format: what is hashed and compared.

With norm "layernorm" and position "rotary" they are Hugging Face's GPT-J's, matrices (in, out); with any other, the
parameters of the table, whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mesh_transformer.checkpoint.names import has_hf_names, hf_table
from mesh_transformer.checkpoint.weights import Piece, Weights, map_ahead, piece_shape, pieces_of, whole_shape
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import named_specs

_CHUNK = 1 << 22  # values converted at a time
_FOLD_ROWS = 4096  # rows of the embedding summed at a time: the float64 copy stays small


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One logical tensor: the pieces whose concatenation it is, in C order."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """sha256 of every logical tensor's values (little-endian float32, C order), and of the whole model."""

    tensors: dict[str, str]
    digest: str


def logical_tensors(cfg: ModelConfig) -> list[Tensor]:
    """Every logical tensor, in the byte order of the names."""
    if has_hf_names(cfg):
        found = [Tensor(name, t.matrix_shape(cfg), (Piece(t.path, t.layer),)) for name, t in hf_table(cfg).items()]
    else:
        found = [Tensor(path, whole_shape(cfg, path), tuple(pieces_of(cfg, path))) for path in named_specs(cfg)]
    return sorted(found, key=lambda tensor: tensor.name.encode())


def logical_piece(weights: Weights, piece: Piece) -> np.ndarray:
    """A piece's values as they count, in our own axes: as stored, but the embedding has its bias folded in.

    The embedding of a model that has Hugging Face's names comes as float32: summed in float64 and rounded once. A bias
    of zeros leaves it as it is, the sign of its zeros included.
    """
    values = weights.read(piece)
    if piece.path != "embed/tokens" or not has_hf_names(weights.cfg):
        return values
    return fold_bias(values, weights.read(Piece("embed/bias")))


def fold_bias(table: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """`table` plus `bias` on every row, float32: summed in float64 and rounded once; itself for a bias of zeros."""
    folded = table.astype(np.float32)
    wide = bias.astype(np.float64)
    if wide.any():
        with np.errstate(invalid="ignore"):  # what is no number stays so, and needs no warning
            for start in range(0, len(folded), _FOLD_ROWS):
                rows = slice(start, start + _FOLD_ROWS)
                folded[rows] = table[rows].astype(np.float64) + wide
    return folded


def fingerprint(weights: Weights, progress: Callable[[int], None] = lambda n: None) -> Fingerprint:
    """Hashes everything; never more than a few pieces are in memory.

    Args:
        progress: called with the bytes read, as stored, piece by piece.

    Raises:
        CheckpointError: a file is damaged.
    """
    whole = hashlib.sha256()
    tensors: dict[str, str] = {}
    own = hashlib.sha256()
    # hashlib and NumPy let go of the interpreter: one thread hashes the model, one the tensor, others read.
    with ThreadPoolExecutor(1) as second:
        for tensor, piece, values in _in_order(weights):
            if piece is tensor.pieces[0]:
                header = tensor.name.encode() + b"\0" + ",".join(map(str, tensor.shape)).encode() + b"\0"
                whole.update(header)
                own = hashlib.sha256()
            flat = values.reshape(-1)
            for start in range(0, flat.size, _CHUNK):
                chunk = np.ascontiguousarray(flat[start : start + _CHUNK], "<f4")
                other = second.submit(own.update, chunk.data)
                whole.update(chunk.data)
                other.result()
            if piece is tensor.pieces[-1]:
                tensors[tensor.name] = own.hexdigest()
            progress(math.prod(piece_shape(weights.cfg, piece)) * weights.dtype_of(piece.path).itemsize)
    return Fingerprint(tensors, whole.hexdigest())


def _in_order(weights: Weights) -> Iterator[tuple[Tensor, Piece, np.ndarray]]:
    items = [(tensor, piece) for tensor in logical_tensors(weights.cfg) for piece in tensor.pieces]
    yield from map_ahead(
        lambda item: (*item, logical_piece(weights, item[1])),
        items,
        lambda item: 4 * math.prod(piece_shape(weights.cfg, item[1])),
        weights.readers,
    )
