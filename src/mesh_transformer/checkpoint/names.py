"""How other formats lay out our parameters, and what the original calls them.

Shapes, the split of the stacked "layers" axis and which matrices are transposed follow from the parameter table. Two
formats: Hugging Face's (docs/formats.md, section 2; names in `families`) and the original's shards (docs/formats.md,
section 1.6).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np

from mesh_transformer.checkpoint.families import FAMILIES, Family, family_of
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import ParamSpec, named_specs, shape, size

_BLOCK = 64  # rows and columns


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face model: which parameters it holds, and of which layer (None: of none).

    paths: one, or those of q, k and v, which `family.fused` says how to lay together. spec: that of each of them.
    """

    paths: tuple[str, ...]
    layer: int | None
    spec: ParamSpec
    family: Family

    @property
    def path(self) -> str:
        """The one parameter that it is, or the first of several."""
        return self.paths[0]

    @property
    def is_transposed(self) -> bool:
        """Whether Hugging Face stores a matrix (out, in); a table whose rows are looked up is none."""
        is_matrix = bool(self.spec.inputs) and not set(self.spec.inputs) & {"vocab", "ctx"}
        return is_matrix and not (self.family.inputs_first and self.spec.axes[0] == "layers")

    def matrix_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """(in, out) of a matrix, (n,) of a vector."""
        one = matrix_shape(cfg, self.spec)
        if not self.spec.inputs:
            return (len(self.paths) * math.prod(one),)
        return (*one[:-1], len(self.paths) * one[-1])

    def stored_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Shape in a Hugging Face file."""
        return self.matrix_shape(cfg)[:: -1 if self.is_transposed else 1]

    def to_stored(self, own: np.ndarray | list[np.ndarray], cfg: ModelConfig) -> np.ndarray:
        """A piece in our own axes, or one for each of `paths`, as Hugging Face lays it out, contiguous."""
        pieces = own if isinstance(own, list) else [own]
        flat = np.ascontiguousarray(self.together(pieces)).reshape(self.matrix_shape(cfg))
        return transposed(flat) if self.is_transposed else flat

    def together(self, pieces: list[np.ndarray]) -> np.ndarray:
        """One array for each of `paths`, [..., heads, head_dim] where they are several, in the order of one tensor."""
        if len(pieces) == 1:
            return pieces[0]
        return np.stack(pieces, axis=pieces[0].ndim - self._part_axis_from_end)

    def to_own(
        self, parts: Iterable[np.ndarray], dtype: np.dtype, cfg: ModelConfig, path: str | None = None
    ) -> np.ndarray:
        """The inverse of `to_stored` for one parameter, from the rows of the stored tensor in parts, in `dtype`."""
        flat = np.empty(self.matrix_shape(cfg), dtype)
        row = 0
        for part in parts:
            rows = slice(row, row + len(part))
            if self.is_transposed:
                transpose_into(flat[:, rows], part.astype(dtype, copy=False))
            else:
                flat[rows] = part
            row += len(part)
        own = shape(self.spec, cfg)[0 if self.layer is None else 1 :]
        if len(self.paths) == 1:
            return flat.reshape(own)
        at = len(own) - self._part_axis_from_end
        whole = flat.reshape(*own[:at], len(self.paths), *own[at:])
        return np.ascontiguousarray(np.take(whole, self.paths.index(path or self.path), axis=at))

    @property
    def _part_axis_from_end(self) -> int:
        """Where among [..., heads, head_dim] the axis of q, k and v stands, counted from behind, in a fused tensor."""
        return 2 if self.family.fused == "side_by_side" else 1


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
    """Whether Hugging Face's GPT-J is this architecture: v1 with layernorm and rotary positions, and nothing later."""
    return FAMILIES["gptj"].holds(cfg)


def hf_family(cfg: ModelConfig) -> Family:
    """The Hugging Face family that is this architecture.

    Raises:
        ConfigError: there is none among those that are known here.
    """
    family = family_of(cfg)
    if family is None:
        shown = {"architecture": cfg.architecture, "norm": cfg.norm, "position": cfg.position} | cfg.departures()
        raise ConfigError(
            ", ".join(f"model.{name} = {value!r}" for name, value in shown.items())
            + ": Hugging Face's GPT-J has only 'v1', 'layernorm' and 'rotary', and no other family known here "
            f"({', '.join(FAMILIES)}) has these; keep this model in another format"
        )
    return family


def hf_table(cfg: ModelConfig) -> dict[str, HfTensor]:
    """Every Hugging Face tensor by name, layer by layer in a reader's order.

    Raises:
        ConfigError: no family of Hugging Face's has such an architecture.
    """
    family = hf_family(cfg)
    specs = named_specs(cfg)
    together: dict[str, list[str]] = {}
    for path in specs:
        if (name := family.name(path)) is not None:
            together.setdefault(name, []).append(path)
    # q, k and v, not in the table's order.
    held = {name: tuple(sorted(paths, key=lambda path: "qkv".find(path[-1]))) for name, paths in together.items()}
    stacked = {name: paths for name, paths in held.items() if specs[paths[0]].axes[0] == "layers"}
    table: dict[str, HfTensor] = {}
    for name, paths in held.items():
        if name not in stacked:
            table[name] = HfTensor(paths, None, specs[paths[0]], family)
    for i in range(cfg.n_layers):
        table |= {name.format(i=i): HfTensor(paths, i, specs[paths[0]], family) for name, paths in stacked.items()}
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
    if cfg.departures():
        named = ", ".join(f"model.{name} = {value!r}" for name, value in cfg.departures().items())
        raise ConfigError(f"{named}: the original had no such model, and counts none of its parameters")
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
