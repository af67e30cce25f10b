"""What the engine is asked, and what it answers step by step."""

from __future__ import annotations

import dataclasses

from mesh_transformer.sample.options import SamplingOptions

# Alternatives that may be reported beside a token.
MOST_ALTERNATIVES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One completion of one prompt.

    prompt: token ids; empty starts from end-of-text. logprobs: how many of the likeliest alternatives are reported
    beside every token, None for no log-probabilities at all. prompt_logprobs: those of the prompt's tokens too.
    """

    prompt: tuple[int, ...]
    options: SamplingOptions
    logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability in nats under the model itself (before temperature, biases and filters), and the
    likeliest tokens there with theirs, the likeliest first. A text's first token has None: nothing stands before it.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What one step adds to a request.

    Attributes:
        tokens: newly sampled ids; an end-of-text that ends the completion is not among them.
        text: text that has become certain; what may still turn out to be a stop string is held back, so that text
            may come later than its tokens.
        logprobs: those of `tokens`, if they were asked for, and that of an end-of-text that ends the completion.
        prompt_logprobs: of every token of the prompt, in the first output alone, if they were asked for.
        n_cached: tokens of the prompt that were taken over from an earlier request with the same prefix.
        finish_reason: "stop" (end-of-text or a stop string) or "length", on the last output.
        error: on the last output, if the request failed.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    n_cached: int = 0
    finish_reason: str | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self.finish_reason is not None or self.error is not None
