"""How well a model predicts a text: nats a token, bits a byte, perplexity a word."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from mesh_transformer.config.errors import UserError
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.engine.packing import Pair
from mesh_transformer.engine.scoring import Progress, Scorer
from mesh_transformer.evaluate.encoding import start_of_text
from mesh_transformer.shapes import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextReport:
    """log_likelihood: of the whole text, in nats. The counts: tokens, UTF-8 bytes, words between white space."""

    log_likelihood: float
    tokens: int
    bytes: int
    words: int

    @property
    def nats_per_token(self) -> float:
        """The mean loss."""
        return -self.log_likelihood / self.tokens

    @property
    def token_perplexity(self) -> float:
        """exp of it."""
        return _exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """What an ideal coder would need with this model."""
        return -self.log_likelihood / (self.bytes * math.log(2))

    @property
    def byte_perplexity(self) -> float:
        """2 to the power of it."""
        return _exp(-self.log_likelihood / self.bytes)

    @property
    def word_perplexity(self) -> float:
        """Of a word, whatever tokens it is made of."""
        return _exp(-self.log_likelihood / self.words)

    def to_dict(self) -> dict[str, float]:
        """All of it by name."""
        names = ("nats_per_token", "token_perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}


def evaluate_text(
    scorer: Scorer,
    params: Params,
    tokenizer: Tokenizer,
    text: str,
    progress: Progress = lambda stage, done, total: None,
) -> TextReport:
    """Scores every token of `text` once, in windows as `rolling_windows` cuts them, after what begins a text.

    Raises:
        UserError: the text has no words, or the tokenizer no end-of-text.
    """
    words = len(re.split(r"\s+", text)) if text.strip() else 0  # as lm-eval's tasks count them
    if not words:
        raise UserError("the text holds nothing but white space; expected text to score")
    ids = tokenizer.encode(text, allow_special=True)
    windows = list(rolling_windows(ids, start_of_text(tokenizer), scorer.cfg.n_ctx))
    found = scorer.score(params, windows, progress=progress)
    return TextReport(
        log_likelihood=sum(each for each, _ in found), tokens=len(ids), bytes=len(text.encode()), words=words
    )


def rolling_windows(ids: Sequence[int], prefix: int, n_ctx: int) -> Iterator[Pair]:
    """A text as windows in which every token is scored once, the first after `prefix`.

    A window scores `n_ctx` tokens, each after those of its own window and the one before; the last window scores what
    is left, after as many tokens as the context holds (lm-eval's `get_rolling_token_windows` with context_len 1).
    """
    for start in range(0, len(ids), n_ctx):
        end = min(start + n_ctx, len(ids))
        if start == 0:
            yield Pair([prefix], ids[:end])
        else:
            yield Pair(ids[end - n_ctx - 1 : start], ids[start:end])


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf  # beyond, it is no float
