"""Facts about an architecture: no mesh, no dtype policy, no optimizer, no tokenizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from mesh_transformer.config.errors import ConfigError

Norm = Literal[
    "layernorm",
    "layernorm-desync",
    "layernorm-nobias",
    "rmsnorm",
    "rmsnorm-bias",
    "scalenorm",
    "scalenorm-bias",
]
Position = Literal["rotary", "fixed", "t5"]
Architecture = Literal["v1", "v2"]
FeedForward = Literal["gelu_tanh", "glu_gelu_tanh"]

# Number of distance buckets in a T5 relative position table.
N_BUCKETS = 32

# The feed-forward of each architecture.
_FEED_FORWARD = {"v1": "gelu_tanh", "v2": "glu_gelu_tanh"}
# Default of a field that is worked out from its neighbours.
_FROM_OTHERS: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and arithmetic of one decoder.

    `d_head`, `d_ff`, `d_rotary` and `n_kv_heads` may be left at 0: they become `d_model / n_heads`, `4 d_model`,
    `d_head` and `n_heads`. `feed_forward` follows `architecture` where it is left out. Fields from `residual` on,
    `feed_forward` apart, have one value that is built today; they are named here, and read by the parameter table and
    by `block`, because other families differ from GPT-J in exactly these.

    `architecture` "v2" is the original's second one: a gated feed-forward, biases on q, k and v, and attention in
    `n_shards` heads of width `n_heads d_head / n_shards`, whatever `n_heads` is; scores are divided by sqrt(`d_head`)
    all the same (docs/formats.md, section 8.3). `n_heads d_head` need not be `d_model`.

    Raises:
        ConfigError: a value is impossible; the message names the field and the values.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_vocab: int  # rows stored, padding included
    n_ctx: int
    d_head: int = 0
    d_ff: int = 0
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    position: Position = "rotary"
    d_rotary: int = 0

    architecture: Architecture = "v1"
    n_shards: int = 0  # v2 alone: the original's cores_per_replica, which decides the attention heads
    residual: Literal["parallel"] = "parallel"
    n_kv_heads: int = 0
    rotary_layout: Literal["interleaved"] = "interleaved"
    feed_forward: FeedForward = _FROM_OTHERS  # gelu(in), or linear * gelu(gate) ("glu")
    tied_head: Literal[False] = False

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "n_vocab", "n_ctx"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} = {getattr(self, name)} must be at least 1")
        for name in ("d_head", "d_ff", "d_rotary", "n_kv_heads", "n_shards"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name} = {getattr(self, name)} must not be negative")
        if self.feed_forward is None:
            object.__setattr__(self, "feed_forward", _FEED_FORWARD.get(self.architecture))
        for field in dataclasses.fields(self):
            allowed = CHOICES.get(field.name)
            if allowed and getattr(self, field.name) not in allowed:
                raise ConfigError(
                    f"model.{field.name} = {getattr(self, field.name)!r} is not supported; "
                    f"expected one of: {', '.join(map(str, allowed))}"
                )
        if self.d_head == 0 and self.d_model % self.n_heads:
            raise ConfigError(
                f"model.n_heads = {self.n_heads} must divide model.d_model = {self.d_model} "
                f"(or give model.d_head); {_nearest_divisor(self.d_model, self.n_heads)} would"
            )
        # The defaults that depend on other fields; with `feed_forward`, the only ones that are filled in.
        object.__setattr__(self, "d_head", self.d_head or self.d_model // self.n_heads)
        object.__setattr__(self, "d_ff", self.d_ff or 4 * self.d_model)
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        self._check_architecture()
        if self.position == "rotary":
            object.__setattr__(self, "d_rotary", self.d_rotary or self.d_head)
            width = self.axis_sizes["head_dim"]
            if self.d_rotary > width or self.d_rotary % 2:
                limit = "model.d_head" if self.architecture == "v1" else "model.n_heads * model.d_head / model.n_shards"
                raise ConfigError(
                    f"model.d_rotary = {self.d_rotary} must be even and at most {limit} = {width}; "
                    f"{min(self.d_rotary, width) // 2 * 2} would do"
                )
        else:
            object.__setattr__(self, "d_rotary", 0)
        if self.n_kv_heads != self.n_heads:
            raise ConfigError(
                f"model.n_kv_heads = {self.n_kv_heads} differs from model.n_heads = {self.n_heads}: "
                "grouped-query attention is not supported; leave n_kv_heads out"
            )
        if not 0 < self.norm_eps < math.inf:
            raise ConfigError(f"model.norm_eps = {self.norm_eps} must be positive and finite; 1e-5 is usual")

    def _check_architecture(self) -> None:
        """What each of the original's two architectures fixes."""
        if self.feed_forward != _FEED_FORWARD[self.architecture]:
            raise ConfigError(
                f"model.feed_forward = {self.feed_forward!r} is not that of the {self.architecture} architecture; "
                f"expected {_FEED_FORWARD[self.architecture]!r}, or leave it out"
            )
        if self.architecture == "v1":
            if self.n_shards:
                raise ConfigError(
                    f"model.n_shards = {self.n_shards} belongs to the v2 architecture, and model.architecture is 'v1'; "
                    "leave it out, or set model.architecture to 'v2'"
                )
            return
        if not self.n_shards:
            raise ConfigError(
                "model.n_shards is missing: it is the number of attention heads of the v2 architecture; give the "
                "cores_per_replica that the model was trained with"
            )
        for name, only in (("norm", "layernorm"), ("position", "rotary")):
            if getattr(self, name) != only:
                raise ConfigError(
                    f"model.{name} = {getattr(self, name)!r} is not supported in the v2 architecture; "
                    f"expected {only!r}, or leave it out"
                )
        width = self.n_heads * self.d_head
        for what, size in (("model.n_heads * model.d_head", width), ("model.d_ff", self.d_ff)):
            if size % self.n_shards:
                raise ConfigError(
                    f"model.n_shards = {self.n_shards} (the original's cores_per_replica) must divide {what} = {size}; "
                    f"{_nearest_divisor(math.gcd(width, self.d_ff), self.n_shards)} would"
                )

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of every logical axis that a parameter can have; heads are those that attention has in effect."""
        n_heads, n_kv_heads, head_dim = self.n_heads, self.n_kv_heads, self.d_head
        if self.architecture == "v2":
            # The original's reshape merges the heads of a shard into one (docs/formats.md, section 8.3).
            n_heads = n_kv_heads = self.n_shards
            head_dim = self.n_heads * self.d_head // self.n_shards
        return {
            "layers": self.n_layers,
            "vocab": self.n_vocab,
            "ctx": self.n_ctx,
            "embed": self.d_model,
            "heads": n_heads,
            "kv_heads": n_kv_heads,
            "head_dim": head_dim,
            "mlp": self.d_ff,
            "buckets": N_BUCKETS,
        }

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, defaults filled in; `model_config_from_dict` reads it back."""
        return dataclasses.asdict(self)


CHOICES: dict[str, tuple[Any, ...]] = {
    "norm": get_args(Norm),
    "position": get_args(Position),
    "architecture": get_args(Architecture),
    "residual": ("parallel",),
    "rotary_layout": ("interleaved",),
    "feed_forward": get_args(FeedForward),
    "tied_head": (False,),
}


def _nearest_divisor(n: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return min([*small, *(n // d for d in small)], key=lambda d: abs(d - wanted))


def differing_fields(a: ModelConfig, b: ModelConfig, ignore: tuple[str, ...] = ()) -> Mapping[str, tuple[Any, Any]]:
    """Fields in which two architectures differ: name -> (a's value, b's value)."""
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.name not in ignore}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
