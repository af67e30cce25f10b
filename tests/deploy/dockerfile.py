"""A Dockerfile read as far as its rules need it."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a stage; `flags` are its leading --name=value words, `text` is the rest."""

    stage: int
    name: str
    flags: tuple[str, ...]
    text: str

    @property
    def words(self) -> list[str]:
        """The exec form's list, or the words of a shell."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


def read(path: Path) -> list[Instruction]:
    """The instructions in order; those before the first FROM are of stage -1."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    found: list[Instruction] = []
    stage = -1
    for line in filter(None, re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()):
        name, _, rest = line.partition(" ")
        flags = []
        while match := re.match(r"\s*(--\S+)\s+", rest):
            flags.append(match[1])
            rest = rest[match.end() :]
        stage += name == "FROM"
        found.append(Instruction(stage, name, tuple(flags), rest.strip()))
    return found
