"""docs/coverage.md: every test that it names exists, every row has one or says that it has none."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from document_blocks import ROOT

PAGE = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| \d+ \|.*\|$", PAGE, re.M)]
TESTS = re.findall(r"`([\w/]+\.py)::(test_\w+)`", PAGE)


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("number", range(1, len(ROWS) + 1))
def test_a_row_is_shown_or_says_that_it_is_not(number: int) -> None:
    found, what, shown_by, remark = ROWS[number - 1]
    assert found == str(number) and what
    assert "::test_" in shown_by or "**not shown**" in remark, what


def test_every_row_of_the_page_is_read() -> None:
    assert len(ROWS) == len([line for line in PAGE.splitlines() if line.startswith("| ") and line[2].isdigit()]) == 78
    assert len(TESTS) == PAGE.count("::")


@pytest.mark.parametrize("path", sorted({path for path, _ in TESTS}))
def test_tests_that_are_named_exist(path: str) -> None:
    assert (ROOT / "tests" / path).is_file()
    named = {name for of, name in TESTS if of == path}
    assert named <= functions_of(path), f"{path} has no {', '.join(sorted(named - functions_of(path)))}"


def test_it_can_be_cited_and_used() -> None:
    """The licence is Apache's, in full, and the citation names the project and its version."""
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"$', project, re.M)
    assert version and re.search(rf'^version: "?{re.escape(version[1])}"?$', citation, re.M), citation
    assert "license: Apache-2.0" in citation and 'license = "Apache-2.0"' in project
