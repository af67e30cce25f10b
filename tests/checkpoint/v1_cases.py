"""What the tests of the original's v1 checkpoints share: comparing with the truth, and directories byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from legacy.generator import Arch, Truth
from mesh_transformer.checkpoint.weights import MOMENTS, Counters, Weights, assemble, leaf_at
from mesh_transformer.config.errors import CheckpointError, UserError
from mesh_transformer.model.params import named_specs

# Small, and yet with layer_10, which sorts before layer_2.
SMALL = Arch(layers=11, d_model=32, n_vocab=48, seq=16)
TINY = Arch(layers=2, d_model=32, n_vocab=48, seq=16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# As a program keeps its place in the data.
LOADER = {"used": ["gs://bucket/a.tfrecords"], "file_idx": 7}


def flat(weights: Weights, kind: Any = "params") -> dict[str, np.ndarray]:
    """Every parameter as float32, read as a program that loads the model reads it."""
    tree = assemble(weights, kind=kind)
    return {path: leaf_at(tree, path).astype(np.float32) for path in named_specs(weights.cfg)}


def is_truth(weights: Weights, truth: Truth, *, moments: bool = True) -> None:
    """Parameters, moments and counters equal the truth to the last bit. moments: False: those are not read."""
    for kind in ("params", *(MOMENTS if moments else ())):
        expected = getattr(truth, kind)
        if expected is None:
            assert kind not in weights.kinds()
            continue
        found = flat(weights, kind)
        assert found.keys() == expected.keys()
        for path, values in expected.items():
            assert found[path].shape == values.shape, f"{kind} {path}"
            assert found[path].tobytes() == values.tobytes(), f"{kind} {path}"
    counters = truth.counters
    assert weights.step == counters["step"]
    assert weights.counters == (Counters(counters["adam"], counters["schedule"]) if "adam" in counters else None)


def snapshot(path: Path) -> dict[str, bytes | None]:
    """Everything under a path: file -> contents, directory -> None."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def stored(step_directory: Path) -> dict[str, list[tuple[Any, ...]]]:
    """File -> (shape, dtype, bytes) of every array in it, as NumPy reads them."""
    found = {}
    for file in sorted(step_directory.rglob("*.npz")):
        with np.load(file) as arrays:
            values = [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
        found[str(file.relative_to(step_directory))] = [(a.shape, a.dtype.str, a.tobytes()) for a in values]
    return found


def refused(call: Callable[[], Any], *names: str, error: type[UserError] = CheckpointError) -> str:
    """`call` raises an error of at most two lines that holds every one of `names`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, error), repr(caught.value)
    assert message.count("\n") <= 1, message
    for name in names:
        assert name in message, f"{name!r} not in: {message}"
    return message
