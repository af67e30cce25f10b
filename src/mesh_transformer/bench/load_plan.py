"""What the clients of `bench load` ask: requests of mixed lengths, each a function of the seed and its number."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from mesh_transformer.config.errors import UserError


@dataclasses.dataclass(frozen=True)
class Span:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def of(cls, text: str, option: str) -> Span:
        """Of "LOW-HIGH" or "N".

        Raises:
            UserError: it is neither, or not 1 <= LOW <= HIGH; `option` is named.
        """
        low, dash, high = text.partition("-")
        high = high if dash else low
        if not (low.isdecimal() and high.isdecimal()) or not 1 <= int(low) <= int(high):
            raise UserError(f"{option} {text!r} cannot be used; expected LOW-HIGH with 1 <= LOW <= HIGH, such as 4-64")
        return cls(int(low), int(high))

    def draw(self, generator: np.random.Generator) -> int:
        """A number whose logarithm is uniform: many short, few long."""
        drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high + 1)))
        return min(self.high, max(self.low, int(drawn)))


@dataclasses.dataclass(frozen=True)
class Planned:
    """One request. vanish_after: the client goes away after so many pieces of the stream; None: it stays."""

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    vanish_after: int | None

    def body(self, stream: bool) -> dict[str, Any]:
        """The JSON of POST /v1/completions: token ids and `ignore_eos`, so that both lengths are exact."""
        body: dict[str, Any] = {
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0.8,
            "top_p": 0.95,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": stream,
        }
        return body | ({"stream_options": {"include_usage": True}} if stream else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All requests of a run.

    Attributes:
        n_ids: prompts hold ids below it.
        vanish: the share of requests whose client goes away in mid-stream.
        salt: plans that differ in it alone have the same lengths and seeds but other prompts, so that what a server
            remembers of the one's prompts does not help the other.
    """

    seed: int
    n_ids: int
    prompt_tokens: Span
    output_tokens: Span
    vanish: float = 0.0
    salt: int = 0

    def request(self, number: int) -> Planned:
        """The request of that number; the prompts share no beginnings but by chance."""
        lengths = np.random.default_rng((self.seed, number))
        n_prompt, n_output = self.prompt_tokens.draw(lengths), self.output_tokens.draw(lengths)
        seed = int(lengths.integers(2**32))
        vanishes = lengths.uniform() < self.vanish
        vanish_after = int(lengths.integers(1, max(2, n_output // 2 + 1))) if vanishes else None
        ids = np.random.default_rng((self.seed, number, self.salt, 1)).integers(0, self.n_ids, n_prompt)
        return Planned(number, tuple(ids.tolist()), n_output, seed, vanish_after)
