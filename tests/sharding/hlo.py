"""The collectives of a compiled program, read from its optimised HLO text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Literal

import jax

Shape = tuple[int, ...]
Phase = Literal["forward", "backward", "update"]
_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
_COLLECTIVE = re.compile(rf" = (?P<type>\(.*?\)|\S+) (?P<kind>{_KINDS})(?P<asynchronous>-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "f64": 64}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One message of one device.

    buffers: (dtype, shape) of each result; XLA joins several arrays in one message. loops: how many it stands in.
    times: how often it is sent, by the trip counts of those loops. op_name: the operation of the source that it comes
    from, of a joined message all of them.
    """

    kind: str
    buffers: tuple[tuple[str, Shape], ...]
    loops: int
    times: int
    op_name: str

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the buffers."""
        return tuple(shape for _, shape in self.buffers)

    @property
    def n_bytes(self) -> int:
        """Of the results, each time."""
        return sum(math.prod(shape) * _BITS[dtype] // 8 for dtype, shape in self.buffers)

    @property
    def phase(self) -> Phase:
        """By the mark that differentiation leaves on an operation; a joined message counts as its backward part."""
        if "transpose(" in self.op_name:
            return "backward"
        return "forward" if "jvp(" in self.op_name else "update"


def collectives(program: jax.stages.Compiled) -> list[Collective]:
    """Every collective that the program runs; those of a computation called twice are there twice."""
    computations, entry = _computations(program.as_text())
    return list(_walk(computations, entry, loops=0, times=1))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines, and the name of the one where the program starts."""
    found: dict[str, list[str]] = {}
    entry = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line)
        if header:
            body = found[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("  "):
            body.append(line)
    return found, entry


def _walk(computations: dict[str, list[str]], name: str, *, loops: int, times: int) -> Iterator[Collective]:
    for line in computations[name]:
        found = _COLLECTIVE.search(line)
        if found:
            assert not found["asynchronous"], "messages in two parts are not read here"
            buffers = re.findall(r"(\w+)\[([\d,]*)\]", found["type"])
            op_name = re.search(r'op_name="([^"]*)"', line)
            yield Collective(
                kind=found["kind"],
                buffers=tuple((dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in buffers),
                loops=loops,
                times=times,
                op_name=op_name[1] if op_name else "",
            )
            continue
        called = _CALLED.findall(line) + [
            part.strip().removeprefix("%") for found in _BRANCHES.findall(line) for part in found.split(",")
        ]
        inside, often = loops, times
        if " while(" in line:
            trips = _TRIPS.search(line)
            assert trips, f"a loop of unknown length: {line[:200]}"
            inside, often = loops + 1, times * int(trips[1])
        for other in called:
            yield from _walk(computations, other, loops=inside, times=often)
