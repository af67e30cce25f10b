"""Writing a directory that transformers opens as a model of one of its families, one piece at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mesh_transformer.checkpoint.huggingface.config import (
    CONFIG,
    check_can_be_said,
    config_document,
    generation_document,
    named_ends,
    tokenizer_document,
)
from mesh_transformer.checkpoint.huggingface.reader import INDEX, SINGLE
from mesh_transformer.checkpoint.logical import fold_bias
from mesh_transformer.checkpoint.names import HfTensor, hf_family, hf_table
from mesh_transformer.checkpoint.weights import TOKENIZER_FILE, Piece, Weights, read_ahead
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(jnp.bfloat16): "BF16"}
_PART = 1 << 24  # values written at a time
_ALIGNMENT = 8  # bytes, of the first tensor in a file


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor goes: number of its file, and the first byte there after the header."""

    file: int
    start: int
    n_bytes: int


def check_target(cfg: ModelConfig) -> None:
    """Returns if one of Hugging Face's families can hold the architecture.

    Raises:
        ConfigError: none has such an architecture, norm, position or heads.
    """
    family = hf_family(cfg)
    if cfg.n_heads * cfg.d_head != cfg.d_model and not family.shares_heads:
        raise ConfigError(
            f"model.n_heads * model.d_head = {cfg.n_heads * cfg.d_head} is not model.d_model = {cfg.d_model}: "
            f"Hugging Face's {family.title} has no such heads; keep this model in the native format"
        )
    if family.divides_width and cfg.d_model % cfg.n_heads:
        raise ConfigError(
            f"model.n_heads = {cfg.n_heads} does not divide model.d_model = {cfg.d_model}: transformers refuses such a "
            f"{family.title}; keep this model in the native format"
        )
    check_can_be_said(cfg)


def write_huggingface(
    target: Path,
    weights: Weights,
    *,
    dtype: np.dtype,
    tokenizer: Mapping[str, bytes],
    end_of_text: int | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Writes config.json, generation_config.json, the tokenizer's files and the tensors.

    Files of `tokenizer` that came from such a directory go out as they came, in the place of those made here.

    Args:
        target: exists and is empty.
        dtype: of all tensors; the embedding is rounded once, after the embedding bias is folded in.
        tokenizer: files to put beside it, by name.
        max_shard_bytes: tensors are divided into files of about this size, with an index, where one would be larger.
        progress: called with the bytes written.

    Raises:
        ConfigError: see `check_target`.
        OSError: it cannot be written.
    """
    cfg = weights.cfg
    check_target(cfg)
    tensors = hf_table(cfg)
    places = _plan(cfg, tensors, dtype, max_shard_bytes)
    n_files = 1 + max(place.file for place in places.values())
    names = [SINGLE] if n_files == 1 else [f"model-{i + 1:05d}-of-{n_files:05d}.safetensors" for i in range(n_files)]
    documents = {CONFIG: config_document(cfg, dtype, end_of_text), GENERATION_CONFIG: generation_document(end_of_text)}
    documents[CONFIG] |= named_ends(tokenizer.get(GENERATION_CONFIG))
    if TOKENIZER_FILE in tokenizer:
        documents[TOKENIZER_CONFIG] = tokenizer_document(tokenizer[TOKENIZER_FILE], end_of_text)
    if n_files > 1:
        documents[INDEX] = {
            "metadata": {"total_size": sum(place.n_bytes for place in places.values())},
            "weight_map": {tensor: names[place.file] for tensor, place in places.items()},
        }
    for name, document in documents.items():
        (target / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for name, data in tokenizer.items():
        (target / name).write_bytes(data)
    _write_tensors([target / name for name in names], weights, tensors, places, dtype, progress)


def _plan(
    cfg: ModelConfig, tensors: Mapping[str, HfTensor], dtype: np.dtype, max_shard_bytes: int
) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    file = start = 0
    for name, tensor in tensors.items():
        n_bytes = math.prod(tensor.matrix_shape(cfg)) * dtype.itemsize
        if start and start + n_bytes > max_shard_bytes:
            file, start = file + 1, 0
        places[name] = _Place(file, start, n_bytes)
        start += n_bytes
    return places


def _write_tensors(
    files: list[Path],
    weights: Weights,
    tensors: Mapping[str, HfTensor],
    places: Mapping[str, _Place],
    dtype: np.dtype,
    progress: Callable[[int], None],
) -> None:
    names = {Piece(path, tensor.layer): name for name, tensor in tensors.items() for path in tensor.paths}
    waiting: dict[str, dict[str, np.ndarray]] = {}
    descriptors: list[int] = []
    try:
        first: list[int] = []
        for i, file in enumerate(files):
            header = _header(weights.cfg, tensors, {n: p for n, p in places.items() if p.file == i}, dtype)
            descriptors.append(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            _write_at(descriptors[-1], header, 0)
            first.append(len(header))
        bias = weights.read(Piece("embed/bias")) if "embed" in weights.cfg.biases else None
        for piece, values in read_ahead(weights, (piece for piece in weights.order() if piece in names)):
            name = names[piece]
            folded = fold_bias(values, bias) if piece.path == "embed/tokens" and bias is not None else values
            if dtype.itemsize < folded.itemsize:  # whichever way fewer bytes are held
                folded = folded.astype(dtype)
            held = waiting.setdefault(name, {})
            held[piece.path] = folded
            if len(held) < len(tensors[name].paths):
                continue
            own = [held[path] for path in tensors[name].paths]
            stored = tensors[name].to_stored(own, weights.cfg).reshape(-1)
            del waiting[name], held, own
            place = places[name]
            for start in range(0, stored.size, _PART):
                part = stored[start : start + _PART].astype(dtype, copy=False)
                at = first[place.file] + place.start + start * dtype.itemsize
                _write_at(descriptors[place.file], part.view(np.uint8).data, at)
            progress(place.n_bytes)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _header(cfg: ModelConfig, tensors: Mapping[str, HfTensor], places: Mapping[str, _Place], dtype: np.dtype) -> bytes:
    """Length, then JSON: the head of a safetensors file. transformers refuses one without its "format"."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, place in places.items():
        entries[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(tensors[name].stored_shape(cfg)),
            "data_offsets": [place.start, place.start + place.n_bytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
