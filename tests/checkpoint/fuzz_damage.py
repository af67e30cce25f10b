"""Ways to damage a file's bytes, for the fuzz test."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from checkpoint.fuzz_models import PACKERS
from mesh_transformer.data.tfrecord import masked_crc


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What was done, and the result; it differs from `data`."""
    while True:
        name, operation = rng.choice(list(OPERATIONS.items()))
        found = operation(data, rng)
        if found is not None and found != data:
            return name, found


def _place(data: bytes, rng: random.Random) -> int:
    """Anywhere, but more often near an end: most formats keep there what describes the rest."""
    n = len(data)
    near = min(n, 600)
    return rng.choice([rng.randrange(n), rng.randrange(n), rng.randrange(near), n - 1 - rng.randrange(near)])


def _range(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = _place(data, rng)
    return start, min(len(data), start + int(2 ** rng.uniform(0, 9)))


def _flip(data: bytes, rng: random.Random) -> bytes:
    i = _place(data, rng)
    return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]


def _set(data: bytes, rng: random.Random) -> bytes:
    i = _place(data, rng)
    return data[:i] + bytes([rng.choice([0, 255, 0x80, *b'0-9"{}[],:', rng.randrange(256)])]) + data[i + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _delete(data: bytes, rng: random.Random) -> bytes:
    start, end = _range(data, rng)
    return data[:start] + data[end:]


def _duplicate(data: bytes, rng: random.Random) -> bytes:
    start, end = _range(data, rng)
    return data[:end] + data[start:end] * rng.choice([1, 1, 3, 20]) + data[end:]


def _swap(data: bytes, rng: random.Random) -> bytes:
    (a, b), (c, d) = sorted([_range(data, rng), _range(data, rng)])
    return data[:a] + data[max(b, c) : d] + data[b:c] + data[a : min(b, c)] + data[max(b, d) :] if b <= c else data


def _empty(data: bytes, rng: random.Random) -> bytes | None:
    return b"" if rng.random() < 0.3 else None


def _append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice([b"\0", b"\n", b"}", rng.randbytes(40), data[:600], data])


STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
]
STRANGE += [
    "1",
    "../x",
    "/",
    "\0",
    "\ud800",
    "é" * 300,
    [],
    {},
    [[]],
    {"": []},
    [1, 2],
    ["x", None],
    "x" * 5000,
    "a\n" * 9,
]


def _json_value(data: bytes, rng: random.Random) -> bytes | None:
    """Another value, or none, somewhere in a JSON document; for a safetensors file in its header."""
    at = 0
    if not data.startswith(b"{"):
        at = 8 + int.from_bytes(data[:8], "little")
        if data[8:9] != b"{" or at > len(data):
            return None
    try:
        document = json.loads(data[8:at] if at else data)
    except ValueError:
        return None
    node, key = document, rng.choice(list(document))
    while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
        node = node[key]
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(STRANGE)
    text = json.dumps(document)
    if rng.random() < 0.1:
        text = '{"a":' * 100_000 + text  # deeper than any parser's stack
    return struct.pack("<Q", len(text)) + text.encode() + data[at:] if at else text.encode()


def _inside(data: bytes, rng: random.Random) -> bytes | None:
    """Damage under a sound outer layer: a member of a zip, or a record, with a checksum that fits; a packed archive."""
    if data.startswith(b"PK"):
        return _in_zip(data, rng)
    for magic, unpack, pack in PACKERS:
        if data.startswith(magic):
            return pack(damaged(unpack(data), rng)[1])
    return _in_record(data, rng)


def _in_zip(data: bytes, rng: random.Random) -> bytes | None:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as anew:
        if not archive.infolist():
            return None
        chosen = rng.choice(archive.infolist())
        for info in archive.infolist():
            member = archive.read(info)
            if info is chosen:
                member = damaged(member[:128], rng)[1] + member[128:] if member else b"x"
            anew.writestr(info.filename, member)
    return out.getvalue()


def _in_record(data: bytes, rng: random.Random) -> bytes | None:
    if len(data) < 16 or masked_crc(data[:8]) != struct.unpack("<I", data[8:12])[0]:
        return None
    (length,) = struct.unpack("<Q", data[:8])
    _, payload = damaged(data[12 : 12 + length], rng)
    head = struct.pack("<Q", len(payload))
    anew = head + struct.pack("<I", masked_crc(head)) + payload + struct.pack("<I", masked_crc(payload))
    return anew + data[16 + length :]


OPERATIONS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flip": _flip,
    "set": _set,
    "cut": _cut,
    "delete": _delete,
    "duplicate": _duplicate,
    "swap": _swap,
    "empty": _empty,
    "append": _append,
    "json value": _json_value,
    "inside": _inside,
}
