"""ftfy, and the ten rules of the WikiText detokenizer."""

from __future__ import annotations

import importlib.util
import random
import time

import pytest
from prepare_oracle import detokenized

from mesh_transformer.config.errors import UserError
from mesh_transformer.data.normalize import check_ftfy, fix_text, wikitext_detokenize


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("dogs ' tails", "dogs' tails"),  # 1
        ("in /' 9/ here", "in /'[0-9]/ here"),  # 2: literal slashes, and a replacement that is literal too
        ("well @-@ known 1 @,@ 000 @.@ 5", "well-known 1,000.5"),  # 3
        ("a : b ; c . d ! e ? f , g", "a: b; c. d! e? f, g"),  # 4
        ("end .", "end ."),  # 4 needs both spaces
        ('( a b ) [ c ] { d } " e " f', '(a b) [c] {d} "e" f'),  # 5
        ("( ( a ) )", "(( a) )"),  # 5: the nearest closing, no nesting
        ("( never closed", "( never closed"),
        ("= = = = x = = = y = = z", "==== x === y == z"),  # 6
        ("= = = = =", "====="),  # 6, twice
        ("5 \u00b0 C", "5\u00b0C"),  # 7
        ("a \n b", "a\nb"),  # 8
        ("a N b", "a 1 b"),  # 9
        ("it 's", "it's"),  # 10
    ],
)
def test_the_rules(before: str, after: str) -> None:
    assert wikitext_detokenize(before) == after == detokenized(before)


def test_any_text_as_by_regular_expressions() -> None:
    generator = random.Random(0)
    letters = ["s", "'", " ", " ", "/", "3", "@-@", "@,@", ":", ".", ",", "(", ")", "[", "]", "{", "}", '"', "=", "N",
               "\u00b0", "\n", "\t", "\u00a0", "\u2003", "\x1c", "x"]  # fmt: skip
    for _ in range(3000):
        text = "".join(generator.choices(letters, k=generator.randrange(40)))
        assert wikitext_detokenize(text) == detokenized(text), repr(text)


def test_what_never_closes_takes_no_longer() -> None:
    # With the regular expressions of the table this is hours.
    begun = time.process_time()
    assert wikitext_detokenize("( " * 500_000) == ("( " * 500_000)
    assert time.process_time() - begun < 30


def test_ftfy() -> None:
    assert fix_text("schÃ¶n &amp; ﬁne") == "schön & fine"


def test_ftfy_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install ftfy"):
        check_ftfy()
