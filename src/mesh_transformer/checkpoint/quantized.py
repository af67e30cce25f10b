"""A model into memory with its matrices in 8 or 4 bits; the whole of it never exists in more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mesh_transformer.checkpoint.quantized_weights import QuantizedWeights
from mesh_transformer.checkpoint.weights import (
    Piece,
    Weights,
    aligned_empty,
    assemble,
    map_ahead,
    nested,
    piece_shape,
    whole_shape,
)
from mesh_transformer.config.errors import CheckpointError, ConfigError, UserError
from mesh_transformer.model.params import is_multiplied, named_specs
from mesh_transformer.model.quantize import Quantized, check_model, described, quantize
from mesh_transformer.shapes import Params


def assemble_as(
    weights: Weights, name: str | None, dtype: Any = None, progress: Callable[[int], None] = lambda n: None
) -> Params:
    """The whole tree as NumPy arrays: as stored, or quantised as `name` says. Of what is stored quantised it is a map.

    Args:
        name: one of `quantize.QUANTIZATIONS`, or None.
        dtype: what other parameters than quantised ones are converted to; None keeps each as stored.
        progress: called with the bytes read, as `Weights.read` would give them.

    Raises:
        CheckpointError: a file is damaged; it is named.
        ConfigError: a value is too large for `dtype`, or the model's shape does not suit `name`.
        UserError: the model is stored quantised in another way.
    """
    if isinstance(weights, QuantizedWeights):
        if name not in (None, weights.quantize):
            raise UserError(
                f"{weights.where}: its matrices were rounded to {weights.quantize} when it was converted, and cannot "
                f"become {name}; leave quantize= out, or load the model that it was made of"
            )
        return _mapped(weights, dtype, progress)
    return assemble(weights, dtype, progress=progress) if name is None else _assemble(weights, name, dtype, progress)


def quantized_pieces(weights: Weights, name: str) -> Iterator[tuple[Piece, int, Any]]:
    """(piece, bytes read, values) of every piece: `Quantized` of one layer of a matrix of products, else as stored.

    Read and quantised by several threads, a bounded number of pieces ahead.

    Raises:
        CheckpointError: a file is damaged, or a matrix holds what cannot be quantised; it is named.
    """
    specs = named_specs(weights.cfg)

    def read(piece: Piece) -> tuple[Piece, int, Any]:
        values = weights.read(piece)
        multiplied = is_multiplied(specs[piece.path])
        return piece, values.nbytes, _quantized(weights, piece, values, name) if multiplied else values

    def float32_bytes(piece: Piece) -> int:
        return 4 * math.prod(piece_shape(weights.cfg, piece))

    yield from map_ahead(read, weights.order(), float32_bytes, weights.readers)


def converted(weights: Weights, path: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """In another dtype.

    Raises:
        ConfigError: a value is too large for it.
    """
    try:
        with np.errstate(over="raise"):
            return values.astype(dtype, copy=False)
    except FloatingPointError as error:
        raise ConfigError(
            f"{weights.where}: {path} has a value that is too large for {dtype}, and would become infinite; "
            "keep the stored dtype, or choose bfloat16"
        ) from error


def _assemble(weights: Weights, name: str, dtype: Any, progress: Callable[[int], None]) -> Params:
    check_model(name, weights.cfg)
    flat = {path: _empty(weights, path, name, dtype) for path in named_specs(weights.cfg)}
    for piece, n_bytes, values in quantized_pieces(weights, name):
        into, at = flat[piece.path], () if piece.layer is None else piece.layer
        if isinstance(values, Quantized):
            into.values[at], into.scale[at] = values.values, values.scale
        else:
            into[at] = converted(weights, piece.path, values, into.dtype)
        progress(n_bytes)
    return nested(flat)


def _mapped(weights: QuantizedWeights, dtype: Any, progress: Callable[[int], None]) -> Params:
    flat: dict[str, Any] = {}
    for path in named_specs(weights.cfg):
        leaf = weights.stored(path)
        if not isinstance(leaf, Quantized) and dtype is not None and leaf.dtype != dtype:
            wider = aligned_empty(leaf.shape, np.dtype(dtype))
            wider[...] = converted(weights, path, leaf, np.dtype(dtype))
            leaf = wider
        flat[path] = leaf
        progress(math.prod(leaf.shape) * weights.dtype_of(path).itemsize)
    return nested(flat)


def _empty(weights: Weights, path: str, name: str, dtype: Any) -> Any:
    spec, shape = named_specs(weights.cfg)[path], whole_shape(weights.cfg, path)
    if not is_multiplied(spec):
        return aligned_empty(shape, np.dtype(dtype or weights.dtype_of(path)))
    return jax.tree.map(lambda a: aligned_empty(a.shape, np.dtype(a.dtype)), described(name, spec, shape))


def _quantized(weights: Weights, piece: Piece, values: np.ndarray, name: str) -> Quantized:
    try:
        return quantize(values, named_specs(weights.cfg)[piece.path], name)
    except ValueError as error:
        layer = "" if piece.layer is None else f" of layer {piece.layer}"
        finite = np.isfinite(np.asarray(values, np.float32)).all()
        held = "a weight too large for the scales" if finite else "NaN or infinity, which"
        raise CheckpointError(
            f"{weights.where}: {piece.path}{layer} holds {held} {f'of {name}' if finite else f'{name} cannot hold'}; "
            "the model is damaged or its training failed, and loading it without quantize= shows what it computes"
        ) from error
