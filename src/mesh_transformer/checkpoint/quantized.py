"""A stored model into memory with its matrices in 8 bits; the whole of it never exists in more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.weights import (
    Piece,
    Weights,
    aligned_empty,
    map_ahead,
    nested,
    piece_shape,
    whole_shape,
)
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.model.params import is_multiplied, named_specs
from mesh_transformer.model.quantize import Int8, quantize
from mesh_transformer.shapes import Params


def assemble_int8(weights: Weights, dtype: Any = None, progress: Callable[[int], None] = lambda n: None) -> Params:
    """As `checkpoint.weights.assemble`, with `Int8` of NumPy arrays in place of the matrices of products.

    Each layer of each matrix is read, quantised and let go; a bounded number of them at a time is held in float32.

    Args:
        dtype: what the other parameters are converted to; None keeps each as stored. Matrices are quantised from what
            is stored whatever it is.
        progress: called with the bytes read, piece by piece.

    Raises:
        CheckpointError: a file is damaged, or a matrix holds NaN or infinity; it is named.
        ConfigError: a value of another parameter is too large for `dtype`.
    """
    specs = named_specs(weights.cfg)
    flat = {path: _empty(weights, path, dtype) for path in specs}

    def read(piece: Piece) -> tuple[Piece, int, Any]:
        values = weights.read(piece)
        return piece, values.nbytes, _quantized(weights, piece, values) if is_multiplied(specs[piece.path]) else values

    def float32_bytes(piece: Piece) -> int:
        return 4 * math.prod(piece_shape(weights.cfg, piece))

    for piece, n_bytes, values in map_ahead(read, weights.order(), float32_bytes, weights.readers):
        into, at = flat[piece.path], () if piece.layer is None else piece.layer
        if isinstance(values, Int8):
            into.values[at], into.scale[at] = values.values, values.scale
        else:
            _convert(weights, piece, values, into, at)
        progress(n_bytes)
    return nested(flat)


def _empty(weights: Weights, path: str, dtype: Any) -> Any:
    spec, shape = named_specs(weights.cfg)[path], whole_shape(weights.cfg, path)
    if not is_multiplied(spec):
        return aligned_empty(shape, np.dtype(dtype or weights.dtype_of(path)))
    channels = tuple(1 if axis in spec.inputs else size for axis, size in zip(spec.axes, shape, strict=True))
    return Int8(aligned_empty(shape, np.dtype(np.int8)), aligned_empty(channels, np.dtype(np.float32)))


def _quantized(weights: Weights, piece: Piece, values: np.ndarray) -> Int8:
    try:
        return quantize(values, named_specs(weights.cfg)[piece.path])
    except ValueError as error:
        layer = "" if piece.layer is None else f" of layer {piece.layer}"
        raise CheckpointError(
            f"{weights.where}: {piece.path}{layer} holds NaN or infinity, which int8 cannot hold; the model is damaged "
            "or its training failed, and loading it without quantize= shows what it computes"
        ) from error


def _convert(weights: Weights, piece: Piece, values: np.ndarray, into: np.ndarray, at: Any) -> None:
    try:
        with np.errstate(over="raise"):
            into[at] = values
    except FloatingPointError as error:
        raise ConfigError(
            f"{weights.where}: {piece.path} has a value that is too large for {into.dtype}, and would become infinite; "
            "keep the stored dtype, or choose bfloat16"
        ) from error
