"""The table of memory in docs/fine-tune-gpt-j.md is what `plan` says today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_it_is_what_plan_says() -> None:
    spec = importlib.util.spec_from_file_location("fine_tune_table", ROOT / "scripts" / "fine_tune_table.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    marked = script.MARKED.search(page)
    assert marked
    assert marked[0] == marked[1] + script.table(page) + marked[2], "python scripts/fine_tune_table.py"
