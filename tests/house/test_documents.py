"""What the documents say can be typed, can be."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

from docs.document_blocks import DOCUMENTS, ROOT, blocks_of, commands_in
from mesh_transformer.cli.main import app
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.config.schema import SECTIONS


def parsed(line: str) -> tuple[dict[str, str], list[str]]:
    """The variables before a command, and its words."""
    words = shlex.split(line)
    first = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return dict(word.split("=", 1) for word in words[:first]), words[first:]


def commands(document: Path) -> list[str]:
    return [line for block in blocks_of(document) if block.language == "console" for line in commands_in(block)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_commands_and_options_exist(document: Path) -> None:
    group = typer.main.get_command(app)
    makefile = (ROOT / "Makefile").read_text()
    for line in commands(document):
        _, words = parsed(line)
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile, line
        if words[0] != "mesh-transformer" or words[1].startswith("-"):
            continue
        command = group.commands[words[1]]
        rest = words[2:]
        while hasattr(command, "commands") and rest:
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--debug"}
        for word in rest:
            assert not word.startswith("--") or word.split("=")[0] in known, line


def test_the_table_of_presets_is_the_presets() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    header = next(line for line in text.splitlines() if line.startswith("| preset | "))
    fields = [cell.strip() for cell in header.strip("|").split("|")][1:]
    rows = re.findall(r"^\| `(gpt-j-[^`]+)`[^|]*\|(.*)\|$", text, re.MULTILINE)
    written = {name: [int(cell) for cell in cells.split("|")] for name, cells in rows}
    own = {name: cfg for name, cfg in PRESETS.items() if name.startswith("gpt-j-")}  # others: docs/families.md
    assert written == {name: [getattr(cfg, field) for field in fields] for name, cfg in own.items()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_extras_and_keys_exist(document: Path) -> None:
    """What is installed in brackets, and what is set beside a configuration."""
    text = document.read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for given in re.findall(r"pip install [^\n`]*\[([\w,]+)\]", text):
        assert set(given.split(",")) <= set(extras), given
    keys = {f"{section}.{field}" for section, kind in SECTIONS.items() for field in kind.__dataclass_fields__}
    keys |= {"name", "seed", "model.preset", "model.KEY", "KEY"}
    for key in re.findall(r"--set '?([\w.]+)=", text):
        assert key in keys or key == "key", key
