"""Reading a Hugging Face directory: safetensors or pytorch_model.bin, in one file or with an index."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from mesh_transformer.checkpoint.huggingface.config import CONFIG, read_config
from mesh_transformer.checkpoint.huggingface.spellings import SPELLINGS
from mesh_transformer.checkpoint.names import hf_family, hf_table
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
_CONSTANTS = re.compile(
    r"(.+\.)?(h|layers)\.\d+\.(attn|self_attn|attention|attn\.attention)"
    r"\.(bias|masked_bias|embed_positions|rotary_emb\.inv_freq)|(.+\.)?rotary_emb\.inv_freq"
)


class _File(Protocol):
    """One file of tensors."""

    def names(self) -> list[str]: ...

    def describe(self, name: str) -> tuple[tuple[int, ...], np.dtype | str]: ...

    def parts(self, name: str) -> Iterable[np.ndarray]:
        """The tensor in parts along its first axis."""
        ...


@dataclasses.dataclass(frozen=True)
class Named:
    """A tensor: its file, and what it is called there."""

    file: _File
    name: str

    def describe(self) -> tuple[tuple[int, ...], np.dtype | str]:
        """Shape and dtype."""
        return self.file.describe(self.name)

    def parts(self) -> Iterable[np.ndarray]:
        """The tensor in parts along its first axis."""
        return self.file.parts(self.name)


class HuggingFaceWeights(Weights):
    """A directory that transformers wrote, or could have.

    The embedding bias of a GPT-J, which Hugging Face does not have, is zeros. Names may lack the family's prefix, as
    GPT-2's own files do, and a tied head may be stored beside the table that it is.

    Raises:
        CheckpointError: something is missing, damaged or does not fit the configuration; the file is named.
    """

    format: Format = "huggingface"

    def __init__(self, path: Path) -> None:
        self.where = path
        self.cfg = read_config(path)
        files = _locate(path)
        if self.cfg.n_layers > len(files):  # a damaged number must not make a table of as many layers
            raise CheckpointError(
                f"{path}: holds {len(files)} tensors, too few for the {self._layers_key()} = {self.cfg.n_layers} of "
                f"{CONFIG}; is {CONFIG} this model's?"
            )
        self._tensors = hf_table(self.cfg)
        self._family = hf_family(self.cfg)
        self._names = {
            Piece(path, tensor.layer): name for name, tensor in self._tensors.items() for path in tensor.paths
        }
        self._files = self._with_prefix(files)
        self._check_names()
        dtypes: dict[str, np.dtype] = {}
        for name, tensor in self._tensors.items():
            found = self._describe(name)
            for each in tensor.paths:
                dtypes[each] = np.dtype(jnp.promote_types(dtypes.get(each, found), found))
        self.dtypes = dtypes | ({"embed/bias": dtypes["embed/tokens"]} if "embed" in self.cfg.biases else {})
        if self.cfg.tied_head and self._head in self._files:
            self._check_tied()

    @property
    def _head(self) -> str:
        return f"{self._family.names['head']}.weight"

    def _layers_key(self) -> str:
        return SPELLINGS[hf_family(self.cfg).model_type].sizes["n_layers"]

    def _with_prefix(self, files: Mapping[str, _File]) -> dict[str, Named]:
        """The tensors by their full names."""
        prefix = self._family.prefix
        bare = {name.removeprefix(prefix) for name in self._tensors}
        found: dict[str, Named] = {}
        for name, file in files.items():
            full = name if name.startswith(prefix) or name not in bare or name in self._tensors else prefix + name
            if full in found:
                raise CheckpointError(f"{self.where}: holds the tensor {full} twice, with its prefix and without")
            found[full] = Named(file, name)
        return found

    def _check_tied(self) -> None:
        """Returns if the head that is stored is the token table, as the configuration says."""
        name = self._names[Piece("embed/tokens")]
        held = (self._files[self._head], self._files[name])
        if held[0].describe() == held[1].describe():
            pairs = zip(held[0].parts(), held[1].parts(), strict=True)
            if all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pairs):
                return
        raise CheckpointError(
            f"{self.where}: {self._head} differs from {name}, and {CONFIG} says that they are one (tie_word_embeddings "
            "is true, or left out where that means true); set it to false in config.json if the head is one of its own"
        )

    def _check_names(self) -> None:
        missing = [name for name in self._tensors if name not in self._files]
        if missing:
            raise CheckpointError(f"{self.where}: lacks the tensor {missing[0]} ({len(missing)} missing in all)")
        known = {*self._tensors, self._head} if self.cfg.tied_head else self._tensors
        extra = [name for name in self._files if name not in known and not _CONSTANTS.fullmatch(name)]
        if extra:
            named = self._family.title
            raise CheckpointError(
                f"{self.where}: holds the tensor {extra[0]} ({len(extra)} such in all), which this {named} has not; "
                "is config.json this model's?"
            )

    def _describe(self, name: str) -> np.dtype:
        found, dtype = self._files[name].describe()
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
        if piece.path == "embed/bias" and piece not in self._names:
            return np.zeros(piece_shape(self.cfg, piece), self.dtypes["embed/bias"])
        name = self._names[piece]
        return self._tensors[name].to_own(self._files[name].parts(), self.dtypes[piece.path], self.cfg, piece.path)


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
