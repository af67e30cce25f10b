"""What the twelve arrays of a v2 checkpoint are, and how our parameters lie in them: docs/formats.md, 8.2, 8.3, 8.5."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from mesh_transformer.checkpoint.weights import Piece, piece_shape
from mesh_transformer.config.model import ModelConfig

DEVICES_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One stored array.

    Attributes:
        name: what param_order and opt_order call it.
        parts: our parameters in it. Several are fused: along one axis lie n_shards groups, in each a share of every
            part, in this order.
        axes: its axes, in the words of `sizes`.
        split: the axis that is divided over devices; None if every host's file holds the whole.
    """

    name: str
    parts: tuple[str, ...]
    axes: tuple[str, ...]
    split: int | None = None

    @property
    def is_fused(self) -> bool:
        """Whether it holds several of our parameters."""
        return len(self.parts) > 1


_EMBED, _HEAD = "/embed/embedding_shard_v2/~/linear", "/proj/projection/~"
_LAYER = "/transformer/transformer_layer_shard_v2/~"
_ATTN, _MLP = "layers/attn", "layers/mlp"
# In the original's order. Of the feed-forward the linear half comes first, then the gate.
LEAVES = (
    Leaf(f"{_EMBED}/b", ("embed/bias",), ("d_model",)),
    Leaf(f"{_EMBED}/w", ("embed/tokens",), ("n_vocab", "d_model"), 0),
    Leaf(f"{_HEAD}/layer_norm/offset", ("head/ln/bias",), ("d_model",)),
    Leaf(f"{_HEAD}/layer_norm/scale", ("head/ln/scale",), ("d_model",)),
    Leaf(f"{_HEAD}/linear/b", ("head/b",), ("n_vocab",)),
    Leaf(f"{_HEAD}/linear/w", ("head/w",), ("d_model", "n_vocab"), 1),
    Leaf(f"{_LAYER}/layer_norm/offset", ("layers/ln_1/bias",), ("layers", "d_model")),
    Leaf(f"{_LAYER}/layer_norm/scale", ("layers/ln_1/scale",), ("layers", "d_model")),
    Leaf(
        f"{_LAYER}/linear/b",
        (f"{_ATTN}/b_q", f"{_ATTN}/b_v", f"{_ATTN}/b_k", f"{_MLP}/b_in", f"{_MLP}/b_gate"),
        ("layers", "fused_in"),
    ),
    Leaf(
        f"{_LAYER}/linear/w",
        (f"{_ATTN}/q", f"{_ATTN}/v", f"{_ATTN}/k", f"{_MLP}/w_in", f"{_MLP}/w_gate"),
        ("layers", "d_model", "fused_in"),
        2,
    ),
    Leaf(f"{_LAYER}/linear_1/b", (f"{_MLP}/b_out",), ("layers", "d_model")),
    Leaf(f"{_LAYER}/linear_1/w", (f"{_ATTN}/o", f"{_MLP}/w_out"), ("layers", "fused_out", "d_model"), 1),
)
NAMES = tuple(leaf.name for leaf in LEAVES)
LEAF_OF = {path: leaf for leaf in LEAVES for path in leaf.parts}
# The optimizer's: Adam's counter, mu, nu, the schedule's counter.
OPT_NAMES = ("", *NAMES, *NAMES, "")


def sizes(cfg: ModelConfig) -> dict[str, int]:
    """Size of every axis of the stored arrays."""
    width = cfg.n_heads * cfg.d_head
    return {
        "layers": cfg.n_layers,
        "d_model": cfg.d_model,
        "n_vocab": cfg.n_vocab,
        "fused_in": 3 * width + 8 * cfg.d_model,
        "fused_out": width + 4 * cfg.d_model,
    }


def axis_text(axis: str, cfg: ModelConfig) -> str:
    """The keys of the original's configuration that decide an axis, and their values."""
    if not axis.startswith("fused"):
        return f"{axis} = {sizes(cfg)[axis]}"
    return f"n_heads * d_head = {cfg.n_heads} * {cfg.d_head} (beside d_model = {cfg.d_model})"


def stored_shape(leaf: Leaf, cfg: ModelConfig) -> tuple[int, ...]:
    """Shape of the whole stored array."""
    return tuple(sizes(cfg)[axis] for axis in leaf.axes)


def layers_of(leaf: Leaf, cfg: ModelConfig) -> tuple[int | None, ...]:
    """What is read and written of a leaf at a time: its layers, or (None,) where it has none."""
    return tuple(range(cfg.n_layers)) if leaf.axes[0] == "layers" else (None,)


def cut(row: np.ndarray, leaf: Leaf, cfg: ModelConfig, path: str) -> np.ndarray:
    """One parameter's values, a copy, out of one layer of a fused leaf."""
    groups, ends = _grouped(row, leaf, cfg)
    i = leaf.parts.index(path)
    return np.array(groups[:, :, ends[i] : ends[i + 1]]).reshape(piece_shape(cfg, Piece(path, 0)))


def fuse(values: Sequence[np.ndarray], leaf: Leaf, cfg: ModelConfig, dtype: np.dtype) -> np.ndarray:
    """One layer of a fused leaf, of the values of its parts; the inverse of `cut`."""
    row = np.empty(stored_shape(leaf, cfg)[1:], dtype)
    groups, ends = _grouped(row, leaf, cfg)
    for i, part in enumerate(values):
        own = groups[:, :, ends[i] : ends[i + 1]]
        own[...] = part.reshape(own.shape)
    return row


def _grouped(row: np.ndarray, leaf: Leaf, cfg: ModelConfig) -> tuple[np.ndarray, list[int]]:
    """A view (before, n_shards, within a group, after) of one layer, and where the parts begin and end in a group."""
    widths = {_ATTN: cfg.n_heads * cfg.d_head // cfg.n_shards, _MLP: cfg.d_ff // cfg.n_shards}
    ends = [0, *itertools.accumulate(widths[path.rpartition("/")[0]] for path in leaf.parts)]
    axis = next(i for i, name in enumerate(leaf.axes) if name.startswith("fused")) - 1
    return row.reshape(math.prod(row.shape[:axis]), cfg.n_shards, ends[-1], math.prod(row.shape[axis + 1 :])), ends


def block_positions(host: int, hosts: int, n_shards: int) -> list[int]:
    """Which of the 8 * hosts blocks of a split axis the file of `host` holds, in its order.

    The mesh (replica, shard) is filled row by row; along an axis the shard counts first, then the replica
    (docs/formats.md, 8.5).
    """
    replicas = DEVICES_PER_HOST * hosts // n_shards
    own = range(host * DEVICES_PER_HOST, (host + 1) * DEVICES_PER_HOST)
    return sorted((device % n_shards) * replicas + device // n_shards for device in own)
