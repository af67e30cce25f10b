"""Reading back what a conversion wrote: the facts of its certificate."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.compare import differences
from mesh_transformer.checkpoint.logical import Fingerprint, fingerprint, logical_tensors
from mesh_transformer.checkpoint.names import has_hf_names
from mesh_transformer.checkpoint.weights import MOMENTS, Kind, Piece, Weights, pieces, stored_bytes
from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.model.params import count_params

Progress = Callable[[str, int, int], None]


def certify_result(
    weights: Weights, back: Weights, casts: Mapping[str, str], with_optimizer: bool, progress: Progress
) -> dict[str, Any]:
    """Hashes source and result, and compares what is not equal; returns the facts of a certificate.

    Args:
        weights, back: the source, and the result opened.
        casts: path -> what a parameter was rounded to; the values of others must be those of the source.
        with_optimizer: compare moments too.
        progress: called with a stage, the bytes done and those of the whole stage.

    Raises:
        CheckpointError: what was read back is not what was written, or a file is damaged.
    """
    before = fingerprint(weights, counter(progress, "hashing the source", stored_bytes(weights)))
    after = fingerprint(back, counter(progress, "reading back", stored_bytes(back)))
    changed = _changed(weights, back, before, after, casts)
    if with_optimizer:
        _compare_moments(weights, back)
    return {
        "project_version": importlib.metadata.version("mesh-transformer"),
        "source": {
            "path": str(weights.where),
            "format": weights.format,
            "step": weights.step,
            "digest": before.digest,
        },
        "target": {"format": back.format, "step": back.step, "digest": after.digest},
        "parameters": count_params(weights.cfg),
        "with_optimizer": with_optimizer,
        "casts": [{"parameter": path, "from": weights.dtype_of(path).name, "to": kept} for path, kept in casts.items()],
        "changed": changed,
        "tensors": [
            {"name": tensor.name, "shape": list(tensor.shape), "sha256": before.tensors[tensor.name]}
            for tensor in logical_tensors(weights.cfg)
        ],
    }


def _changed(
    weights: Weights, back: Weights, before: Fingerprint, after: Fingerprint, casts: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The tensors whose values are not those of the source; only a rounding may have done that."""
    names = [name for name, sha256 in before.tensors.items() if after.tensors.get(name) != sha256]
    paths = {tensor.name: tensor.pieces[0].path for tensor in logical_tensors(weights.cfg)}
    rounded = set(casts)
    if has_hf_names(weights.cfg):  # the logical embedding has its bias folded in
        folds = back.format == "huggingface" and weights.read(Piece("embed/bias")).any()
        rounded |= {"embed/tokens"} if folds or "embed/bias" in casts else set()
    for name in names:
        if paths[name] not in rounded:
            raise CheckpointError(
                f"{weights.where}: {name} is another when read back from what was written; disk or memory is at fault"
            )
    found = {difference.name: difference for difference in differences(weights, back, names)}
    return [
        {
            "name": name,
            "sha256": after.tensors[name],
            "values": found[name].n_values if name in found else 0,
            "values_changed": found[name].n_different if name in found else 0,
            "largest_error": found[name].largest if name in found else 0.0,
        }
        for name in names
    ]


def _compare_moments(weights: Weights, back: Weights) -> None:
    if back.counters != weights.counters:
        raise CheckpointError(f"{weights.where}: the counts are others when read back from what was written")
    for kind in MOMENTS:
        for piece in pieces(weights.cfg):
            if not _equal(weights, back, piece, kind):
                raise CheckpointError(
                    f"{weights.where}: Adam's {kind} of {piece.path} is another when read back from what was written"
                )


def _equal(a: Weights, b: Weights, piece: Piece, kind: Kind) -> bool:
    return np.array_equal(
        a.read(piece, kind).astype(np.float32), b.read(piece, kind).astype(np.float32), equal_nan=True
    )


def counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """To be called with bytes as they are done."""
    done = 0

    def count(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(stage, min(done, total), total)

    return count
