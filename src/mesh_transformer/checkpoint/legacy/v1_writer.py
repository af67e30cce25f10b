"""Writing the original's v1 shards from any model, streaming (docs/formats.md, sections 1.2 to 1.7)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.legacy.layout import (
    N_FILES,
    Leaf,
    check_divides,
    leaves,
    param_leaves,
    place_of,
)
from mesh_transformer.checkpoint.legacy.npz import NpzWriter
from mesh_transformer.checkpoint.weights import MOMENTS, Kind, Piece, Weights, read_ahead
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import named_specs

_FLOAT32 = np.dtype(np.float32)


def check_target(cfg: ModelConfig, n_shards: int) -> None:
    """Returns if v1 shards can hold the architecture.

    Raises:
        ConfigError: the original has no such architecture, or it does not divide into `n_shards`.
    """
    fixed: dict[str, tuple[Any, Any]] = {
        "architecture": (cfg.architecture, "v1"),
        "norm_eps": (cfg.norm_eps, 1e-5),
        "d_ff": (cfg.d_ff, 4 * cfg.d_model),
        "d_head": (cfg.d_head * cfg.n_heads, cfg.d_model),
    }
    for field, (own, only) in fixed.items():
        if own != only:
            times = " * n_heads" if field == "d_head" else ""
            raise ConfigError(
                f"model.{field}{times} = {own!r}: the original's v1 has only {only!r}; keep another format"
            )
    for field, value in cfg.departures().items():
        raise ConfigError(f"model.{field} = {value!r}: the original's v1 has no such model; keep another format")
    check_divides(cfg, n_shards)


def config_document(cfg: ModelConfig, n_shards: int | None) -> dict[str, Any]:
    """The original's flat JSON of a v1 architecture; without cores_per_replica if `n_shards` is None."""
    document: dict[str, Any] = {
        "layers": cfg.n_layers,
        "d_model": cfg.d_model,
        "n_heads": cfg.n_heads,
        "n_vocab": cfg.n_vocab,
        "norm": cfg.norm,
        "pe": cfg.position,
        "seq": cfg.n_ctx,
    }
    if cfg.position == "rotary":
        document["pe_rotary_dims"] = cfg.d_rotary
    return document | ({} if n_shards is None else {"cores_per_replica": n_shards})


def write_v1(
    target: Path,
    weights: Weights,
    n_shards: int,
    *,
    dtype: np.dtype,
    with_optimizer: bool,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Writes `shard_S/P.npz` under `target`, which exists and is empty.

    Args:
        dtype: of all parameters; moments are float32, as the original's are.
        with_optimizer: write moments and counts too; `weights.counters` is not None then.
        progress: called with the bytes read of the model.

    Raises:
        ConfigError: see `check_target`.
        OSError: it cannot be written.
    """
    check_target(weights.cfg, n_shards)
    in_order = leaves(weights.cfg, with_optimizer=with_optimizer)
    values = _values(weights, with_optimizer, progress)
    for shard in range(n_shards):
        (target / f"shard_{shard}").mkdir()
    at = 0
    for file in range(N_FILES):
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(NpzWriter(target / f"shard_{shard}" / f"{file}.npz")) for shard in range(n_shards)
            ]
            while at < len(in_order) and place_of(at, len(in_order))[0] == file:
                leaf = in_order[at]
                parts = _shards(leaf, next(values), n_shards, dtype)
                for writer, part in zip(writers, parts, strict=True):
                    writer.write(part)
                at += 1


def _values(weights: Weights, with_optimizer: bool, progress: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The whole value of every leaf, in the order of a shard."""
    trees: tuple[Kind, ...] = (*MOMENTS, "params") if with_optimizer else ("params",)
    used = named_specs(weights.cfg)
    counters = weights.counters
    if with_optimizer:
        assert counters is not None
        yield np.array(counters.adam, np.int32)
    for tree in trees:
        if tree == "params" and counters is not None and with_optimizer:
            yield np.array(counters.schedule, np.int32)
        in_order = param_leaves(weights.cfg)
        wanted: list[Piece] = [leaf.piece for leaf in in_order if leaf.piece and leaf.piece.path in used]
        found = read_ahead(weights, wanted, tree)
        for leaf in in_order:
            if leaf.piece is None or leaf.piece.path not in used:
                yield np.zeros(leaf.whole, _FLOAT32)  # stored by the original and never used
                continue
            _, values = next(found)
            yield values.reshape(leaf.whole)
            progress(values.nbytes)
    yield np.array(weights.step or 0, np.int32)


def _shards(leaf: Leaf, whole: np.ndarray, n_shards: int, dtype: np.dtype) -> list[np.ndarray]:
    """What each shard stores of a leaf."""
    if leaf.param is None:
        return [whole] * n_shards
    is_moment = leaf.tree != "params"
    kept = _FLOAT32 if is_moment else dtype
    combine = leaf.param.combine
    if combine == "concat":
        return [part.astype(kept, copy=False) for part in np.split(whole, n_shards, axis=leaf.param.axis)]
    if combine == "first":
        # What training leaves in the other shards, and what tells the original's reader that this is a layernorm.
        stale = np.full(leaf.whole, 1 if leaf.param.name == "scale" and not is_moment else 0, kept)
        return [whole.astype(kept), *[stale] * (n_shards - 1)]
    if combine == "sum" and not is_moment:
        return _addends(whole, n_shards, kept)
    return [whole.astype(kept)] * n_shards


def _addends(whole: np.ndarray, n_shards: int, dtype: np.dtype) -> list[np.ndarray]:
    """Equal ones, as training makes them; where those would not add up again, all in the first shard."""
    each = (whole.astype(np.float64) / n_shards).astype(dtype)
    rounded = whole.astype(dtype)
    if np.array_equal((each.astype(np.float64) * n_shards).astype(np.float32), rounded.astype(np.float32)):
        return [each] * n_shards
    # -0.0 is the zero that changes nothing it is added to, not even another -0.0.
    return [rounded, *[np.full_like(rounded, -0.0)] * (n_shards - 1)]
