"""What single tokens of a tokenizer.json stand for: bytes that do not depend on the tokens around them.

Bytes that are no UTF-8 become one U+FFFD for each maximal part of a character, as Unicode recommends, whatever kind of
token they come from. The `tokenizers` library does so for byte-level vocabularies; of a run of tokens such as <0xE2>
that is not UTF-8 as a whole it makes one U+FFFD for each token, those of whole characters in the run included.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How tokens are written in the vocabulary.

    Attributes:
        byte_letters: every byte is a letter of the byte alphabet (byte-level BPE).
        space: what stands for a space (SentencePiece's U+2581), if anything does.
        named_bytes: whether <0x0A> is the byte 10.
        stripped: spaces taken off the beginning of a whole text, which its encoder had put there.
        drops_first: whether all spaces of a text's first token are.
    """

    byte_letters: bool = False
    space: str = ""
    named_bytes: bool = False
    stripped: int = 0
    drops_first: bool = False

    def bytes_of(self, token: str) -> bytes:
        """The UTF-8 bytes that a token stands for in the middle of a text."""
        if self.byte_letters:
            try:
                return bytes(byte_alphabet()[letter] for letter in token)
            except KeyError:  # an added token outside the byte alphabet stands for itself
                return token.encode()
        if self.named_bytes and (found := _BYTE.fullmatch(token)):
            return bytes([int(found[1], 16)])
        return (token.replace(self.space, " ") if self.space else token).encode()

    def beginning(self, data: bytes) -> bytes:
        """The bytes of a text's first token that is not empty, without what was put before the text."""
        spaces = len(data) - len(data.lstrip(b" "))
        if self.drops_first:
            return data.replace(b" ", b"")
        return data[min(spaces, self.stripped) :]


def pieces_of(decoder: Mapping[str, Any] | None) -> Pieces | None:
    """What a tokenizer.json's `decoder` says; None where a token's text depends on its neighbours."""
    steps: Sequence[Any] = [decoder] if decoder else []
    if decoder and decoder.get("type") == "Sequence":
        steps = decoder.get("decoders") or []
    pieces, fused = Pieces(), False
    if not steps:
        return None
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel":
            pieces = dataclasses.replace(pieces, byte_letters=True)
        elif kind == "Metaspace":
            kept = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") == "never"
            pieces = dataclasses.replace(pieces, space=step.get("replacement", "▁"), drops_first=not kept)
        elif kind == "Replace" and step.get("content") == " " and set(step.get("pattern") or {}) == {"String"}:
            pieces = dataclasses.replace(pieces, space=step["pattern"]["String"])
        elif kind == "ByteFallback":
            pieces = dataclasses.replace(pieces, named_bytes=True)
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step.get("content") == " " and not step.get("stop"):
            pieces = dataclasses.replace(pieces, stripped=int(step.get("start") or 0))
        else:
            return None
    return None if pieces.byte_letters and pieces.space else pieces


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Letter that byte-level BPE shows for a byte -> the byte: printable Latin-1 as itself, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
