"""Our own checkpoints in pieces: read one layer at a time, and written so from any other format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.checkpoint import opening
from mesh_transformer.checkpoint.native import checkpoint_document
from mesh_transformer.checkpoint.slices import ArrayReader, ArrayWriter
from mesh_transformer.checkpoint.weights import (
    MOMENTS,
    Counters,
    Format,
    Kind,
    Piece,
    Weights,
    is_stacked,
    piece_shape,
    read_ahead,
    whole_shape,
)
from mesh_transformer.config.checks import shown
from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.model.params import named_specs

# Where a training state keeps the optimizer's leaves: the numbers are places in the chain of `train.optimizer`.
ADAM_COUNT = "opt_state/2/count"
MU = "opt_state/2/mu"
NU = "opt_state/2/nu"
SCHEDULE_COUNT = "opt_state/5/count"
_TREES: Mapping[Kind, str] = {"params": "params", "mu": MU, "nu": NU}


class NativeWeights(Weights):
    """A checkpoint directory whose files have been verified.

    Raises:
        CheckpointError: its metadata cannot be understood, or do not fit the architecture that they name.
    """

    format: Format = "native"

    def __init__(self, directory: Path, metadata: Mapping[str, Any]) -> None:
        self.where = directory
        self.cfg = opening.stored_model(metadata, directory)
        self.step = int(metadata["step"])
        self.metadata = metadata
        self.extras = {key: metadata[key] for key in ("train_loader",) if key in metadata}
        self._stored: Mapping[str, Any] = metadata["arrays"]
        self._arrays = ArrayReader(directory / opening.STATE)
        self.dtypes = self._dtypes("params")
        if ADAM_COUNT in self._stored and SCHEDULE_COUNT in self._stored:
            self.counters = Counters(self._count(ADAM_COUNT), self._count(SCHEDULE_COUNT))
            self.moment_dtypes = self._dtypes("mu")

    def read(self, piece: Piece, kind: Kind = "params") -> np.ndarray:
        name = f"{_TREES[kind]}/{piece.path}"
        values = self._arrays.read(name, piece.layer)
        expected = (self.dtype_of(piece.path, kind), piece_shape(self.cfg, piece))
        if (values.dtype, values.shape) != expected:
            raise CheckpointError(
                f"{self.where}: array {name} is {values.dtype} {values.shape}, but {opening.CHECKPOINT_FILE} makes it "
                f"{expected[0]} {expected[1]}; the checkpoint is damaged"
            )
        return values

    def _count(self, name: str) -> int:
        return int(self._arrays.read(name))

    def _dtypes(self, kind: Kind) -> dict[str, np.dtype]:
        found = {}
        for path in named_specs(self.cfg):
            name = f"{_TREES[kind]}/{path}"
            expected = list(whole_shape(self.cfg, path))
            entry = self._stored.get(name)
            if entry is None or entry["shape"] != expected:
                there = "is missing" if entry is None else f"has shape {tuple(entry['shape'])}"
                raise CheckpointError(
                    f"{self.where}: array {name} {there}, but its architecture has {tuple(expected)}; "
                    "the checkpoint is damaged, or was written by another version"
                )
            try:
                found[path] = np.dtype(_numpy_dtype(entry["dtype"]))
            except (TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{self.where}: array {name} is of the unknown type {shown(entry['dtype'])}; "
                    "the checkpoint is damaged"
                ) from error
        return found


def open_unverified(directory: Path) -> NativeWeights:
    """A checkpoint that has no manifest yet."""
    return NativeWeights(directory, opening.read_metadata(directory))


def write_native(
    target: Path,
    weights: Weights,
    *,
    dtype: np.dtype | None = None,
    with_optimizer: bool = False,
    files: Mapping[str, bytes],
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Writes a checkpoint piece by piece; it counts as one when the caller has written its manifest.

    Args:
        target: exists and is empty.
        dtype: what parameters are rounded to; None keeps each as stored. Moments keep their own.
        with_optimizer: write moments and counts too; `weights.counters` is not None then.
        files: name -> contents of files to put beside it: the tokenizer's.
        progress: called with the bytes written.

    Raises:
        OSError: it cannot be written.
    """
    described = _write_arrays(target / opening.STATE, weights, dtype, with_optimizer, progress)
    metadata = {"model": weights.cfg.to_dict(), **weights.extras}
    document = checkpoint_document(weights.step or 0, described, metadata)
    for name, data in {**files, opening.CHECKPOINT_FILE: document}.items():
        (target / name).write_bytes(data)


def _write_arrays(
    directory: Path,
    weights: Weights,
    dtype: np.dtype | None,
    with_optimizer: bool,
    progress: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Returns the arrays' description for checkpoint.json."""
    kinds: tuple[Kind, ...] = ("params", *MOMENTS) if with_optimizer else ("params",)
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    stacked = []
    for kind in kinds:
        for path in named_specs(weights.cfg):
            name = f"{_TREES[kind]}/{path}"
            kept = weights.dtype_of(path, kind)
            shapes[name] = (whole_shape(weights.cfg, path), dtype if dtype and kind == "params" else kept)
            stacked += [name] if is_stacked(weights.cfg, path) else []
    counts = {"step": weights.step or 0}
    if with_optimizer:
        assert weights.counters is not None
        counts |= {ADAM_COUNT: weights.counters.adam, SCHEDULE_COUNT: weights.counters.schedule}
    shapes |= {name: ((), np.dtype(np.int32)) for name in counts}
    directory.mkdir()
    writer = ArrayWriter(directory, shapes, stacked)
    for name, count in counts.items():
        writer.write(name, None, np.array(count, np.int32))()
    for kind in kinds:
        finish: Callable[[], None] = lambda: None  # noqa: E731
        try:
            for piece, values in read_ahead(weights, weights.order(), kind):
                name = f"{_TREES[kind]}/{piece.path}"
                rounded = np.asarray(values, shapes[name][1], order="C")
                finish()
                finish = writer.write(name, piece.layer, rounded)
                progress(rounded.nbytes)
        except Exception:
            # What is written after the caller's removal would make the directory anew.
            with contextlib.suppress(Exception):  # the first error is the news
                finish()
            raise
        finish()
    return {name: {"shape": list(shape), "dtype": kept.name} for name, (shape, kept) in sorted(shapes.items())}


def _numpy_dtype(name: str) -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16 if name == "bfloat16" else name
