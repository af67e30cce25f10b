"""The pictures of docs/parallelism.md are what their script draws, and every one is shown."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

IMAGES = Path(__file__).parents[2] / "docs" / "images"


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("axes", IMAGES / "axes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "axes", module)  # where dataclasses looks for it
    spec.loader.exec_module(module)
    return module


def test_they_are_as_drawn(axes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(axes, "HERE", tmp_path)
    axes.main()
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in IMAGES.glob("axis-*.svg")}
    page = (IMAGES.parent / "parallelism.md").read_text(encoding="utf-8")
    for name, text in drawn.items():
        assert f"](images/{name})" in page
        root = ElementTree.fromstring(text)
        inside = [float(each.get("x", 0)) + float(each.get("width", 0)) for each in root.iter() if each.tag != root.tag]
        assert max(inside) <= axes.WIDTH


def test_what_is_sent_is_what_the_axis_sends(axes: ModuleType) -> None:
    """Per step of four layers: one sum; two halves of one; two gathers and a scatter a layer; two sums a layer."""
    sent = {
        each.name: [word for word in each.time.split() if word[0].islower() or word == "+"] for each in axes.STRATEGIES
    }
    assert sent["data"] == ["sum"]
    assert sent["fsdp-zero-1"] == ["scatter", "gather"]
    assert (sent["fsdp-zero-3"].count("g"), sent["fsdp-zero-3"].count("s")) == (2 * axes.N, axes.N)
    assert sent["tensor"] == ["+"] * 2 * axes.N
