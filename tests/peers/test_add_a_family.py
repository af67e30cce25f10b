"""docs/add-a-family.md: its blocks, put into a copy of the package, make a family that agrees with transformers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-family.md").read_text(encoding="utf-8")
PACKAGE = "src/mesh_transformer"
# A block's file name on the page -> where it goes: a file, the line that it stands before, how far it is indented, and
# what follows it. Tables are followed by a brace in the first column.
PLACES = {
    "family.py": (f"{PACKAGE}/checkpoint/families.py", "    )\n}\n", 8, ",\n"),
    "spelling.py": (f"{PACKAGE}/checkpoint/huggingface/spellings.py", "_GPTJ_SIZES = {\n", 0, "\n\n\n"),
    "row.py": (f"{PACKAGE}/checkpoint/huggingface/spellings.py", "}\n", 4, "\n"),
    "case.py": ("tests/peers/family_cases.py", "}\n\n\ndef make(", 4, "\n"),
}
TESTS = ("tests/conftest.py", "tests/quickly.py", "tests/peers/family_cases.py", "tests/peers/test_families.py")
_BLOCK = re.compile(r"<!-- file: (\S+) -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# An editable install answers before the path does, unless the path is asked first.
_PYTEST = """
import importlib.machinery, sys
sys.meta_path.remove(importlib.machinery.PathFinder)
sys.meta_path.insert(0, importlib.machinery.PathFinder)
sys.path[:0] = ["src", "tests"]
import mesh_transformer, pytest
assert mesh_transformer.__file__.startswith(sys.argv[1]), mesh_transformer.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


def put_in(root: Path, name: str, block: str) -> None:
    """The block before the last such place of its file, as far indented as its neighbours."""
    file, before, indent, after = PLACES[name]
    text = (root / file).read_text(encoding="utf-8")
    at = text.rindex(before)
    shifted = textwrap.indent(block.rstrip(), " " * indent)
    (root / file).write_text(text[:at] + shifted + after + text[at:], encoding="utf-8")


# What may be left out where time is short: texts, and every field changed in turn.
@pytest.mark.parametrize(
    "left_out", ["greedy or option", pytest.param("", marks=pytest.mark.long)], ids=["part", "all"]
)
def test_the_walk_through_leads_to_a_family_that_agrees(left_out: str, tmp_path: Path) -> None:
    blocks = dict(_BLOCK.findall(PAGE))
    assert blocks.keys() == PLACES.keys()
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file in TESTS:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    for name, block in blocks.items():
        put_in(tmp_path, name, block)

    asked = re.search(r'make test-peers TEST_ARGS="([^"]+)"', PAGE)
    assert asked
    words = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "peers and not long" if left_out else "peers",
        *shlex.split(asked[1]),
    ]
    words[-1] += f" and not ({left_out})" if left_out else ""
    done = subprocess.run(
        [sys.executable, "-c", _PYTEST, str(tmp_path), *words],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(rf"^{3 if left_out else 5} passed, ", done.stdout, re.MULTILINE), done.stdout
