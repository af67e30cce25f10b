"""Whether all processes of a run have the same configuration and the same code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

from mesh_transformer.config.checks import shown
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.processes.group import Processes

_PACKAGE = Path(__file__).parents[1]


def version_facts() -> dict[str, str]:
    """The versions that must be equal in all processes: this package's, its code's sha256, jax's and jaxlib's."""
    names = ("mesh-transformer", "jax", "jaxlib")
    return {f"version of {name}": importlib.metadata.version(name) for name in names} | {"code": _code_digest(_PACKAGE)}


def check_same(processes: Processes, facts: Mapping[str, str]) -> None:
    """Returns if the facts are the same in all processes.

    Args:
        facts: name -> text. Of a text of several lines an error shows the first line that differs.

    Raises:
        ConfigError: in all processes: some differ from process 0. The message names the fact and the processes.
        RunError: some processes did not answer in time.
    """
    everyone = [json.loads(text) for text in processes.exchange("comparison", json.dumps(dict(facts)))]
    first = everyone[0]
    for name in dict.fromkeys(itertools.chain.from_iterable(everyone)):
        differing = [index for index, each in enumerate(everyone) if each.get(name) != first.get(name)]
        if differing:
            there = _first_difference(first.get(name, ""), everyone[differing[0]].get(name, ""))
            raise ConfigError(
                f"{name} of {processes.names(differing)} differs from process 0's: {there}\n"
                "Start all processes with the same configuration, options and installed versions."
            )


def _first_difference(first: str, other: str) -> str:
    pairs = itertools.zip_longest(first.splitlines(), other.splitlines())
    number, (here, there) = next(
        ((number, pair) for number, pair in enumerate(pairs, 1) if pair[0] != pair[1]), (0, (first, other))
    )
    where = f"line {number}: " if "\n" in first else ""
    values = ["nothing" if value is None else shown(value) for value in (there, here)]
    return f"{where}{values[0]} instead of {values[1]}"


def _code_digest(package: Path) -> str:
    """sha256 over the names and contents of the package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
