"""Reading a Hugging Face directory: safetensors or pytorch_model.bin, in one file or with an index."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from mesh_transformer.checkpoint.huggingface.config import CONFIG, read_config
from mesh_transformer.checkpoint.names import hf_table
from mesh_transformer.checkpoint.torch_file import TorchFile
from mesh_transformer.checkpoint.weights import Format, Kind, Piece, Weights, piece_shape
from mesh_transformer.config.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TORCH_SINGLE = "pytorch_model.bin"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_PART_BYTES = 64 * 2**20
# safetensors' names of the dtypes that a parameter may have; others may belong to constants.
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
# Constants that old exports hold beside the parameters: the causal mask and its fill value, the rotary table.
_CONSTANTS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions|rotary_emb\.inv_freq)")


class _File(Protocol):
    """One file of tensors."""

    def names(self) -> list[str]: ...

    def describe(self, name: str) -> tuple[tuple[int, ...], np.dtype | str]: ...

    def parts(self, name: str) -> Iterable[np.ndarray]:
        """The tensor in parts along its first axis."""
        ...


class HuggingFaceWeights(Weights):
    """A directory that transformers wrote, or could have.

    The embedding bias, which Hugging Face does not have, is zeros.

    Raises:
        CheckpointError: something is missing, damaged or does not fit the configuration; the file is named.
    """

    format: Format = "huggingface"

    def __init__(self, path: Path) -> None:
        self.where = path
        self.cfg = read_config(path)
        self._files = _locate(path)
        if self.cfg.n_layers > len(self._files):  # a damaged number must not make a table of as many layers
            raise CheckpointError(
                f"{path}: holds {len(self._files)} tensors, too few for the n_layer = {self.cfg.n_layers} of {CONFIG}; "
                f"is {CONFIG} this model's?"
            )
        self._tensors = hf_table(self.cfg)
        self._names = {Piece(tensor.path, tensor.layer): name for name, tensor in self._tensors.items()}
        self._check_names()
        dtypes: dict[str, np.dtype] = {}
        for name, tensor in self._tensors.items():
            found = self._describe(name)
            dtypes[tensor.path] = np.dtype(jnp.promote_types(dtypes.get(tensor.path, found), found))
        self.dtypes = dtypes | {"embed/bias": dtypes["embed/tokens"]}

    def _check_names(self) -> None:
        missing = [name for name in self._tensors if name not in self._files]
        if missing:
            raise CheckpointError(f"{self.where}: lacks the tensor {missing[0]} ({len(missing)} missing in all)")
        extra = [name for name in self._files if name not in self._tensors and not _CONSTANTS.fullmatch(name)]
        if extra:
            raise CheckpointError(
                f"{self.where}: holds the tensor {extra[0]} ({len(extra)} such in all), which this GPT-J has not; "
                "is config.json this model's?"
            )

    def _describe(self, name: str) -> np.dtype:
        found, dtype = self._files[name].describe(name)
        expected = self._tensors[name].stored_shape(self.cfg)
        if found != expected:
            raise CheckpointError(
                f"{self.where}: {name}: shape {found}, but the configuration makes it {expected}; "
                "is the configuration this model's?"
            )
        if dtype not in _DTYPES.values():
            raise CheckpointError(f"{self.where}: {name}: dtype {dtype}; expected float32, bfloat16 or float16")
        return np.dtype(dtype)

    def read(self, piece: Piece, kind: Kind = "params") -> np.ndarray:
        if piece.path == "embed/bias":
            return np.zeros(piece_shape(self.cfg, piece), self.dtypes["embed/bias"])
        name = self._names[piece]
        return self._tensors[name].to_own(self._files[name].parts(name), self.dtypes[piece.path], self.cfg)


def _locate(path: Path) -> Mapping[str, _File]:
    """Tensor name -> the file that holds it; safetensors where there are both."""
    for index, single, kind in ((INDEX, SINGLE, _SafetensorsFile), (_TORCH_INDEX, _TORCH_SINGLE, _BinFile)):
        if (path / index).is_file():
            return _by_index(path, index, kind)
        if (path / single).is_file():
            opened: _File = kind(path / single)
            return dict.fromkeys(opened.names(), opened)
    raise CheckpointError(f"{path}: holds neither {SINGLE} nor {INDEX}, nor {_TORCH_SINGLE} or {_TORCH_INDEX}")


def _by_index(path: Path, index: str, kind: Any) -> dict[str, _File]:
    try:
        weight_map = dict(json.loads((path / index).read_bytes())["weight_map"])
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not (path / name).is_file()]
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(f'{path / index}: not JSON with a "weight_map"; it is damaged, copy it again') from error
    if outside:
        raise CheckpointError(f"{path / index}: names the file {outside[0]!r:.80}; expected one in the same directory")
    if absent:
        raise CheckpointError(f"{path / absent[0]}: missing, though {index} names it")
    files: dict[str, _File] = {name: kind(path / name) for name in names}
    held = {name: set(file.names()) for name, file in files.items()}
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise CheckpointError(f"{path / name}: lacks the tensor {tensor}, though {index} says that it is there")
    return {tensor: files[name] for tensor, name in weight_map.items()}


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as opened:
            self._found = {}
            for name in list(opened.keys()):
                part = opened.get_slice(name)
                self._found[name] = (tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))

    def names(self) -> list[str]:
        return list(self._found)

    def describe(self, name: str) -> tuple[tuple[int, ...], np.dtype | str]:
        return self._found[name]

    def parts(self, name: str) -> Iterator[np.ndarray]:
        dimensions, dtype = self._found[name]
        row_bytes = math.prod(dimensions[1:]) * np.dtype(dtype).itemsize
        rows = max(1, _PART_BYTES // row_bytes)
        for start in range(0, dimensions[0], rows):
            # Opened anew: the library maps the file into memory, and pages read stay resident until it is closed.
            with self._open() as opened:
                yield np.asarray(opened.get_slice(name)[start : min(start + rows, dimensions[0])])

    def _open(self) -> Any:
        return _opened(self.path)


def _opened(path: Path) -> Any:
    import contextlib

    from safetensors import SafetensorError, safe_open

    @contextlib.contextmanager
    def reading() -> Iterator[Any]:
        try:
            with safe_open(path, framework="numpy") as opened:
                yield opened
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]  # it may quote the file
            raise CheckpointError(f"{path}: not a whole safetensors file ({reason})") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error

    return reading()


class _BinFile:
    def __init__(self, path: Path) -> None:
        self._file = TorchFile(path)

    def names(self) -> list[str]:
        return list(self._file.tensors)

    def describe(self, name: str) -> tuple[tuple[int, ...], np.dtype | str]:
        found = self._file.tensors[name]
        return found.shape, found.dtype

    def parts(self, name: str) -> Iterator[np.ndarray]:
        yield self._file.read(name)
