"""What the documents say can be typed, can be."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import quickly
from mesh_transformer.cli.main import app
from mesh_transformer.config.presets import PRESETS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def parsed(line: str) -> tuple[dict[str, str], list[str]]:
    """The variables before a command, and its words."""
    words = shlex.split(line)
    first = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return dict(word.split("=", 1) for word in words[:first]), words[first:]


def commands(document: Path) -> list[str]:
    text = document.read_text(encoding="utf-8")
    lines = [line for block in blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    return [line[2:] for line in lines]


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
    assert written == {name: [getattr(cfg, field) for field in fields] for name, cfg in PRESETS.items()}


def test_readme_walkthrough(tmp_path: Path) -> None:
    """The README's own text, configuration, commands and Python, as they stand."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    notes = "<|endoftext|>".join(f"Once upon a time there were {n} geese. " * 20 for n in range(60))
    (tmp_path / "notes.txt").write_text(notes)
    (tmp_path / "notes.toml").write_text(blocks(text, "toml")[0])
    here = os.environ | {"MESH_TRANSFORMER_CACHE": str(tmp_path / "cache")}
    for line in commands(ROOT / "README.md"):
        variables, words = parsed(line)
        # A server does not end by itself: tests/peers/test_serve_curl.py starts it and sends what stands beside it.
        if words[0] == "mesh-transformer" and words[1] != "serve":
            command = [sys.executable, "-m", "mesh_transformer", *words[1:]]
            # One device, as a reader has it, unless the line says otherwise.
            env = here | quickly.variables(variables.pop("XLA_FLAGS", "")) | variables
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
    python = [sys.executable, "-c", blocks(text, "python")[0]]
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, env=here | quickly.variables())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "notes-hf" / "model.safetensors").exists()
