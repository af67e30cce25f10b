"""How Sphinx builds these pages and the reference of the Python code: `make docs` writes build/docs/index.html.

Every warning is an error there: a link or an anchor that leads nowhere, a page that no table of contents names, a
docstring that cannot be read. Outside links are not fetched.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

project = "mesh-transformer"
copyright = "the authors of mesh-transformer; Apache-2.0"
release = importlib.metadata.version(project)
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["images"]
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_sphinx = False

# Headings down to the fourth level can be linked to, under the names that GitHub gives them.
myst_heading_anchors = 4

default_role = "literal"  # docstrings write `name` for code
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

_SECTION = re.compile(r"^(Args|Arguments|Attributes|Example|Examples|Raises|Returns|Yields|Note|Notes|Warns):$")
_MARKUP = re.compile(r"(?<!\\)(\*|\||(?<=\w)_(?!\w))")


def _plain(app: Any, what: str, name: str, subject: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code`: whatever else reStructuredText reads as markup is escaped.

    What is indented below a line that ends with a colon, and no section's name, is shown as it stands.
    """
    literal = False
    for i, line in enumerate(lines):
        if line and not line.startswith(" "):
            literal = False
        if _SECTION.match(line) or literal:
            continue
        parts = re.split(r"(`[^`]*`)", line)
        lines[i] = "".join(part if part.startswith("`") else _MARKUP.sub(r"\\\1", part) for part in parts)
        following = [*lines[i + 1 : i + 3], "", ""]
        if line.endswith(":") and not line.startswith(" ") and not following[0] and following[1].startswith("    "):
            lines[i] += ":"
            literal = True


def _complete_pages(app: Any, docname: str, source: list[str]) -> None:
    """The changelog lies at the root of the repository, where people look for it."""
    if docname == "changelog":
        source[0] = (Path(app.srcdir).parent / "CHANGELOG.md").read_text(encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    # Before napoleon, which connects with the usual priority of 500 and makes markup of the sections.
    app.connect("autodoc-process-docstring", _plain, priority=400)
    app.connect("source-read", _complete_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
