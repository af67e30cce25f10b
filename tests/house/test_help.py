"""Every command's --help ends with examples that the command understands, and shells can complete its names."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from mesh_transformer.cli.examples import EXAMPLES
from mesh_transformer.cli.main import app

ROOT = typer.main.get_command(app)


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command and group by its words, such as "bench train"."""
    yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {word}".strip())


COMMANDS = dict(commands(ROOT))


def words_of(line: str) -> list[str]:
    """The words of a line of the shell after the program's name."""
    words = shlex.split(line)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    assert words[0] == "mesh-transformer", line
    return words[1:]


@pytest.mark.parametrize("name", sorted(COMMANDS), ids=lambda name: name or "mesh-transformer")
def test_every_command_has_examples_in_its_help(name: str) -> None:
    command = COMMANDS[name]
    shown = command.get_help(typer.Context(command, info_name="mesh-transformer"))
    assert EXAMPLES.get(name), f"cli/examples.py has none for {name!r}"
    for line in EXAMPLES[name]:
        assert f"\n    {line}\n" in f"{shown}\n", shown


@pytest.mark.parametrize(
    ("name", "line"),
    [(name, line) for name, lines in EXAMPLES.items() for line in lines],
    ids=lambda value: value or "mesh-transformer",
)
def test_an_example_is_understood(name: str, line: str) -> None:
    """As the library would parse it: options exist, values convert, nothing is missing or too much."""
    words, command, info = words_of(line), ROOT, "mesh-transformer"
    while hasattr(command, "commands") and words:
        info, command, words = words[0], command.commands[words[0]], words[1:]
    assert command is COMMANDS[name] or name in ("", "bench", "tpu"), f"{line!r} is of another command than {name!r}"
    before = list(words)
    command.make_context(info, words)  # raises what a user would be told
    known = {option for parameter in command.params for option in parameter.opts}
    assert all(word.split("=")[0] in known for word in before if word.startswith("--"))


def test_examples_are_of_commands_that_exist() -> None:
    assert set(EXAMPLES) == set(COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    """What a shell asks when a user types `mesh-transformer do` and a tabulator."""
    answer = {
        "bash": {"COMP_WORDS": "mesh-transformer do", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "mesh-transformer do"},
        "fish": {"_TYPER_COMPLETE_ARGS": "mesh-transformer do", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    environment = os.environ | answer | {"_MESH_TRANSFORMER_COMPLETE": f"complete_{shell}"}
    line = [sys.executable, "-m", "mesh_transformer"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert "doctor" in done.stdout and "train" not in done.stdout, done
    # Typer looks at the processes above it for the shell, unless it is told not to: here make's may be among them.
    told = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = subprocess.run(
        [*line, "--show-completion", shell], capture_output=True, text=True, env=told, timeout=60, check=False
    )
    assert script.returncode == 0 and f"complete_{shell}" in script.stdout, script
