"""How rotary angles are stretched beyond the context that a model was first trained on."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from mesh_transformer.config.errors import ConfigError

RopeKind = Literal["linear", "dynamic", "llama3", "yarn"]
# The numbers that each law reads, beside `factor` and the context trained on at first.
READ_BY: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """One law and its numbers; the formulas are in `model.rope`.

    Attributes:
        kind: "linear" (Chen et al. 2023, arXiv 2306.15595), "dynamic" (NTK-aware, for the length n_ctx), "llama3"
            (Llama 3.1's) or "yarn" (Peng et al. 2023, arXiv 2309.00071).
        factor: how many times longer texts become.
        original_ctx: the context trained on at first, in tokens; 0 where the law has no use for it (linear).
        low_freq_factor, high_freq_factor: of llama3: wavelengths longer than original_ctx / low are divided by
            `factor`, those shorter than original_ctx / high are left alone.
        beta_fast, beta_slow: of yarn: turns within original_ctx above which a channel is left alone, and below which
            it is divided by `factor`.
        attention_factor: of yarn: what sines and cosines are multiplied with; 0 for 0.1 ln(factor) + 1.
        truncate: of yarn: whether the bounds between channels are rounded outwards to whole ones.

    Raises:
        ConfigError: a value is impossible; the message names it.
    """

    kind: RopeKind
    factor: float
    original_ctx: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise ConfigError(
                f"model.rope_scaling.kind = {self.kind!r} is not supported; expected one of: "
                f"{', '.join(get_args(RopeKind))}"
            )
        for field in dataclasses.fields(self):
            idle = field.name not in ("kind", "factor", "original_ctx", *READ_BY[self.kind])
            if idle and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"model.rope_scaling.{field.name} = {getattr(self, field.name)} is not read by kind "
                    f"{self.kind!r}; leave it out"
                )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"model.rope_scaling.{name} = {value} must be positive and finite")
        if not 0 <= self.attention_factor < math.inf:
            raise ConfigError(
                f"model.rope_scaling.attention_factor = {self.attention_factor} must be finite and not negative; "
                "0 takes that of the law"
            )
        if self.original_ctx < (self.kind != "linear"):
            raise ConfigError(
                f"model.rope_scaling.original_ctx = {self.original_ctx} must be the context in tokens that the model "
                f"was first trained on, for kind {self.kind!r}"
            )
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"model.rope_scaling.low_freq_factor = {self.low_freq_factor} must be below high_freq_factor = "
                f"{self.high_freq_factor}"
            )
