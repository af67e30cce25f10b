"""What may be done to a document's text before it is tokenized: ftfy, and undoing WikiText's tokenization."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable

from mesh_transformer.config.errors import UserError

_SEPARATORS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
_MARKS = ":;.!?,"
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_HEADINGS = (("= = = =", "===="), ("= = =", "==="), ("= =", "=="))
_DEGREE = "\N{DEGREE SIGN}"


def check_ftfy() -> None:
    """Raises UserError, with the way to mend it, where the package ftfy is not installed."""
    if importlib.util.find_spec("ftfy") is None:
        raise UserError("text is mended by the package ftfy, which is not installed: pip install ftfy")


def fix_text(text: str) -> str:
    """ftfy's `fix_text` with NFKC: mistaken encodings, entities, ligatures and widths are mended."""
    return _ftfy()(text)


@functools.cache
def _ftfy() -> Callable[[str], str]:
    check_ftfy()
    import ftfy

    return functools.partial(ftfy.fix_text, normalization="NFKC")


def wikitext_detokenize(text: str) -> str:
    """Text as it was before WikiText's tokenization, as far as the original's ten rules go (docs/formats.md, 10)."""
    text = text.replace("s '", "s'")
    # Never meant so, but it is what the original does: slashes and brackets are text here.
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text)
    for spaced, mark in _SEPARATORS:
        text = text.replace(spaced, mark)
    for mark in _MARKS:
        text = text.replace(f" {mark} ", f"{mark} ")
    for opening, closing in _PAIRS:
        text = _tighten(text, opening, closing)
    for spaced, heading in _HEADINGS:
        text = text.replace(spaced, heading)
    text = text.replace(f" {_DEGREE} ", _DEGREE)
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")


def _tighten(text: str, opening: str, closing: str) -> str:
    """Without the white space just inside each pair: from an opening to the nearest closing, which ends the pair.

    The same as the regular expression of the rule, but in linear time where nothing closes.
    """
    pieces: list[str] = []
    position = 0
    while (begin := text.find(opening, position)) >= 0 and (end := text.find(closing, begin + 1)) >= 0:
        pieces += [text[position : begin + 1], text[begin + 1 : end].strip(), closing]
        position = end + 1
    pieces.append(text[position:])
    return "".join(pieces)
