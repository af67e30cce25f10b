"""What other formats call our parameters, and how they lay them out.

Only names are written here; shapes, the split of the stacked "layers" axis and which matrices are transposed follow
from the parameter table. Two formats: Hugging Face GPT-J (docs/formats.md, section 2) and the original's shards
(docs/formats.md, section 1.6).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import ParamSpec, named_specs, shape, size

# Our path -> Hugging Face name, {i} being the layer; None: nameless there, added to every row of the embedding.
_HF_NAMES: dict[str, str | None] = {
    "embed/tokens": "transformer.wte.weight",
    "embed/bias": None,
    "layers/ln_1/scale": "transformer.h.{i}.ln_1.weight",
    "layers/ln_1/bias": "transformer.h.{i}.ln_1.bias",
    "layers/attn/q": "transformer.h.{i}.attn.q_proj.weight",
    "layers/attn/k": "transformer.h.{i}.attn.k_proj.weight",
    "layers/attn/v": "transformer.h.{i}.attn.v_proj.weight",
    "layers/attn/o": "transformer.h.{i}.attn.out_proj.weight",
    "layers/mlp/w_in": "transformer.h.{i}.mlp.fc_in.weight",
    "layers/mlp/b_in": "transformer.h.{i}.mlp.fc_in.bias",
    "layers/mlp/w_out": "transformer.h.{i}.mlp.fc_out.weight",
    "layers/mlp/b_out": "transformer.h.{i}.mlp.fc_out.bias",
    "head/ln/scale": "transformer.ln_f.weight",
    "head/ln/bias": "transformer.ln_f.bias",
    "head/w": "lm_head.weight",
    "head/b": "lm_head.bias",
}


_BLOCK = 64  # rows and columns


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face GPT-J: which parameter it is, and of which layer (None: of none)."""

    path: str
    layer: int | None
    spec: ParamSpec

    @property
    def is_transposed(self) -> bool:
        """Hugging Face stores (out, in); a table whose rows are looked up is no product and stays as it is."""
        return bool(self.spec.inputs) and self.spec.inputs != ("vocab",)

    def matrix_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """(in, out) of a matrix, (n,) of a vector."""
        return matrix_shape(cfg, self.spec)

    def stored_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Shape in a Hugging Face file."""
        return self.matrix_shape(cfg)[:: -1 if self.is_transposed else 1]

    def to_stored(self, own: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        """A piece in our own axes as Hugging Face lays it out, contiguous."""
        flat = np.ascontiguousarray(own).reshape(self.matrix_shape(cfg))
        return transposed(flat) if self.is_transposed else flat

    def to_own(self, parts: Iterable[np.ndarray], dtype: np.dtype, cfg: ModelConfig) -> np.ndarray:
        """The inverse of `to_stored`, from the rows of the stored tensor in parts, converted to `dtype`."""
        flat = np.empty(self.matrix_shape(cfg), dtype)
        row = 0
        for part in parts:
            rows = slice(row, row + len(part))
            if self.is_transposed:
                transpose_into(flat[:, rows], part.astype(dtype, copy=False))
            else:
                flat[rows] = part
            row += len(part)
        return flat.reshape(shape(self.spec, cfg)[0 if self.layer is None else 1 :])


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A contiguous copy of `matrix.T`."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    transpose_into(out, matrix)
    return out


def transpose_into(out: np.ndarray, matrix: np.ndarray) -> None:
    """`out[...] = matrix.T`, in blocks that a processor's cache holds: four times as fast as NumPy's."""
    to, bits = (array.view(f"u{matrix.dtype.itemsize}") for array in (out, matrix))
    for i in range(0, bits.shape[0], _BLOCK):
        for j in range(0, bits.shape[1], _BLOCK):
            to[j : j + _BLOCK, i : i + _BLOCK] = bits[i : i + _BLOCK, j : j + _BLOCK].T


def matrix_shape(cfg: ModelConfig, spec: ParamSpec) -> tuple[int, ...]:
    """One layer of a parameter with contracted axes flattened into one and the others into another.

    (in, out) of a matrix, (n,) of a vector, () of a number.
    """
    sizes = cfg.axis_sizes
    axes = [axis for axis in spec.axes if axis != "layers"]
    if not spec.inputs:
        return tuple(sizes[axis] for axis in axes)
    runs = itertools.groupby(axes, key=lambda axis: axis in spec.inputs)
    return tuple(math.prod(sizes[axis] for axis in run) for _, run in runs)


def has_hf_names(cfg: ModelConfig) -> bool:
    """Whether Hugging Face's GPT-J is this architecture: v1 with layernorm and rotary positions."""
    return cfg.architecture == "v1" and cfg.norm == "layernorm" and cfg.position == "rotary"


def hf_table(cfg: ModelConfig) -> dict[str, HfTensor]:
    """Every Hugging Face tensor by name, layer by layer in a reader's order.

    Raises:
        ConfigError: Hugging Face's GPT-J has no such architecture, norm or position.
    """
    if not has_hf_names(cfg):
        raise ConfigError(
            f"model.architecture = {cfg.architecture!r}, model.norm = {cfg.norm!r}, model.position = {cfg.position!r}: "
            "Hugging Face's GPT-J has only 'v1', 'layernorm' and 'rotary'; keep this model in another format"
        )
    specs = {path: spec for path, spec in named_specs(cfg).items() if _HF_NAMES[path] is not None}
    stacked = {path: spec for path, spec in specs.items() if spec.axes[0] == "layers"}
    table: dict[str, HfTensor] = {}
    for path, spec in specs.items():
        if path not in stacked:
            table[str(_HF_NAMES[path])] = HfTensor(path, None, spec)
    for i in range(cfg.n_layers):
        table |= {str(_HF_NAMES[path]).format(i=i): HfTensor(path, i, spec) for path, spec in stacked.items()}
    return table


Combine = Literal["concat", "sum", "first", "mean", "equal"]


@dataclasses.dataclass(frozen=True)
class LegacyParam:
    """One parameter in the original's shards.

    `module` is its name after "causal_transformer_shard/~/", {i} being the layer; `name` is the parameter's in it.
    `combine` says how the shards' pieces, each the (in, out) matrix or vector of one layer, make the whole:
    concatenated along `axis`; summed; the first shard's alone; their mean (all are equal); or the one value that all
    must share, for otherwise every shard has a layernorm of its own and there is no whole.
    """

    module: str
    name: str
    combine: Combine
    axis: int = 0


_LEGACY: dict[str, LegacyParam] = {
    "embed/tokens": LegacyParam("embedding_shard/~/linear", "w", "concat", 0),
    "embed/bias": LegacyParam("embedding_shard/~/linear", "b", "sum"),
    "layers/attn/q": LegacyParam("layer_{i}/~/linear", "w", "concat", 1),
    "layers/attn/v": LegacyParam("layer_{i}/~/linear_1", "w", "concat", 1),
    "layers/attn/k": LegacyParam("layer_{i}/~/linear_2", "w", "concat", 1),
    "layers/attn/o": LegacyParam("layer_{i}/~/linear_3", "w", "concat", 0),
    "layers/mlp/w_in": LegacyParam("layer_{i}/~/linear_4", "w", "concat", 1),
    "layers/mlp/b_in": LegacyParam("layer_{i}/~/linear_4", "b", "concat", 0),
    "layers/mlp/w_out": LegacyParam("layer_{i}/~/linear_5", "w", "concat", 0),
    "layers/mlp/b_out": LegacyParam("layer_{i}/~/linear_5", "b", "sum"),
    "head/w": LegacyParam("projection_shard/~/linear", "w", "concat", 1),
    "head/b": LegacyParam("projection_shard/~/linear", "b", "concat", 0),
}
_LEGACY_POSITIONS: dict[str, dict[str, LegacyParam]] = {
    "rotary": {},
    "fixed": {"embed/positions": LegacyParam("embedding_shard", "pos_embs", "concat", 1)},
    "t5": {"relative/bias": LegacyParam("relative_position_embs", "rel_embedding", "concat", 0)},
}
# Norm -> module and how its shards combine.
_LEGACY_NORMS: dict[str, tuple[str, Combine]] = {
    "layernorm": ("replicated_layer_norm", "first"),
    "layernorm-nobias": ("replicated_layer_norm", "first"),
    "layernorm-desync": ("layer_norm", "equal"),
    "rmsnorm": ("rms_norm", "mean"),
    "rmsnorm-bias": ("rms_norm", "mean"),
    "scalenorm": ("rms_norm", "mean"),
    "scalenorm-bias": ("rms_norm", "mean"),
}
_NORM_PLACES = {"layers/ln_1": "layer_{i}", "head/ln": "projection_shard"}


def legacy_table(cfg: ModelConfig) -> dict[str, LegacyParam]:
    """Our path -> the parameter in the original's shards.

    Every path of the parameter table, and for norm "layernorm-nobias" also the two norms' "bias", which the original
    stores and never reads.
    """
    kind, combine = _LEGACY_NORMS[cfg.norm]
    table = _LEGACY | _LEGACY_POSITIONS[cfg.position]
    for path, module in _NORM_PLACES.items():
        table[f"{path}/scale"] = LegacyParam(f"{module}/~/{kind}", "scale", combine)
        if cfg.norm == "layernorm-nobias" or f"{path}/bias" in named_specs(cfg):
            table[f"{path}/bias"] = LegacyParam(f"{module}/~/{kind}", "offset", combine)
    return table


def count_in_shards(cfg: ModelConfig, n_shards: int) -> int:
    """Parameters as the original counted them: what is not cut into shards counts once for each.

    Raises:
        ConfigError: the architecture cannot be cut into `n_shards`.
    """
    if cfg.architecture != "v1":
        raise ConfigError(f"model.architecture = {cfg.architecture!r} was not stored in shards of whole layers")
    for field in ("n_heads", "n_vocab", "d_model"):
        if n_shards < 1 or getattr(cfg, field) % n_shards:
            raise ConfigError(f"{n_shards} shards do not divide model.{field} = {getattr(cfg, field)}")
    specs = named_specs(cfg)
    total = 0
    for path, entry in legacy_table(cfg).items():
        # A stored bias that the table does not have is as large as its scale.
        values = size(specs.get(path) or specs[path.removesuffix("bias") + "scale"], cfg)
        total += values if entry.combine == "concat" else n_shards * values
    return total
