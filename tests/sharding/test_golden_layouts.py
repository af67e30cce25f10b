"""No parameter or activation comes to lie elsewhere unnoticed."""

from __future__ import annotations

import golden_layouts


def test_layouts_are_those_that_were_reviewed() -> None:
    stored = golden_layouts.FILE.read_text(encoding="utf-8")
    mend = "if the change is meant, run tests/sharding/golden_layouts.py and read the difference"
    assert golden_layouts.layouts() == stored, mend
