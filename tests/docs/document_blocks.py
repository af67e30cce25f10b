"""The code blocks of a document, and what the comments before them say of them.

A block is a fenced part of a Markdown page. Comments directly before it say how it is to be taken:

    <!-- file: NAME -->         the block is the contents of that file
    <!-- not run: REASON -->    it is not run; the reason is one of REASONS in test_executed_documents.py
    <!-- needs: A, B -->        before it is run, these are put where it runs (document_materials.py)
    <!-- smaller: A -> B; C -> D -->   it is run with B in the place of A, and D of C
    <!-- continues -->          a Python block goes on where the page's last one ended

Without a comment, a block is run if its language is `console` (lines that begin with "$ "; others are what is
printed), `sh` or `python`; `toml`, `json` and `yaml` are parsed; a block without a language is text.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("console", "sh", "python")
PARSED = ("toml", "json", "yaml")
SHOWN = ("", "text", "{toctree}", "{eval-rst}")
_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_COMMENTS = re.compile(r"(?:<!--((?:(?!-->).)*)-->\s*)+\Z", re.DOTALL)
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
DIRECTIVES = ("file", "not run", "needs", "smaller", "continues")


@dataclasses.dataclass(frozen=True)
class Block:
    """`text` without the fence, dedented; `line`: of the fence in the page, from 1; `says`: the comments before it."""

    page: str
    line: int
    language: str
    text: str
    says: dict[str, str]

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return self.says.get("not run")

    @property
    def is_run(self) -> bool:
        return self.language in RUN and "file" not in self.says and self.reason is None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def as_run(self) -> str:
        """The text with what stands in for something larger.

        Raises:
            AssertionError: the page no longer has what is to be replaced.
        """
        text = self.text
        for pair in filter(None, re.split(r";\s*", self.says.get("smaller", ""))):
            old, new = (part.strip() for part in pair.split("->"))
            assert old in text, f"{self.place}: nothing to make smaller: {old}"
            text = text.replace(old, new)
        return text


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page, in their order."""
    return blocks_in(page.read_text(encoding="utf-8"), page.name)


def blocks_in(text: str, name: str) -> list[Block]:
    """All blocks of the page `name`, whose text this is.

    Raises:
        AssertionError: two comments before a block say the same thing differently.
    """
    found = []
    for match in _FENCE.finditer(text):
        indent = match[1]
        code = "".join(line.removeprefix(indent) for line in match[3].splitlines(keepends=True))
        comments = _COMMENTS.search(text, 0, match.start())
        says: dict[str, str] = {}
        for comment in _COMMENT.findall(comments[0]) if comments else []:
            key, _, value = comment.partition(":")
            if key.strip() in DIRECTIVES:
                assert key.strip() not in says, f"{name}: {key.strip()} is said twice before one block"
                says[key.strip()] = " ".join(value.split())
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(name, line, match[2], code, says))
    return found


def commands_in(block: Block) -> list[str]:
    """The commands of a block: of `console` what follows "$ ", of `sh` all lines.

    A line that ends with a backslash goes on in the next one.
    """
    text = re.sub(r"\\\n(?:> )?\s*", " ", block.as_run())
    lines = text.splitlines()
    if block.language == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]
