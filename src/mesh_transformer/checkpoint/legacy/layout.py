"""The order of the leaves in the original's v1 shards, and the shape of each (docs/formats.md, sections 1.2 to 1.6)."""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

from mesh_transformer.checkpoint.names import LegacyParam, legacy_table, matrix_shape
from mesh_transformer.checkpoint.weights import Kind, Piece, is_stacked
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import named_specs

N_FILES = 16  # in every shard, whatever the number of leaves

Counter = Literal["adam", "schedule", "step"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a shard: of which parameter and layer, and of which tree; or a counter, where `param` is None.

    `whole` is the shape of the (in, out) matrix, vector or number that the shards' pieces make together.
    """

    name: str  # "causal_transformer_shard/~/layer_0/~/linear/w", or the counter's
    tree: Kind | Counter
    param: LegacyParam | None = None
    piece: Piece | None = None
    whole: tuple[int, ...] = ()

    @property
    def kind(self) -> Kind:
        """`tree` of a leaf that is no counter."""
        assert self.param is not None
        return cast(Kind, self.tree)

    def shard_shape(self, n_shards: int) -> tuple[int, ...]:
        """Shape of one shard's array."""
        if self.param is None or self.param.combine != "concat":
            return self.whole
        axis = self.param.axis
        return (*self.whole[:axis], self.whole[axis] // n_shards, *self.whole[axis + 1 :])


def param_leaves(cfg: ModelConfig) -> list[Leaf]:
    """One tree's leaves in the order of a shard: modules, then parameters, as strings (layer_10 before layer_2)."""
    specs = named_specs(cfg)
    found = []
    for path, param in legacy_table(cfg).items():
        # A bias that is stored and not used has the shape of its scale.
        spec = specs.get(path) or specs[path.removesuffix("bias") + "scale"]
        stacked = spec.axes[:1] == ("layers",)
        assert path not in specs or stacked == is_stacked(cfg, path)
        for i in range(cfg.n_layers) if stacked else [None]:
            module = f"causal_transformer_shard/~/{param.module}".replace("{i}", str(i))
            leaf = Leaf(f"{module}/{param.name}", "params", param, Piece(path, i), matrix_shape(cfg, spec))
            found.append(((module, param.name), leaf))
    return [leaf for _, leaf in sorted(found, key=lambda pair: pair[0])]


def leaves(cfg: ModelConfig, *, with_optimizer: bool) -> list[Leaf]:
    """Every array of a shard in order: optimizer state if there is one, parameters, the step."""
    params = param_leaves(cfg)
    step = Leaf("step", "step")
    if not with_optimizer:
        return [*params, step]
    moments = [dataclasses.replace(leaf, tree=tree) for tree in ("mu", "nu") for leaf in params]
    return [Leaf("Adam's count", "adam"), *moments, Leaf("the schedule's count", "schedule"), *params, step]


def place_of(i: int, n_leaves: int) -> tuple[int, int]:
    """(number of the file, number of the array in it) of leaf `i`: contiguous runs, the first files one longer."""
    size, longer = divmod(n_leaves, N_FILES)
    if i < longer * (size + 1):
        return divmod(i, size + 1)
    file, member = divmod(i - longer * (size + 1), size)
    return longer + file, member


def count_in_file(file: int, n_leaves: int) -> int:
    """How many arrays file number `file` holds."""
    size, longer = divmod(n_leaves, N_FILES)
    return size + (file < longer)


def check_divides(cfg: ModelConfig, n_shards: int) -> None:
    """Returns if the architecture can be cut into `n_shards`.

    Raises:
        ConfigError: a size is not divisible; the message says which numbers would do.
    """
    sizes = {"n_heads": cfg.n_heads, "n_vocab": cfg.n_vocab, "d_model": cfg.d_model, "d_ff": cfg.d_ff}
    for field, size in sizes.items():
        if n_shards < 1 or size % n_shards:
            fitting = [n for n in range(1, cfg.n_heads + 1) if not any(size % n for size in sizes.values())]
            raise ConfigError(
                f"{n_shards} shards do not divide model.{field} = {size}; "
                f"{', '.join(map(str, fitting))} would do for this model"
            )
