"""Collectives in the text of a compiled program, counted as often as they are executed."""

from __future__ import annotations

import math
import re
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_ITEMSIZE |= {"f64": 8, "s64": 8, "u64": 8}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations)=\{?(%?[\w.\-]+(?:, %?[\w.\-]+)*)")
# Not to be executed by itself: the addition of an all-reduce or a reduction.
_NOT_CALLS = re.compile(rf" (?:{'|'.join(KINDS)}|reduce|reduce-window|scatter|sort|map)(?:-start)?\(")


def collectives(text: str) -> dict[str, dict[str, Any]]:
    """How often each kind is executed in one run of a program on one device, and what a ring of devices then sends.

    Returns:
        By kind: "count"; "bytes", of the whole arrays that result (of a reduce-scatter: that go in); "sent", bytes that
        each device sends: of n devices (n - 1) / n of these, for an all-reduce twice that, for a permutation all;
        "in_loops", those of them that are sent within loops; "by_group", bytes sent by the number of devices that take
        part.
    """
    computations, entry = _computations(text)
    found: dict[str, dict[str, Any]] = {}

    def walk(name: str, times: int, looped: bool) -> None:
        for line in computations.get(name, ()):
            match = _COLLECTIVE.search(line)
            if match:
                _add(found, match[2], _array_bytes(match[2], match[1], bool(match[3]), line), line, times, looped)
            if _NOT_CALLS.search(line):
                continue
            loop = " while(" in line
            again = times * _trip_count(line, computations) if loop else times
            for group in _CALLED.findall(line):
                for called in group.split(", "):
                    walk(called.lstrip("%"), again, looped or loop)

    walk(entry, 1, False)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and line.startswith(" "):
            computations[current].append(line)
    return computations, entry


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: as the compiler notes it, or the one number that its condition compares with."""
    known = re.search(r'known_trip_count\D*?"n":"(\d+)"', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations[condition[1]] if condition else []
    numbers = [found[1] for of in lines if (found := re.search(r"= s32\[\]\S* constant\((\d+)\)", of))]
    if len(numbers) != 1 or not any("direction=LT" in of for of in lines):
        raise ValueError(f"a loop whose length the compiler does not tell: {line.strip()[:200]}")
    return int(numbers[0])


def _group_size(line: str) -> int:
    """Devices that take part in a collective together; 1 for a permutation, which has pairs."""
    if "replica_groups=" not in line:
        return 1
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    raise ValueError(f"groups of devices in an unknown notation: {line.strip()[:400]}")


def _array_bytes(kind: str, shape: str, started: bool, line: str) -> int:
    total = 0
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        if dtype in _ITEMSIZE:
            total += _ITEMSIZE[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
    n = _group_size(line)
    if kind == "reduce-scatter":
        return total * n
    if started and kind == "all-gather":  # what goes in stands beside what results
        return total * n // (n + 1)
    if started and kind == "collective-permute":
        return total // 2
    return total


def _add(found: dict[str, dict[str, Any]], kind: str, size: int, line: str, times: int, looped: bool) -> None:
    n = _group_size(line)
    factor = 1.0 if kind == "collective-permute" else (2 if kind == "all-reduce" else 1) * (n - 1) / n
    sent = round(times * size * factor)
    entry = found.setdefault(kind, {"count": 0, "bytes": 0, "sent": 0, "in_loops": 0, "by_group": {}})
    entry["count"] += times
    entry["bytes"] += times * size
    entry["sent"] += sent
    entry["in_loops"] += sent if looped else 0
    entry["by_group"][str(n)] = entry["by_group"].get(str(n), 0) + sent
