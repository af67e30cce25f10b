"""Reading the original's v1 shards: full, slim and float16, any number of shards (docs/formats.md, section 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mesh_transformer.checkpoint.legacy.files import ShardFiles
from mesh_transformer.checkpoint.legacy.inference import complete, infer
from mesh_transformer.checkpoint.legacy.layout import N_FILES, Leaf, check_divides, count_in_file, leaves, place_of
from mesh_transformer.checkpoint.weights import Counters, Format, Kind, Piece, Weights
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.load import model_config_from_legacy
from mesh_transformer.model.params import named_specs

_FLOAT32 = np.dtype(np.float32)
_INT32 = np.dtype(np.int32)


class LegacyWeights(Weights):
    """A v1 checkpoint. Everything but values is checked on opening, and the values of the counters and norms.

    Args:
        where: the step directory or archive, for messages.
        given: keys of the original's configuration, perhaps none; `source` names the file that they come from.

    Raises:
        CheckpointError: shards or files are missing, do not belong together, or contradict the configuration.
    """

    format: Format = "legacy"

    def __init__(
        self,
        where: Path,
        files: ShardFiles,
        given: Mapping[str, Any],
        source: str | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        self.where, self._files, self.extras = where, files, extras or {}
        self.n_shards = files.n_shards
        self.readers = files.readers
        if "d_head" in given:
            raise CheckpointError(
                f"{source}: d_head makes it a configuration of the v2 architecture, but {where} holds v1 shards"
            )
        first = [member for file in files.members[0] for member in file]
        found = infer([member.shape for member in first], bool(first) and first[0].dtype == _INT32, str(where))
        self._check_shards(found.n_shards, given, source)
        raw, notes = complete(found, given, source, str(where))
        try:
            self.cfg = model_config_from_legacy(raw)
            check_divides(self.cfg, files.n_shards)
        except ConfigError as error:
            raise CheckpointError(f"{source or where}: {error}") from error
        self.notes = tuple(notes)
        self._leaves = leaves(self.cfg, with_optimizer=found.with_optimizer)
        self._at = {(leaf.tree, leaf.piece): i for i, leaf in enumerate(self._leaves)}
        self._check_members()
        self._set_dtypes(found.with_optimizer)
        self.step = self._counter("step")
        if found.with_optimizer:
            self.counters = Counters(self._counter("adam"), self._counter("schedule"))
        if self.cfg.norm == "layernorm-desync":
            for leaf in self._leaves:
                if leaf.param is not None and leaf.param.combine == "equal" and leaf.piece is not None:
                    self.read(leaf.piece, leaf.kind)

    def _check_shards(self, n_by_shapes: int, given: Mapping[str, Any], source: str | None) -> None:
        n = self._files.n_shards
        if n != n_by_shapes:
            kind = "missing" if n < n_by_shapes else "too many"
            raise CheckpointError(
                f"{self.where}: holds {n} shards, but the shapes in them are those of {n_by_shapes}: "
                f"shard_{min(n, n_by_shapes)} {'is ' + kind if kind == 'missing' else 'is one ' + kind}"
            )
        told = given.get("cores_per_replica", n)
        if told != n:
            raise CheckpointError(f"{source}: cores_per_replica = {told!r:.80}, but {self.where} holds {n} shards")

    def _check_members(self) -> None:
        n = len(self._leaves)
        for shard in range(self._files.n_shards):
            for file in range(N_FILES):
                there, expected = len(self._files.members[shard][file]), count_in_file(file, n)
                if there != expected:
                    raise CheckpointError(
                        f"{self._files.name(shard, file)}: holds {there} arrays; expected {expected} of the {n} of a "
                        "shard: the file is of another checkpoint, or shard_0's are"
                    )
        for i, leaf in enumerate(self._leaves):
            file, member = place_of(i, n)
            kind = self._files.members[0][file][member].dtype
            if (kind == _INT32) != (leaf.param is None):
                raise CheckpointError(f"{self._files.name(0, file)}: arr_{member} ({leaf.name}) is {kind}")
            for shard in range(self._files.n_shards):
                found = self._files.members[shard][file][member]
                expected_shape = leaf.shard_shape(self._files.n_shards)
                if found.shape != expected_shape or found.dtype != kind:
                    raise CheckpointError(
                        f"{self._files.name(shard, file)}: arr_{member} ({leaf.name}) is {found.dtype} {found.shape}; "
                        f"expected {kind} {expected_shape}"
                    )

    def _set_dtypes(self, with_optimizer: bool) -> None:
        stored: dict[tuple[Kind, str], np.dtype] = {}
        for i, leaf in enumerate(self._leaves):
            if leaf.piece is None:
                continue
            file, member = place_of(i, len(self._leaves))
            dtype = self._files.members[0][file][member].dtype
            summed = leaf.param is not None and leaf.param.combine == "sum" and leaf.tree == "params"
            if summed and self._files.n_shards > 1:
                dtype = _FLOAT32  # a sum may have more digits than its terms
            key = (leaf.kind, leaf.piece.path)
            stored[key] = np.dtype(jnp.promote_types(stored.get(key, dtype), dtype))
        specs = named_specs(self.cfg)
        self.dtypes = {path: stored["params", path] for path in specs}
        if with_optimizer:
            self.moment_dtypes = {path: stored["mu", path] for path in specs}

    def _counter(self, name: str) -> int:
        leaf = self._at[name, None]  # type: ignore[index]
        file, member = place_of(leaf, len(self._leaves))
        values = [self._files.counter(shard, file, member) for shard in range(self._files.n_shards)]
        if len(set(values)) > 1:
            other = next(shard for shard, value in enumerate(values) if value != values[0])
            raise CheckpointError(
                f"{self._files.name(other, file)}: {self._leaves[leaf].name} is {values[other]}, but {values[0]} in "
                "shard_0: the shards are of different steps; copy all of one checkpoint"
            )
        if values[0] < 0:
            raise CheckpointError(f"{self._files.name(0, file)}: {self._leaves[leaf].name} is {values[0]}, below 0")
        return values[0]

    def order(self) -> list[Piece]:
        """As the leaves lie in the files."""
        used = named_specs(self.cfg)
        return [leaf.piece for leaf in self._leaves if leaf.tree == "params" and leaf.piece and leaf.piece.path in used]

    def read(self, piece: Piece, kind: Kind = "params") -> np.ndarray:
        """See `Weights.read`; the shards are put together by the parameter's name, never by its values."""
        i = self._at[kind, piece]
        leaf = self._leaves[i]
        assert leaf.param is not None
        combine = leaf.param.combine
        if combine == "sum" and kind != "params":
            combine = "first"  # every shard has the same moment of its own addend, and so has their sum
        if combine == "concat":
            whole = self._concatenated(i, leaf)
        elif combine == "first":
            whole = self._shard(i, 0)
        elif combine == "equal":
            whole = self._same(i, leaf)
        else:
            # In float64, rounded once; from -0.0, so that a sum of nothing but -0.0 is one too.
            parts = [self._shard(i, shard).astype(np.float64) for shard in range(self._files.n_shards)]
            total = np.sum(parts, axis=0, initial=-0.0)
            whole = np.asarray(total / len(parts) if combine == "mean" else total)
        dtype = (self.dtypes if kind == "params" else self.moment_dtypes)[piece.path]
        specs = named_specs(self.cfg)[piece.path]
        sizes = self.cfg.axis_sizes
        return whole.astype(dtype, copy=False).reshape([sizes[axis] for axis in specs.axes if axis != "layers"])

    def _shard(self, i: int, shard: int) -> np.ndarray:
        file, member = place_of(i, len(self._leaves))
        return self._files.open(shard, file).read(member)

    def _concatenated(self, i: int, leaf: Leaf) -> np.ndarray:
        assert leaf.param is not None
        file, member = place_of(i, len(self._leaves))
        described = self._files.members[0][file][member]
        whole = np.empty(leaf.whole, described.dtype)
        width = described.shape[leaf.param.axis]
        for shard in range(self._files.n_shards):
            into = whole[(slice(None),) * leaf.param.axis + (slice(shard * width, (shard + 1) * width),)]
            if into.flags.c_contiguous:
                self._files.open(shard, file).read_into(member, into)
            else:
                into[...] = self._files.open(shard, file).read(member)
        return whole

    def _same(self, i: int, leaf: Leaf) -> np.ndarray:
        first = self._shard(i, 0)
        for shard in range(1, self._files.n_shards):
            if self._shard(i, shard).tobytes() != first.tobytes():
                file, _ = place_of(i, len(self._leaves))
                raise CheckpointError(
                    f"{self._files.name(shard, file)}: {leaf.name} differs from shard_0's; with norm = "
                    f"layernorm-desync each shard has a norm of its own, and there is no one model to read"
                )
        return first
