"""What a caller may ask of a completion, and what it gets."""

from __future__ import annotations

import dataclasses
import math

from mesh_transformer.config.errors import UserError
from mesh_transformer.sample.methods import Sampler

# Tokens that one completion may bias.
MOST_BIASES = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of one completion; the defaults sample from the model's own distribution.

    Raises:
        UserError: a value is outside its range; the message names both.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    sample: int = 0  # which of several completions of one prompt; part of the random stream
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0  # subtracted from the logit of every token that the completion already holds
    frequency_penalty: float = 0.0  # subtracted from it once for each time that it does
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    sampler: Sampler = "default"

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "max_tokens": (0, math.inf),
            "temperature": (0, math.inf),
            "top_p": (0, 1),
            "top_k": (0, math.inf),
            "min_p": (0, 1),
            "seed": (0, 2**32 - 1),
            "sample": (0, 2**31 - 1),
            "min_tokens": (0, math.inf),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high or not math.isfinite(value):
                end = f"at most {high}" if math.isfinite(high) else "finite"
                raise UserError(f"{name} = {value} is out of range: at least {low} and {end}")
        if "" in self.stop:
            raise UserError("stop holds an empty string, which would stop every completion before it starts")
        for token, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise UserError(f"logit_bias of token {token} = {bias} is out of range: at least -100 and at most 100")
        if len(self.logit_bias) > MOST_BIASES:
            raise UserError(f"logit_bias has {len(self.logit_bias)} tokens; at most {MOST_BIASES} are taken")
        if self.sampler not in ("default", "legacy"):
            raise UserError(f"sampler = {self.sampler!r} is not known; expected 'default' or 'legacy'")
        if self.sampler == "legacy" and self.min_p > 0:
            raise UserError(f"min_p = {self.min_p} is not part of the legacy sampler; leave it out")

    @property
    def filters(self) -> bool:
        """Whether anything but temperature shapes the distribution."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def shapes(self) -> bool:
        """Whether logits are changed before they are sampled from: biases or penalties."""
        return bool(self.logit_bias) or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """Text without its prompt. finish_reason: "stop" (end-of-text or a stop string) or "length"."""

    text: str
    tokens: list[int]
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of row `row`'s completion; `completion` is set on the last one."""

    row: int
    text: str
    completion: Completion | None = None
