"""Models stored in 8 or 4 bits: opened by memory map, written from any other model a layer at a time.

A directory that is complete in itself:

    quantized.json    format, version, project_version, quantize (int8, int4 or int4-128), step, model (every field of
                      the architecture), source (path, format and step of what it was made of)
    weights/          a safetensors file for every parameter, named by its path: "layers.attn.q.safetensors" holds
                      "layers.attn.q.values" and "layers.attn.q.scale", "embed.tokens.safetensors" "embed.tokens";
                      layouts: `model.quantize`, stacked over layers
    tokenizer.json    if the source had one
    conversion.json   the certificate: digests of the source and of what its rounded weights are
    manifest.json     sha256 and size of all of these; written last

Opening compares the sizes of all files, and the sums of the small ones; a large file's sum is compared when `read` goes
through its values, as `inspect --digest`, a comparison and a conversion do.
"""

from __future__ import annotations

import importlib.metadata
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mesh_transformer.checkpoint.aligned_file import AlignedFile, open_mapped, read_array
from mesh_transformer.checkpoint.manifest import verify, verify_file
from mesh_transformer.checkpoint.weights import Format, Kind, Piece, Weights, whole_shape
from mesh_transformer.config.checks import shown
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import ParamSpec, is_multiplied, named_specs
from mesh_transformer.model.quantize import QUANTIZATIONS, Int4, Int8, Quantized, described

QUANTIZED_FILE = "quantized.json"
WEIGHTS = "weights"
FORMAT = "mesh-transformer quantised model"
VERSION = 1

_SUMMED_AT_OPENING = 16 * 2**20  # bytes: tokenizers and norms, no matrix of a large model


def looks_quantized(path: Path) -> bool:
    """Whether `open_quantized` should be asked."""
    return (path / QUANTIZED_FILE).is_file()


def open_quantized(directory: Path, step: int | None = None) -> QuantizedWeights:
    """Opens a model whose sizes are found to be right.

    Args:
        step: what it must record, if anything is asked for.

    Raises:
        CheckpointError: something is missing, damaged or of another version, or the step is another.
    """
    verify(directory, sums_up_to=_SUMMED_AT_OPENING)
    opened = QuantizedWeights(directory)
    if step is not None and opened.step != step:
        raise CheckpointError(f"{directory}: holds step {opened.step}, not {step}; leave --step out, or give another")
    return opened


class QuantizedWeights(Weights):
    """A model stored in 8 or 4 bits.

    Read as any model is, its matrices are float32: the rounded weights that it computes with. `stored` gives them as
    they are.

    Attributes:
        quantize: how matrices are stored, one of `quantize.QUANTIZATIONS`.

    Raises:
        CheckpointError: its description or a file's header is damaged or of another version.
    """

    format: Format = "quantized"

    def __init__(self, directory: Path, *, has_manifest: bool = True) -> None:
        self.where = directory
        metadata = _read_metadata(directory / QUANTIZED_FILE)
        self.cfg = _model(metadata, directory / QUANTIZED_FILE)
        self.step, self.quantize = metadata["step"], str(metadata["quantize"])
        self.source: Mapping[str, Any] = metadata.get("source") or {}
        self._stored = {path: _open(self, path, spec) for path, spec in named_specs(self.cfg).items()}
        self.dtypes = {
            path: np.dtype(np.float32) if isinstance(leaf, Quantized) else leaf.dtype
            for path, leaf in self._stored.items()
        }
        self._unverified = set(self._stored) if has_manifest else set()
        self._locks = {path: threading.Lock() for path in self._stored}

    def stored(self, path: str) -> Any:
        """The whole parameter as it is stored, `Quantized` or an array: read-only memory mapped from its file."""
        return self._stored[path]

    def read(self, piece: Piece, kind: Kind = "params") -> np.ndarray:
        assert kind == "params", "a quantised model has no moments"
        self._verify(piece.path)
        leaf, file = self._stored[piece.path], self.where / WEIGHTS / _file_name(piece.path)
        parts = [read_array(file, name, piece.layer) for name in _named(piece.path, leaf)]
        return np.asarray(type(leaf)(*parts).widen(np.float32)) if isinstance(leaf, Quantized) else parts[0]

    def n_bytes(self) -> int:
        """Of all parameters as they are stored."""
        return sum(a.nbytes for a in jax.tree.leaves(self._stored))

    def stored_as(self, path: str) -> str:
        """ "int4", or the dtype of a parameter that is not quantised."""
        return self.quantize if isinstance(self._stored[path], Quantized) else str(self.dtypes[path].name)

    def _verify(self, path: str) -> None:
        with self._locks[path]:
            if path in self._unverified:
                verify_file(self.where, f"{WEIGHTS}/{_file_name(path)}")
                self._unverified.discard(path)


def write_quantized(
    target: Path,
    weights: Weights,
    pieces: Iterable[tuple[Piece, int, Any]],
    name: str,
    *,
    dtype: np.dtype | None = None,
    files: Mapping[str, bytes],
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Writes a model piece by piece; it counts as one when the caller has written its manifest.

    Args:
        target: exists and is empty.
        pieces: from `quantized.quantized_pieces`.
        name: how `pieces` are quantised.
        dtype: what other parameters are rounded to; None keeps each as stored.
        files: name -> contents of files to put beside it: the tokenizer's.
        progress: called with the bytes written.

    Raises:
        OSError: it cannot be written.
    """
    (target / WEIGHTS).mkdir()
    arrays = {path: _arrays(path, _plan(weights, path, name, dtype)) for path in named_specs(weights.cfg)}
    for path, described_ in arrays.items():
        with AlignedFile(target / WEIGHTS / _file_name(path), described_):
            pass
    for piece, _, values in pieces:
        if not isinstance(values, Quantized):
            values = np.asarray(values, dtype or values.dtype)
        with AlignedFile(target / WEIGHTS / _file_name(piece.path), arrays[piece.path], new=False) as file:
            parts = _named(piece.path, values)
            for array, part in parts.items():
                file.write(array, piece.layer, part)
        progress(sum(part.nbytes for part in parts.values()))
    document = {
        "format": FORMAT,
        "version": VERSION,
        "project_version": importlib.metadata.version("mesh-transformer"),
        "quantize": name,
        "step": weights.step,
        "model": weights.cfg.to_dict(),
        "source": {"path": str(weights.where.absolute()), "format": weights.format, "step": weights.step},
    }
    (target / QUANTIZED_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for file_name, data in files.items():
        (target / file_name).write_bytes(data)


def planned_bytes(weights: Weights, name: str, dtype: np.dtype | None) -> int:
    """Of all parameters when `write_quantized` has written them."""
    plans = (_plan(weights, path, name, dtype) for path in named_specs(weights.cfg))
    return sum(int(np.prod(a.shape, dtype=np.int64)) * a.dtype.itemsize for a in jax.tree.leaves(list(plans)))


def _plan(weights: Weights, path: str, name: str, dtype: np.dtype | None) -> Any:
    """What is to be stored of a parameter, as `jax.ShapeDtypeStruct`."""
    spec, shape = named_specs(weights.cfg)[path], whole_shape(weights.cfg, path)
    if is_multiplied(spec):
        return described(name, spec, shape)
    return jax.ShapeDtypeStruct(shape, dtype or weights.dtype_of(path))


def _file_name(path: str) -> str:
    return f"{path.replace('/', '.')}.safetensors"


def _named(path: str, leaf: Any) -> dict[str, Any]:
    """The arrays of a leaf under their names in its file; the large one first, where the alignment is certain."""
    name = path.replace("/", ".")
    if isinstance(leaf, Quantized):
        return {f"{name}.values": leaf.values, f"{name}.scale": leaf.scale}
    return {name: leaf}


def _arrays(path: str, leaf: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (tuple(a.shape), np.dtype(a.dtype)) for name, a in _named(path, leaf).items()}


def _open(weights: QuantizedWeights, path: str, spec: ParamSpec) -> Any:
    file = weights.where / WEIGHTS / _file_name(path)
    found, shape = open_mapped(file), whole_shape(weights.cfg, path)
    if is_multiplied(spec):
        plan: Any = described(weights.quantize, spec, shape)
        kind = Int8 if isinstance(plan, Int8) else Int4
    else:
        plan, kind = jax.ShapeDtypeStruct(shape, next(iter(found.values())).dtype if found else np.float32), None
    expected = _arrays(path, plan)
    there = {name: (a.shape, a.dtype) for name, a in found.items()}
    if there != expected:
        raise CheckpointError(
            f"{file}: holds {shown(_in_words(there))}, but {QUANTIZED_FILE} makes it {_in_words(expected)}; "
            "the model is damaged, or was written by another version"
        )
    parts = [found[name] for name in expected]
    return kind(*parts) if kind else parts[0]


def _in_words(arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    return ", ".join(f"{name} {dtype.name} {shape}" for name, (shape, dtype) in arrays.items())


def _model(metadata: Mapping[str, Any], path: Path) -> ModelConfig:
    try:
        return ModelConfig(**metadata["model"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: its model cannot be understood ({error}); it was written by mesh-transformer "
            f"{shown(metadata.get('project_version'))}"
        ) from error


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, it is not JSON ({error})") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(f'{path}: not a quantised model of this project; expected "format": "{FORMAT}"')
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: format version {shown(metadata.get('version'))}, written by mesh-transformer "
            f"{shown(metadata.get('project_version'))}; this one reads version {VERSION}: install that one"
        )
    step = metadata.get("step")
    if metadata.get("quantize") not in QUANTIZATIONS or not (step is None or (type(step) is int and step >= 0)):
        raise CheckpointError(f"{path}: damaged, its quantize or its step is not as such a model describes them")
    return metadata
