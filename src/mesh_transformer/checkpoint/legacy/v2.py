"""Reading the original's v2 checkpoints, of one host or several, a layer at a time: docs/formats.md, section 8."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.legacy.npz import BFLOAT16, Member
from mesh_transformer.checkpoint.legacy.v2_files import Metadata, ShardFile, leaf_indices, open_shards, read_metadata
from mesh_transformer.checkpoint.legacy.v2_layout import (
    DEVICES_PER_HOST,
    LEAF_OF,
    LEAVES,
    NAMES,
    OPT_NAMES,
    Leaf,
    axis_text,
    block_positions,
    cut,
    layers_of,
    sizes,
    stored_shape,
)
from mesh_transformer.checkpoint.legacy.v2_writer import config_document, write_v2
from mesh_transformer.checkpoint.weights import MOMENTS, Counters, Format, Kind, Piece, Weights, aligned_empty
from mesh_transformer.config import checks
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.load import model_config_from_legacy
from mesh_transformer.config.model import ModelConfig

__all__ = ["LegacyV2Weights", "config_document", "write_v2"]

_FLOAT32 = np.dtype(np.float32)
_PARAM_DTYPES = (_FLOAT32, BFLOAT16, np.dtype(np.float16))
_MOMENT_DTYPES = (_FLOAT32, BFLOAT16)


class LegacyV2Weights(Weights):
    """A step_N directory of the original's second version.

    Opening it checks names, shapes and dtypes. An array's checksum is compared when the first value of it is read;
    then one layer is read at a time, and the last one of each fused array is kept.

    Args:
        step_directory: holds meta.json, params and, unless saved without, opt_state.
        raw_config: the original's flat configuration; cores_per_replica, which nothing in the files tells, among it.
            With eval_only opt_state is not opened.
        config_name: what messages call the configuration.
        extras: becomes the attribute.

    Raises:
        ConfigError: the configuration is not that of a v2 model, or is unusable.
        CheckpointError: a file is missing, damaged or not that of such a model; it is named.
    """

    format: Format = "legacy-v2"

    def __init__(
        self, step_directory: Path, raw_config: Mapping[str, Any], config_name: str, extras: Mapping[str, Any] = {}
    ) -> None:
        self.where, self.extras, self._config_name = step_directory, extras, config_name
        self.cfg, self.notes = _architecture(raw_config, config_name)
        metadata = read_metadata(step_directory)
        self.step, self._hosts = metadata.step, metadata.hosts
        self._check_hosts(metadata)
        optimizer = step_directory / "opt_state"
        self._index = leaf_indices(metadata, moments=False)
        params = open_shards(step_directory / "params", self._hosts, len(NAMES), "param_order")
        self._files: dict[Kind, Sequence[ShardFile]] = {"params": params}
        if optimizer.is_dir() and raw_config.get("eval_only", False) is not True:
            self._index |= leaf_indices(metadata, moments=True)
            moments = open_shards(optimizer, self._hosts, len(OPT_NAMES), "opt_order")
            self._files |= dict.fromkeys(MOMENTS, moments)
        for kind in self._files:
            for leaf in LEAVES:
                self._check_leaf(kind, leaf)
        if "mu" in self._files:
            self.counters = _counters(self._files["mu"])
            self.moment_dtypes = self._moment_dtypes()
        self.dtypes = {path: self._member("params", leaf).dtype for path, leaf in LEAF_OF.items()}
        self._last = {leaf.name: _LastLayer() for leaf in LEAVES if leaf.is_fused}

    def read(self, piece: Piece, kind: Kind = "params") -> np.ndarray:
        leaf = LEAF_OF[piece.path]
        if not leaf.is_fused:
            return self._stored(kind, leaf, piece.layer)
        assert piece.layer is not None, piece
        layer = piece.layer
        row = self._last[leaf.name].get((kind, layer), lambda: self._stored(kind, leaf, layer))
        return cut(row, leaf, self.cfg, piece.path)

    def order(self) -> list[Piece]:
        """Layer by layer, and what comes out of one stored array together."""
        stacked = [leaf for leaf in LEAVES if layers_of(leaf, self.cfg) != (None,)]
        single = [Piece(path) for leaf in LEAVES if leaf not in stacked for path in leaf.parts]
        return single + [Piece(path, i) for i in range(self.cfg.n_layers) for leaf in stacked for path in leaf.parts]

    def _member(self, kind: Kind, leaf: Leaf) -> Member:
        return self._files[kind][0].members[self._index[kind, leaf.name]]

    def _stored(self, kind: Kind, leaf: Leaf, layer: int | None) -> np.ndarray:
        """A whole stored array, or one layer of it, put together from the blocks of all hosts."""
        files, i = self._files[kind], self._index[kind, leaf.name]
        if leaf.split is None or len(files) == 1:
            return files[0].read(i, layer)
        axis = leaf.split - (layer is not None)
        out = aligned_empty(stored_shape(leaf, self.cfg)[layer is not None :], self._member(kind, leaf).dtype)
        blocks = np.split(out, DEVICES_PER_HOST * len(files), axis)  # views
        for host, file in enumerate(files):
            part = file.read(i, layer)
            positions = block_positions(host, len(files), self.cfg.n_shards)
            for position, block in zip(positions, np.split(part, DEVICES_PER_HOST, axis), strict=True):
                blocks[position][...] = block
        return out

    def _check_hosts(self, metadata: Metadata) -> None:
        """Whether the arrays can have been divided over that many hosts (docs/formats.md, 8.5)."""
        if metadata.hosts == 1:
            return
        n_devices = DEVICES_PER_HOST * metadata.hosts
        given = f"{metadata.file}: total_hosts = {metadata.hosts} means {n_devices} devices, and"
        if n_devices % self.cfg.n_shards:
            raise CheckpointError(
                f"{given} cores_per_replica = {self.cfg.n_shards} in {self._config_name} does not divide them; "
                "expected the value of the run that wrote it"
            )
        for leaf in LEAVES:
            if leaf.split is not None and sizes(self.cfg)[leaf.axes[leaf.split]] % n_devices:
                raise CheckpointError(
                    f"{given} they do not divide the {sizes(self.cfg)[leaf.axes[leaf.split]]} entries of {leaf.name}, "
                    f"which are {axis_text(leaf.axes[leaf.split], self.cfg)} in {self._config_name}; "
                    "expected the configuration of the run that wrote it"
                )

    def _check_leaf(self, kind: Kind, leaf: Leaf) -> None:
        """Shape and dtype of one leaf in the files of all hosts."""
        i = self._index[kind, leaf.name]
        expected = list(stored_shape(leaf, self.cfg))
        if leaf.split is not None:
            expected[leaf.split] //= self._hosts
        allowed = _PARAM_DTYPES if kind == "params" else _MOMENT_DTYPES
        for file in self._files[kind]:
            member = file.members[i]
            what = f"{file.path}: arr_{i} ({leaf.name})"
            if member.shape != tuple(expected):
                pairs = zip(leaf.axes, member.shape, expected, strict=False)
                keys = [axis_text(axis, self.cfg) for axis, found, wanted in pairs if found != wanted]
                share = f", of which one of {self._hosts} hosts holds {tuple(expected)}" if self._hosts > 1 else ""
                raise CheckpointError(
                    f"{what} has shape {member.shape}; expected {stored_shape(leaf, self.cfg)}{share}, because of "
                    f"{' and '.join(keys) or 'its place in a v2 model'} in {self._config_name}"
                )
            if member.dtype not in allowed:
                names = ", ".join(dtype.name for dtype in allowed)
                raise CheckpointError(f"{what} is {member.dtype}; expected one of: {names}")
            if member.dtype != self._member(kind, leaf).dtype:
                raise CheckpointError(
                    f"{what} is {member.dtype}, and {self._member(kind, leaf).dtype} in the file of host 0; "
                    "the files are of two different saves"
                )

    def _moment_dtypes(self) -> dict[str, np.dtype]:
        found = {}
        for path, leaf in LEAF_OF.items():
            mu, nu = (self._member(kind, leaf).dtype for kind in MOMENTS)
            if mu != nu:
                raise CheckpointError(
                    f"{self._files['mu'][0].path}: {leaf.name} is {mu} in mu and {nu} in nu; expected one dtype"
                )
            found[path] = mu
        return found


@dataclasses.dataclass
class _LastLayer:
    """The last layer of one stored array: several parameters are cut out of it."""

    key: tuple[Kind, int] | None = None
    row: np.ndarray | None = None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def get(self, key: tuple[Kind, int], read: Callable[[], np.ndarray]) -> np.ndarray:
        """The layer `key`. The lock is held while it is read: who wants the same one waits rather than read it too."""
        with self.lock:
            if self.row is None or self.key != key:
                self.key = self.row = None  # let go first: two would not be within the bound
                self.row = read()
                self.key = key
            return self.row


def _architecture(raw: Mapping[str, Any], config_name: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """The architecture of a configuration, and what was assumed of it."""
    if "d_head" not in raw:
        raise ConfigError(f"{config_name}: missing: d_head; a v2 checkpoint needs the configuration of a v2 run")
    try:
        cfg = model_config_from_legacy(raw)
    except ConfigError as error:
        raise ConfigError(f"{config_name}: {error}") from error
    notes = [
        f"cores_per_replica = {cfg.n_shards} in {config_name} says how to cut the matrices; the files cannot confirm it"
    ]
    for key, only in (("norm", cfg.norm), ("pe", cfg.position)):
        if raw.get(key, only) != only:
            notes.append(f'{key} = {checks.shown(raw[key])} in {config_name}: not looked at, v2 always has "{only}"')
    return cfg, tuple(notes)


def _counters(files: Sequence[ShardFile]) -> Counters:
    """Adam's and the schedule's, which the files of all hosts hold."""
    found = []
    for file in files:
        values = []
        for i, what in ((0, "Adam's counter"), (len(OPT_NAMES) - 1, "the schedule's counter")):
            member = file.members[i]
            if member != Member((), np.dtype(np.int32)):
                raise CheckpointError(
                    f"{file.path}: arr_{i}, {what}, is {member.dtype} of shape {member.shape}; expected int32 of ()"
                )
            values.append(int(file.read(i)))
            if values[-1] < 0:
                raise CheckpointError(f"{file.path}: arr_{i}, {what}, is {values[-1]}; expected at least 0")
        found.append(Counters(*values))
        if found[-1] != found[0]:
            raise CheckpointError(
                f"{file.path}: has counted {found[-1].adam} and {found[-1].schedule} updates, and host 0 "
                f"{found[0].adam} and {found[0].schedule}; the files are of two different saves"
            )
    return found[0]
