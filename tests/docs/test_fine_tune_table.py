"""The tables of memory in docs/fine-tune-gpt-j.md are what `plan` says today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_they_are_what_plan_says() -> None:
    spec = importlib.util.spec_from_file_location("fine_tune_table", ROOT / "scripts" / "fine_tune_table.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    marked = list(script.MARKED.finditer(page))
    assert {one[2] for one in marked} == {*script.CASES}
    for one in marked:
        assert one[0] == one[1] + script.table(page, one[2]) + one[3], "python scripts/fine_tune_table.py"
