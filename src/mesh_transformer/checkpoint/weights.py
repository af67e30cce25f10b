"""What every stored model is, whatever its format: parameters that can be read one layer at a time.

A format's reader is a `Weights`; converting, comparing, hashing and loading are written once, in these terms.
"""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import named_specs, shape
from mesh_transformer.shapes import Params

# The parameters, and Adam's two moments of each.
Kind = Literal["params", "mu", "nu"]
MOMENTS: tuple[Kind, Kind] = ("mu", "nu")
Format = Literal["native", "quantized", "huggingface", "legacy", "legacy-v2", "memory"]

READERS = 4  # threads, unless a format says otherwise
# What may be read ahead of its use, in bytes; one piece is always allowed.
_READ_AHEAD = 512 * 2**20
_ALIGNMENT = 64  # bytes; JAX on CPU uses such NumPy memory as it is, and copies any other


@dataclasses.dataclass(frozen=True)
class Piece:
    """One parameter of the table, or one layer of it where it has a `layers` axis."""

    path: str
    layer: int | None = None


TOKENIZER_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Counters:
    """Updates that Adam and the schedule have counted; they and the step are independent of each other."""

    adam: int
    schedule: int


class Weights(abc.ABC):
    """An opened model, of which nothing but names, shapes and dtypes has been read.

    Attributes:
        cfg: the architecture.
        format: how it is stored.
        where: the directory or file, for messages.
        step: optimizer steps finished; None where the format does not record it.
        dtypes: parameter path -> dtype in which `read` returns it.
        counters: None if the model holds no optimizer state; else `read` also knows kinds "mu" and "nu".
        moment_dtypes: as `dtypes`, for the moments; empty without optimizer state.
        readers: threads that may read at a time; 1 where reading out of order is dear.
        notes: what was assumed in opening it, a line each, to be told to the user.
        extras: what else the format records and a conversion keeps: {"train_loader": {...}}.
    """

    cfg: ModelConfig
    format: Format
    where: Path
    step: int | None = None
    dtypes: Mapping[str, np.dtype]
    counters: Counters | None = None
    moment_dtypes: Mapping[str, np.dtype] = {}
    notes: tuple[str, ...] = ()
    readers: int = READERS
    extras: Mapping[str, Any] = {}

    @abc.abstractmethod
    def read(self, piece: Piece, kind: Kind = "params") -> np.ndarray:
        """The values of `piece`, in our own axes without `layers`. May be called from several threads.

        Raises:
            CheckpointError: the file is damaged; it is named.
        """

    def order(self) -> list[Piece]:
        """Every piece once, in the order in which reading them is cheapest."""
        return pieces(self.cfg)

    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json in the model's directory, or, of the original's, beside it; None if there is none."""
        for directory in (self.where, self.where.parent) if self.format.startswith("legacy") else (self.where,):
            if (directory / TOKENIZER_FILE).is_file():
                return directory / TOKENIZER_FILE
        return None

    def tokenizer(self) -> bytes | None:
        """The contents of `tokenizer_file`."""
        file = self.tokenizer_file()
        return None if file is None else file.read_bytes()

    def dtype_of(self, path: str, kind: Kind = "params") -> np.dtype:
        """The dtype in which `read` returns a parameter."""
        return (self.dtypes if kind == "params" else self.moment_dtypes)[path]

    def kinds(self) -> tuple[Kind, ...]:
        """What `read` can read."""
        return ("params", *MOMENTS) if self.counters else ("params",)

    @property
    def main_dtype(self) -> np.dtype:
        """The dtype of the large matrices; summed biases may be kept in a wider one."""
        return self.dtypes["embed/tokens"]


class InMemory(Weights):
    """Parameters that are already there: numpy arrays, or jax arrays in any sharding that this process holds whole."""

    format: Format = "memory"

    def __init__(self, cfg: ModelConfig, params: Params, *, step: int | None = None) -> None:
        self.cfg, self.step, self.where = cfg, step, Path("(memory)")
        self._params = params
        self.dtypes = {path: np.dtype(leaf_at(params, path).dtype) for path in named_specs(cfg)}

    def read(self, piece: Piece, kind: Kind = "params") -> np.ndarray:
        leaf = leaf_at(self._params, piece.path)
        return host(leaf) if piece.layer is None else host_row(leaf, piece.layer)


def pieces(cfg: ModelConfig) -> list[Piece]:
    """Every piece: first what no layer has, then layer by layer."""
    specs = named_specs(cfg)
    stacked = [path for path, spec in specs.items() if spec.axes[:1] == ("layers",)]
    return [Piece(path) for path in specs if path not in stacked] + [
        Piece(path, i) for i in range(cfg.n_layers) for path in stacked
    ]


def is_stacked(cfg: ModelConfig, path: str) -> bool:
    """Whether the parameter has a `layers` axis; it is the first then."""
    return named_specs(cfg)[path].axes[:1] == ("layers",)


def whole_shape(cfg: ModelConfig, path: str) -> tuple[int, ...]:
    """Shape of the whole parameter, `layers` included."""
    return shape(named_specs(cfg)[path], cfg)


def piece_shape(cfg: ModelConfig, piece: Piece) -> tuple[int, ...]:
    """Shape of what `Weights.read` returns."""
    return whole_shape(cfg, piece.path)[0 if piece.layer is None else 1 :]


def pieces_of(cfg: ModelConfig, path: str) -> list[Piece]:
    """The pieces of one parameter, in the order of its layers."""
    return [Piece(path, i) for i in range(cfg.n_layers)] if is_stacked(cfg, path) else [Piece(path)]


def stored_bytes(weights: Weights, kinds: Iterable[Kind] = ("params",)) -> int:
    """Bytes of all values as `read` returns them."""
    return sum(
        math.prod(whole_shape(weights.cfg, path)) * weights.dtype_of(path, kind).itemsize
        for kind in kinds
        for path in named_specs(weights.cfg)
    )


def read_ahead(weights: Weights, wanted: Iterable[Piece], kind: Kind = "params") -> Iterator[tuple[Piece, np.ndarray]]:
    """(piece, values) in the order of `wanted`, read by several threads a bounded number of bytes ahead."""

    def n_bytes(piece: Piece) -> int:
        return math.prod(piece_shape(weights.cfg, piece)) * weights.dtype_of(piece.path, kind).itemsize

    in_order = map_ahead(lambda piece: (piece, weights.read(piece, kind)), wanted, n_bytes, weights.readers)
    yield from in_order


def map_ahead(
    function: Callable[[Any], Any], items: Iterable[Any], n_bytes: Callable[[Any], int], threads: int
) -> Iterator[Any]:
    """`map` by several threads, in order, no more than a bounded number of bytes ahead of the consumer."""
    waiting: deque[tuple[concurrent.futures.Future[Any], int]] = deque()
    ahead = 0
    with concurrent.futures.ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:
        try:
            for item in items:
                size = n_bytes(item)
                while waiting and ahead + size > _READ_AHEAD:
                    ahead -= waiting[0][1]
                    yield waiting.popleft()[0].result()
                waiting.append((pool.submit(function, item), size))
                ahead += size
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()


def assemble(
    weights: Weights,
    dtype: Any = None,
    kind: Kind = "params",
    progress: Callable[[int], None] = lambda n: None,
) -> Params:
    """The whole tree as numpy arrays, in memory that JAX on CPU can use without a copy.

    Args:
        dtype: what to convert to while reading; None keeps each parameter as stored.
        progress: called with the bytes read, piece by piece.

    Raises:
        CheckpointError: a file is damaged; it is named.
        ConfigError: a value is too large for `dtype`.
    """
    flat = {
        path: aligned_empty(whole_shape(weights.cfg, path), np.dtype(dtype or weights.dtype_of(path, kind)))
        for path in named_specs(weights.cfg)
    }
    for piece, values in read_ahead(weights, weights.order(), kind):
        into = flat[piece.path]
        try:
            with np.errstate(over="raise"):
                into[() if piece.layer is None else piece.layer] = values
        except FloatingPointError as error:
            raise ConfigError(
                f"{weights.where}: {piece.path} has a value that is too large for {into.dtype}, and would become "
                "infinite; keep the stored dtype, or choose bfloat16"
            ) from error
        progress(values.nbytes)
    return nested(flat)


def aligned_empty(dimensions: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at an address that is a multiple of 64."""
    n_bytes = math.prod(dimensions) * dtype.itemsize
    buffer = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    start = -buffer.__array_interface__["data"][0] % _ALIGNMENT
    return buffer[start : start + n_bytes].view(dtype).reshape(dimensions)


def leaf_at(params: Params, path: str) -> Any:
    """The leaf called "layers/attn/q"."""
    node: Any = params
    for key in path.split("/"):
        node = node[key]
    return node


def nested(flat: Mapping[str, Any]) -> Params:
    """The nested dict of {"layers/attn/q": leaf}."""
    root: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return root


def host(leaf: Any) -> np.ndarray:
    """The whole array on the host."""
    return _on_host(leaf, (), leaf.shape)


def host_row(leaf: Any, i: int) -> np.ndarray:
    """`leaf[i]` on the host; of a jax.Array no more than that leaves the devices."""
    return _on_host(leaf, (i,), leaf.shape[1:])


def _on_host(leaf: Any, row: tuple[int, ...], out_shape: tuple[int, ...]) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf[row])
    # Shard by shard: np.asarray of a sharded jax.Array would keep a whole copy on the host for as long as it lives.
    out = np.empty(out_shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id:
            continue
        if not row:
            out[shard.index] = np.asarray(shard.data)
            continue
        start, stop, _ = shard.index[0].indices(leaf.shape[0])
        if start <= row[0] < stop:
            # The caller's mesh, if one is set, is not this one device's.
            with jax.set_mesh(jax.sharding.Mesh(np.array([shard.device]), ("one",))):
                out[shard.index[1:]] = np.asarray(shard.data[row[0] - start])
    return out
