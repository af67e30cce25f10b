"""Writing the original's v2 checkpoints: docs/formats.md, section 8."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mesh_transformer.checkpoint.legacy.npz import BFLOAT16, NpzWriter, data_of
from mesh_transformer.checkpoint.legacy.v2_layout import LEAVES, NAMES, OPT_NAMES, fuse, layers_of, stored_shape
from mesh_transformer.checkpoint.weights import MOMENTS, Kind, Piece, Weights, read_ahead
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.load import model_config_from_legacy
from mesh_transformer.config.model import ModelConfig, differing_fields

_FLOAT32 = np.dtype(np.float32)
_ALLOWED = {"params": (_FLOAT32, BFLOAT16, np.dtype(np.float16)), "moments": (_FLOAT32, BFLOAT16)}


def config_document(cfg: ModelConfig) -> dict[str, Any]:
    """The keys about the architecture in the original's flat JSON configuration of a v2 model.

    Raises:
        ConfigError: it is no v2 model, or has what the original's configuration has no key for.
    """
    if cfg.architecture != "v2":
        raise ConfigError(
            f"model.architecture = {cfg.architecture!r} cannot be written as a v2 checkpoint; expected 'v2': "
            "write the v1 format, or keep the native one"
        )
    document = {
        "layers": cfg.n_layers,
        "d_model": cfg.d_model,
        "n_heads": cfg.n_heads,
        "d_head": cfg.d_head,
        "n_vocab": cfg.n_vocab,
        "seq": cfg.n_ctx,
        "norm": cfg.norm,
        "pe": cfg.position,
        "pe_rotary_dims": cfg.d_rotary,
        "cores_per_replica": cfg.n_shards,
    }
    for name, (ours, theirs) in differing_fields(cfg, model_config_from_legacy(document)).items():
        raise ConfigError(
            f"model.{name} = {ours} cannot be written as a v2 checkpoint: the original always had {theirs}; "
            "keep this model in the native format"
        )
    return document


def write_v2(
    target: Path,
    weights: Weights,
    *,
    dtype: np.dtype | None,
    with_optimizer: bool,
    moment_dtype: np.dtype | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Fills the empty directory `target`, a step_N, as one host wrote it; a layer at a time is in memory.

    Args:
        dtype: of the parameters: float32, bfloat16 or float16. None keeps what is stored; where parameters that share
            an array differ, the narrowest that holds them all.
        with_optimizer: write opt_state too.
        moment_dtype: as `dtype`, for Adam's moments: float32 or bfloat16.
        progress: called with the bytes written, piece by piece.

    Raises:
        ConfigError: v2 has no such model or dtype, or there is no optimizer state; nothing was written. Or a value is
            too large for the dtype.
        CheckpointError: a file of the source is damaged.
    """
    config_document(weights.cfg)
    counters = weights.counters
    if with_optimizer and counters is None:
        raise ConfigError(f"{weights.where}: holds no optimizer state that could be written; leave it out")
    kinds = weights.kinds() if with_optimizer else ("params",)
    chosen = {kind: _dtypes(weights, kind, dtype if kind == "params" else moment_dtype) for kind in kinds}
    metadata = {"total_hosts": 1, "step": weights.step or 0, "param_order": NAMES, "opt_order": OPT_NAMES}
    (target / "meta.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    (target / "params").mkdir()
    with NpzWriter(target / "params" / "shard_0.npz") as writer:
        _write(writer, weights, "params", chosen["params"], progress)
    if not with_optimizer or counters is None:
        return
    (target / "opt_state").mkdir()
    with NpzWriter(target / "opt_state" / "shard_0.npz") as writer:
        writer.write(np.asarray(counters.adam, np.int32))
        for kind in MOMENTS:
            _write(writer, weights, kind, chosen[kind], progress)
        writer.write(np.asarray(counters.schedule, np.int32))


def _dtypes(weights: Weights, kind: Kind, wanted: np.dtype | None) -> dict[str, np.dtype]:
    """Name of every leaf -> the dtype to store it in."""
    found = {}
    for leaf in LEAVES:
        own = (weights.dtype_of(path, kind) for path in leaf.parts)
        found[leaf.name] = (
            np.dtype(wanted) if wanted is not None else np.dtype(functools.reduce(jnp.promote_types, own))
        )
    what = "params" if kind == "params" else "moments"
    for dtype in found.values():
        if dtype not in _ALLOWED[what]:
            raise ConfigError(
                f"{weights.where}: {what} cannot be written in {dtype} as a v2 checkpoint; expected one of: "
                f"{', '.join(allowed.name for allowed in _ALLOWED[what])}"
            )
    return found


@contextlib.contextmanager
def _in_range(name: str, dtype: np.dtype) -> Iterator[None]:
    try:
        with np.errstate(over="raise"):
            yield
    except FloatingPointError as error:
        raise ConfigError(
            f"{name}: a value is too large for {dtype}; write the model in float32 or bfloat16"
        ) from error


def _write(
    writer: NpzWriter, weights: Weights, kind: Kind, dtypes: Mapping[str, np.dtype], progress: Callable[[int], None]
) -> None:
    """The twelve arrays of one kind."""
    cfg = weights.cfg
    wanted = [Piece(path, i) for leaf in LEAVES for i in layers_of(leaf, cfg) for path in leaf.parts]
    ready = read_ahead(weights, wanted, kind)
    for leaf in LEAVES:
        dtype = dtypes[leaf.name]
        with writer.member(stored_shape(leaf, cfg), dtype) as stream:
            for _ in layers_of(leaf, cfg):
                values = [next(ready)[1] for _ in leaf.parts]
                with _in_range(leaf.name, dtype):
                    stored = fuse(values, leaf, cfg, dtype) if leaf.is_fused else values[0].astype(dtype, copy=False)
                stream.write(data_of(stored))
                progress(stored.nbytes)
