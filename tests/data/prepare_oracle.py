"""The pipeline of docs/formats.md, section 10, told over again with plain lists and the global random generator.

It is slow and holds everything in memory, on purpose, and shares no code with what it checks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence


def detokenized(text: str) -> str:
    """The ten rules of the table, as regular expressions where the table says so."""
    text = re.sub(r"s '", "s'", text)
    text = re.sub(r"/' [0-9]/", lambda _: r"/'[0-9]/", text)
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in [":", ";", ".", "!", "?", ","]:
        text = text.replace(" " + mark + " ", mark + " ")
    text = re.sub(r"\(\s*([^)]*?)\s*\)", lambda m: "(" + m[1] + ")", text)
    text = re.sub(r"\[\s*([^\]]*?)\s*\]", lambda m: "[" + m[1] + "]", text)
    text = re.sub(r"\{\s*([^}]*?)\s*\}", lambda m: "{" + m[1] + "}", text)
    text = re.sub(r'"\s*([^"]*?)\s*"', lambda m: '"' + m[1] + '"', text)
    text = re.sub(r"'\s*([^']*?)\s*'", lambda m: "'" + m[1] + "'", text)
    text = text.replace("= = = =", "====").replace("= = =", "===").replace("= =", "==")
    text = text.replace(" \u00b0 ", "\u00b0")
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    text = text.replace(" N ", " 1 ")
    return text.replace(" 's", "'s")


def rows_of(
    documents: Sequence[str],
    encode: Callable[[str], list[int]],
    end: int,
    *,
    width: int,
    seed: int = 10,
    preserve: bool = False,
    min_unique: int = 0,
    epochs: int = 1,
    eot_text: bool = False,
    keep_tail: bool = False,
    change: Callable[[str], str] = lambda text: text,
) -> tuple[list[list[int]], int]:
    """(rows, trailing ids) of one input file; the filling of a tail is `~end`."""

    def cut(lists: list[list[int]]) -> tuple[list[list[int]], list[int]]:
        rows, pending = [], []
        for tokens in lists:
            pending = pending + tokens
            while len(pending) > width:
                rows.append(pending[:width])
                pending = pending[width:]
        if min_unique > 0:
            rows = [row for row in rows if len(set(row)) >= min_unique]
        if not preserve:
            random.shuffle(rows)
        return rows, pending

    def filled(pending: list[int]) -> list[list[int]]:
        return [pending + [~end] * (width - len(pending))] if keep_tail and len(pending) > 1 else []

    state = random.getstate()
    try:
        random.seed(seed)
        files = ["the only file"]
        if not preserve:
            random.shuffle(files)
        parts = []
        for document in documents:
            for part in [document] if eot_text else document.split("<|endoftext|>"):
                if part:
                    parts.append([*encode(change(part)), end])
        if not preserve:
            random.shuffle(parts)
        rows, trailing = cut(parts)
        everything = rows + (filled(trailing) if not preserve or epochs == 1 else [])
        for epoch in range(1, epochs):
            if preserve:
                rows, trailing = cut([trailing, *rows])
            else:
                random.shuffle(parts)
                rows, trailing = cut(parts)
            everything += rows + (filled(trailing) if not preserve or epoch == epochs - 1 else [])
    finally:
        random.setstate(state)
    return everything, 0 if filled(trailing) else len(trailing)
