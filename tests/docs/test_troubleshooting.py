"""docs/troubleshooting.md: what it quotes of our messages is what they say."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from document_blocks import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def quoted() -> list[str]:
    """What stands as code in the first column of the tables of messages."""
    tables = re.findall(r"^\| message \|.*\n\|[ -|]*\n((?:\|.*\n)+)", PAGE, re.M)
    cells = [row.strip("|").split(" | ")[0] for table in tables for row in table.splitlines()]
    return [span for cell in cells for span in re.findall(r"`([^`]+)`", cell) if "://" not in span]


def text_of(node: ast.expr) -> str:
    """A string's text, with an ellipsis for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return "…"


@cache
def said() -> str:
    """Every string of the package."""
    texts = []
    for path in sorted((ROOT / "src" / "mesh_transformer").rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts += [text_of(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)]
    return "\n\n".join(texts)


def test_there_are_messages() -> None:
    assert len(quoted()) > 20


@pytest.mark.parametrize("message", quoted())
def test_a_message_is_one_of_ours(message: str) -> None:
    words = re.escape(message).replace("…", "[^\n]*?")
    assert re.search(words, said()), message
