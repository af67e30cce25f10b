"""How single tokens are written in answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mesh_transformer.engine.request import TokenLogprob

if TYPE_CHECKING:
    from mesh_transformer.data.tokenizer import Tokenizer

# JSON has no infinities; e^-9999 is 0 in every precision.
_LOWEST = -9999.0


class TokenTexts:
    """The text of single tokens as OpenAI writes it: bytes that are no whole characters as "bytes:\\xe2\\x80".

    A token without a text (of a padded vocabulary, or of a model without a tokenizer) is "token_id:50300".
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The text of one token."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._written(token)
        return found

    def _written(self, token: int) -> str:
        data = self._tokenizer.token_bytes(token) if self._tokenizer else b""
        if not data:
            return f"token_id:{token}"
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes_of(self, token: int) -> list[int] | None:
        """The bytes of one token; None where it has no text."""
        data = self._tokenizer.token_bytes(token) if self._tokenizer else b""
        return list(data) or None

    def alternatives(self, entry: TokenLogprob) -> dict[str, float] | None:
        """The likeliest tokens and the token itself, the likeliest first; None where nothing stands before it."""
        if entry.logprob is None:
            return None
        pairs: Iterable[tuple[int, float]] = entry.top
        if all(token != entry.token for token, _ in entry.top):
            pairs = [*entry.top, (entry.token, entry.logprob)]
        found: dict[str, float] = {}
        for token, logprob in pairs:
            # Two tokens may have the same text.
            key = self.text(token)
            found[key if key not in found else f"token_id:{token}"] = bounded(logprob)
        return found


def bounded(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return max(logprob, _LOWEST)
