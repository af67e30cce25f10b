"""One completion under way: its text, where it stands in the cache, and what it still has to say."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.engine.pages import EMPTY_PREFIX
from mesh_transformer.engine.request import Output, Request, TokenLogprob
from mesh_transformer.sample.text import TextStream


class Sequence:
    """A request and everything that has become of it.

    Attributes:
        tokens: the prompt and what was written after it.
        start: index in `tokens` of the cache's position 0; more than 0 once a text with absolute positions has
            begun again with its newest part.
        n_read: tokens from `start` on that the cache holds.
        slot, group: where its options and its pages are; no slot while it waits.
        reading: whether some of it must be read before a token can be written.
        pages: its page in every place of the ring, 0 where there is none.
        prefix: what its pages up to `n_read` hold, as `PagePool` names it.
        n_pages: the most pages that it can come to hold.
    """

    def __init__(self, request: Request, prompt: list[int], tokenizer: Tokenizer | None, width: int) -> None:
        self.request, self.options = request, request.options
        self.tokens = list(prompt)
        self.n_prompt = len(prompt)
        self.start = self.n_read = self.n_cached = self.n_pages = 0
        self.slot: int | None = None
        self.group = 0
        self.pages = np.zeros(width, np.int32)
        self.prefix = EMPTY_PREFIX
        self.reading = True
        self.done = False
        self.prompt_logprobs: list[TokenLogprob] = []
        self._stream = TextStream(tokenizer, request.options.stop)
        self._said_prompt = False

    @property
    def n_new(self) -> int:
        """Tokens written."""
        return len(self.tokens) - self.n_prompt

    @property
    def to_read(self) -> list[int]:
        """Tokens that the cache does not hold yet."""
        return self.tokens[self.start + self.n_read :]

    @property
    def shareable(self) -> bool:
        """Whether its pages may come from, or go to, other texts.

        Where the prompt's likelihoods are wanted, all of it is read again. Text that begins again half-way is rare.
        """
        return not self.request.prompt_logprobs and self.start == 0

    def begin_again(self, n: int) -> None:
        """Forgets the cache; the newest `n` tokens are to be read from position 0."""
        self.start, self.n_read, self.prefix, self.reading = len(self.tokens) - n, 0, EMPTY_PREFIX, True

    def take(self, token: int, ends: Collection[int], logprob: TokenLogprob | None, longest: int) -> Output:
        """Adds a token and says what follows from it; one of `ends`, and a text of `longest` tokens, ends."""
        logprobs = (logprob,) if logprob else ()
        if token in ends and not self.options.ignore_eos:
            return self._finished(self._output(logprobs=logprobs), "stop")
        self.tokens.append(token)
        text = self._stream.push(token)
        said = self._output(tokens=(token,), text=text, logprobs=logprobs)
        if self._stream.stopped:
            return self._finished(said, "stop")
        if self.n_new >= self.options.max_tokens or len(self.tokens) >= longest:
            return self._finished(said, "length")
        return said

    def finish(self, reason: str) -> Output:
        """Ends without another token."""
        return self._finished(self._output(), reason)

    def fail(self, error: Exception) -> Output:
        """Ends with an error."""
        self.done = True
        return Output(error=error)

    def _finished(self, said: Output, reason: str) -> Output:
        self.done = True
        return dataclasses.replace(said, text=said.text + self._stream.flush(), finish_reason=reason)

    def _output(self, **what: object) -> Output:
        """The first output says what was found out about the prompt."""
        of_prompt = None
        if self.request.prompt_logprobs and not self._said_prompt:
            of_prompt = tuple(self.prompt_logprobs)
        self._said_prompt = True
        return Output(n_cached=self.n_cached, prompt_logprobs=of_prompt, **what)  # type: ignore[arg-type]
