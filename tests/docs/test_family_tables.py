"""Tables about families in the documents are what the code says, and nothing there claims a reproduced score."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType

import pytest
from document_blocks import ROOT

from mesh_transformer.checkpoint.families import FAMILIES
from mesh_transformer.checkpoint.huggingface.spellings import SPELLINGS
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.evaluate.zero_shot import PUBLISHED


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("family_tables", ROOT / "scripts" / "family_tables.py")
    assert spec and spec.loader
    sys.modules["family_tables"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["family_tables"])
    return sys.modules["family_tables"]


@pytest.mark.parametrize("page", ["families.md", "add-a-family.md", "zero-shot-table.md"])
def test_tables_are_what_the_code_says(page: str, script: ModuleType) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert text == script.made(page, text), "python scripts/family_tables.py"


def test_the_pages_name_every_family_preset_and_published_row() -> None:
    families = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert FAMILIES.keys() == SPELLINGS.keys()
    for name in FAMILIES:
        # What it is, what it has, how it lies; and a preset is called as its family is.
        assert families.count(f"\n| `{name}` |") == 3 + (name in PRESETS), name
    for name in PRESETS:
        assert (f"\n| `{name}` |" in families) is (not name.startswith("gpt-j-")), name
    zero_shot = (ROOT / "docs" / "zero-shot-table.md").read_text(encoding="utf-8")
    for row in PUBLISHED:
        assert f"\n| {row.model} |" in zero_shot


def test_lines_are_counted(script: ModuleType) -> None:
    """By hand: the row of Mistral is one line, and so is its row of spelling, beside two functions."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+ \| \d+) \|$", script.lines(), re.MULTILINE))
    assert rows.keys() == FAMILIES.keys()
    spelled = (ROOT / "src/mesh_transformer/checkpoint/huggingface/spellings.py").read_text(encoding="utf-8")
    both = re.findall(r"^def _(?:read|write)_mistral.*?(?=\n\n\n)", spelled, re.DOTALL | re.MULTILINE)
    assert len(both) == 2
    assert rows["mistral"] == f"1 | {sum(len(each.splitlines()) for each in both) + 1}"


def test_the_presets_that_were_published_are_as_large_as_they_are_called(script: ModuleType) -> None:
    found = dict(re.findall(r"^\| `([\w.-]+)` \|.*\| ([\d,]+) \|$", script.presets(), re.MULTILINE))
    counts = {name: int(count.replace(",", "")) for name, count in found.items()}
    assert counts["gpt2"] == 124_439_808 and counts["gpt2-xl"] == 1_557_611_200
    for name, count in counts.items():
        size = re.search(r"-(\d+(?:\.\d+)?)([mb])$", name)
        if size:
            assert count == pytest.approx(float(size[1]) * {"m": 1e6, "b": 1e9}[size[2]], rel=0.2), name
