"""From the engine's outputs to the text and log-probabilities of a choice, piece by piece."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mesh_transformer.data.tokenizer import IncrementalDecoder
from mesh_transformer.engine.request import Output, TokenLogprob
from mesh_transformer.serve.tokens import TokenTexts, bounded

if TYPE_CHECKING:
    from mesh_transformer.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one output adds to a choice. entries: tokens and where each begins in the choice's text; the last `n_ended`
    of them ended it and have no text.
    """

    text: str
    entries: tuple[tuple[TokenLogprob, int], ...] = ()
    finish_reason: str | None = None
    n_ended: int = 0

    @property
    def empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.text and not self.entries and self.finish_reason is None


class ChoiceText:
    """Follows one completion.

    Text may come later than its tokens (what might become a stop string is held back), and tokens are told together
    with their text: a token is told once the text reaches past the place where it begins. So the tokens of a stop
    string, whose text is cut off, are never told, and the answer is the same streamed and whole.

    Args:
        echo: the prompt's text, where the answer begins with it.
        echoed: whether log-probabilities of the prompt's tokens are told as well.
        n_before: of the prompt's tokens, those that the tokenizer put before its text.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, *, echo: str | None = None, echoed: bool = False, n_before: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer else None
        self._echo, self._echoed, self._n_before = echo, echoed, n_before
        self._begun = False
        self._length = 0  # of the text told
        self._decoded = len(echo or "")  # of the text that the tokens received so far stand for
        self._waiting: deque[tuple[TokenLogprob, int]] = deque()
        self.n_tokens = 0
        self.n_cached = 0

    def add(self, output: Output) -> Piece:
        """The piece that an output makes."""
        self.n_tokens += len(output.tokens)
        self.n_cached = max(self.n_cached, output.n_cached)
        told: list[tuple[TokenLogprob, int]] = []
        text = output.text
        if not self._begun:
            self._begun = True
            text = (self._echo or "") + text
            if self._echoed and output.prompt_logprobs:
                told += self._of_prompt(output.prompt_logprobs)
        self._length += len(text)
        for entry in output.logprobs[: len(output.tokens)]:
            self._waiting.append((entry, self._decoded))
            if self._decoder is not None:
                self._decoded += len(self._decoder.push([entry.token]))
        # An end-of-text that ended the completion has a log-probability and no place in the text.
        ended = [(entry, self._length) for entry in output.logprobs[len(output.tokens) :]]
        if output.finish_reason is not None and self._decoder is not None:
            self._decoded += len(self._decoder.flush())
        told += self._due(everything=output.finish_reason is not None and self._decoded <= self._length)
        return Piece(text, (*told, *ended), output.finish_reason, len(ended))

    def _due(self, *, everything: bool) -> Iterable[tuple[TokenLogprob, int]]:
        while self._waiting:
            entry, begins = self._waiting[0]
            has_text = self._tokenizer is not None and bool(self._tokenizer.token_bytes(entry.token))
            if not everything and begins >= self._length and (has_text or begins > self._length):
                return
            yield self._waiting.popleft()

    def _of_prompt(self, entries: Iterable[TokenLogprob]) -> Iterable[tuple[TokenLogprob, int]]:
        decoder = IncrementalDecoder(self._tokenizer, begins=True) if self._tokenizer else None
        begins, end = 0, len(self._echo or "")
        for at, entry in enumerate(entries):
            yield entry, min(begins, end)
            if decoder is not None and at >= self._n_before:
                begins += len(decoder.push([entry.token]))


def logprobs_object(entries: Iterable[tuple[TokenLogprob, int]], texts: TokenTexts) -> dict[str, Any]:
    """OpenAI's object of log-probabilities."""
    several = list(entries)
    return {
        "tokens": [texts.text(entry.token) for entry, _ in several],
        "token_logprobs": [None if entry.logprob is None else bounded(entry.logprob) for entry, _ in several],
        "top_logprobs": [texts.alternatives(entry) for entry, _ in several],
        "text_offset": [begins for _, begins in several],
    }


def chat_logprobs_object(entries: Iterable[tuple[TokenLogprob, int]], texts: TokenTexts, n: int) -> dict[str, Any]:
    """OpenAI's object of log-probabilities in a chat, with the `n` likeliest tokens beside each."""

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        told = None if logprob is None else bounded(logprob)
        return {"token": texts.text(token), "logprob": told, "bytes": texts.bytes_of(token)}

    content = [
        {**one(entry.token, entry.logprob), "top_logprobs": [one(*pair) for pair in entry.top[:n]]}
        for entry, _ in entries
    ]
    return {"content": content, "refusal": None}


def usage_object(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's object of counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
