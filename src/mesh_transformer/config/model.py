"""Facts about an architecture: no mesh, no dtype policy, no optimizer, no tokenizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.rope import RopeScaling

Norm = Literal[
    "layernorm",
    "layernorm-desync",
    "layernorm-nobias",
    "rmsnorm",
    "rmsnorm-bias",
    "scalenorm",
    "scalenorm-bias",
    "rms",
]
Position = Literal["rotary", "fixed", "t5"]
Architecture = Literal["v1", "v2"]
FeedForward = Literal["gelu_tanh", "glu_gelu_tanh", "gelu", "glu_silu"]
Residual = Literal["parallel", "parallel-two-norms", "serial"]
RotaryLayout = Literal["interleaved", "half"]
WindowedLayers = Literal["all", "odd"]
Bias = Literal["embed", "qkv", "out", "mlp", "head"]

# Where GPT-J has biases.
GPTJ_BIASES: tuple[Bias, ...] = ("embed", "mlp", "head")

# Number of distance buckets in a T5 relative position table.
N_BUCKETS = 32

# The feed-forward of each of the original's two architectures.
_FEED_FORWARD = {"v1": "gelu_tanh", "v2": "glu_gelu_tanh"}
# Default of a field that is worked out from its neighbours.
_FROM_OTHERS: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and arithmetic of one decoder.

    `d_head`, `d_ff`, `d_rotary` and `n_kv_heads` may be left at 0: they become `d_model / n_heads`, `4 d_model`,
    `d_head` and `n_heads`. `feed_forward` follows `architecture` where it is left out. Fields from `residual` on are
    those in which other families differ from GPT-J; the parameter table and `block` read them.

    Attributes:
        norm: "rms" is the mean-square form of Llama; the others are the original's.
        position: "fixed" is a learned table of n_ctx positions.
        residual: "parallel" adds attention and feed-forward of one norm to the stream, "parallel-two-norms" (GPT-NeoX)
            gives each a norm of its own, and in "serial" (GPT-2, Llama) the feed-forward reads what attention gave.
        n_kv_heads: heads of keys and values, each shared by n_heads / n_kv_heads query heads that follow one another.
        rotary_layout: which channels turn together: 2j and 2j + 1, or j and j + d_rotary / 2 ("half").
        feed_forward: "glu_..." multiplies a linear half by the activation of a gate; "gelu" is the exact form.
        tied_head: the head is the token table.
        rope_theta: base of the rotary angles. rope_scaling: how they are stretched.
        window: newest positions that a query sees, its own included; 0: all. windowed_layers: "odd" leaves it to
            layers 1, 3, 5, ... (GPT-Neo).
        scale_scores: whether scores are divided by sqrt(d_head).
        qk_norm: whether every query and key head has an RMS norm before it is turned (Qwen 3).
        biases: which parts have one: the embedding, q with k and v, the attention output, the feed-forward, the head.

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
    residual: Residual = "parallel"
    n_kv_heads: int = 0
    rotary_layout: RotaryLayout = "interleaved"
    feed_forward: FeedForward = _FROM_OTHERS  # act(in), or linear * act(gate) ("glu")
    tied_head: bool = False

    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    window: int = 0
    windowed_layers: WindowedLayers = "all"
    scale_scores: bool = True
    qk_norm: bool = False
    biases: tuple[Bias, ...] = GPTJ_BIASES

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "n_vocab", "n_ctx"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} = {getattr(self, name)} must be at least 1")
        for name in ("d_head", "d_ff", "d_rotary", "n_kv_heads", "n_shards", "window"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name} = {getattr(self, name)} must not be negative")
        if isinstance(self.rope_scaling, Mapping):  # as JSON and TOML hold it
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        object.__setattr__(self, "biases", tuple(name for name in get_args(Bias) if name in self._known_biases()))
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
        self._check_attention()
        if not 0 < self.norm_eps < math.inf:
            raise ConfigError(f"model.norm_eps = {self.norm_eps} must be positive and finite; 1e-5 is usual")

    def _known_biases(self) -> tuple[str, ...]:
        unknown = [name for name in self.biases if name not in get_args(Bias)]
        if unknown:
            raise ConfigError(
                f"model.biases: {unknown[0]!r} is not known; expected some of: {', '.join(get_args(Bias))}"
            )
        return self.biases

    def _check_attention(self) -> None:
        """Heads, positions and windows that fit one another."""
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"model.n_kv_heads = {self.n_kv_heads} must divide model.n_heads = {self.n_heads}; "
                f"{_nearest_divisor(self.n_heads, self.n_kv_heads)} would"
            )
        if self.position == "t5" and self.n_kv_heads != self.n_heads:
            raise ConfigError(
                f"model.n_kv_heads = {self.n_kv_heads} differs from model.n_heads = {self.n_heads}, and T5 positions "
                "know no shared heads; leave n_kv_heads out"
            )
        if self.windowed_layers == "odd" and not self.window:
            raise ConfigError(
                "model.windowed_layers = 'odd' needs model.window, the positions that those layers see; 256 is usual"
            )
        if not 1 < self.rope_theta < math.inf:
            raise ConfigError(f"model.rope_theta = {self.rope_theta} must be finite and above 1; 10000 is usual")
        for name, idle in (("rope_scaling", None), ("rope_theta", 10000.0), ("rotary_layout", "interleaved")):
            if self.position != "rotary" and getattr(self, name) != idle:
                raise ConfigError(
                    f"model.{name} = {getattr(self, name)!r} belongs to rotary positions, and model.position is "
                    f"{self.position!r}; leave it out"
                )
        if self.rope_scaling is not None and self.rope_scaling.kind in ("dynamic", "yarn") and self.d_rotary < 4:
            raise ConfigError(
                f"model.rope_scaling of kind {self.rope_scaling.kind!r} needs model.d_rotary of at least 4, and it is "
                f"{self.d_rotary}"
            )

    def _check_architecture(self) -> None:
        """What each of the original's two architectures fixes."""
        if (self.architecture == "v2") != (self.feed_forward == _FEED_FORWARD["v2"]):
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
        if self.n_kv_heads != self.n_heads:
            raise ConfigError(
                f"model.n_kv_heads = {self.n_kv_heads} differs from model.n_heads = {self.n_heads}, and the v2 "
                "architecture has no shared heads; leave n_kv_heads out"
            )
        for name, only in (("norm", "layernorm"), ("position", "rotary"), *_GPTJ.items()):
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

    @property
    def score_divisor(self) -> float:
        """What scores are divided by; in v2 the root is that of the configured width, not of its heads'."""
        return math.sqrt(self.d_head) if self.scale_scores else 1.0

    @property
    def alternates(self) -> bool:
        """Whether layers differ in what they see."""
        return self.windowed_layers == "odd" and self.window < self.n_ctx

    @property
    def reach(self) -> int:
        """Newest positions that a query sees at most, in any layer."""
        return min(self.window, self.n_ctx) if self.window and self.windowed_layers == "all" else self.n_ctx

    def to_dict(self) -> dict[str, Any]:
        """Fields by name; `model_config_from_dict` reads it back.

        Defaults are filled in, but fields that came after GPT-J's stand there only where they differ from it, so that
        a GPT-J is described as it always was.
        """
        whole = dataclasses.asdict(self)
        return {
            name: value for name, value in whole.items() if name not in _LATER or getattr(self, name) != _GPTJ[name]
        }

    def departures(self) -> dict[str, Any]:
        """The fields, beside sizes, norm and position, in which this differs from what the original could build."""
        found = {name: getattr(self, name) for name, only in _GPTJ.items() if getattr(self, name) != only}
        found |= {"norm": self.norm} if self.norm == "rms" else {}
        found |= {"n_kv_heads": self.n_kv_heads} if self.n_kv_heads != self.n_heads else {}
        if self.feed_forward != _FEED_FORWARD[self.architecture]:
            found["feed_forward"] = self.feed_forward
        return found


# Fields that came with other families.
_LATER = ("rope_theta", "rope_scaling", "window", "windowed_layers", "scale_scores", "qk_norm", "biases")
# What GPT-J has of the fields that tell families apart.
_GPTJ: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name in ("residual", "rotary_layout", "tied_head", *_LATER)
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "norm": get_args(Norm),
    "position": get_args(Position),
    "architecture": get_args(Architecture),
    "residual": get_args(Residual),
    "rotary_layout": get_args(RotaryLayout),
    "feed_forward": get_args(FeedForward),
    "windowed_layers": get_args(WindowedLayers),
}


def _nearest_divisor(n: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return min([*small, *(n // d for d in small)], key=lambda d: abs(d - wanted))


def differing_fields(a: ModelConfig, b: ModelConfig, ignore: tuple[str, ...] = ()) -> Mapping[str, tuple[Any, Any]]:
    """Fields in which two architectures differ: name -> (a's value, b's value)."""
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.name not in ignore}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
