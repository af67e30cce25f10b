"""PyTorch files written by hand, without torch: pickles instruction by instruction, in every form of file."""

from __future__ import annotations

import itertools
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

KINDS = {
    np.float32: "FloatStorage",
    np.float16: "HalfStorage",
    ml_dtypes.bfloat16: "BFloat16Storage",
    np.float64: "DoubleStorage",
    np.int32: "IntStorage",
    np.int64: "LongStorage",
    np.int16: "ShortStorage",
    np.int8: "CharStorage",
    np.uint8: "ByteStorage",
    np.bool_: "BoolStorage",
}
FORMS = ["zip", "deflated", "old"]


# --- Writing pickles, instruction by instruction ---


class Raw(bytes):
    """Instructions that leave one value on the stack."""


def emit(value: Any) -> bytes:
    """The instructions that make `value`: None, bool, int, float, str, tuple, list, dict, or Raw."""
    match value:
        case Raw():
            return bytes(value)
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            data = value.encode()
            return b"X" + struct.pack("<I", len(data)) + data
        case tuple():
            return b"(" + b"".join(map(emit, value)) + b"t"
        case list():
            return b"](" + b"".join(map(emit, value)) + b"e"
        case dict():
            return b"}(" + b"".join(emit(key) + emit(item) for key, item in value.items()) + b"u"
    raise TypeError(type(value))


def found(module: str, name: str) -> Raw:
    return Raw(f"c{module}\n{name}\n".encode())


def called(function: Raw, *arguments: Any) -> Raw:
    return Raw(function + emit(arguments) + b"R")


def whole(value: Any) -> bytes:
    return b"\x80\x02" + emit(value) + b"."


ORDERED = called(found("collections", "OrderedDict"))


def storage(key: Any, n: Any, kind: str = "FloatStorage", *more: Any) -> Raw:
    return Raw(emit(("storage", found("torch", kind), key, "cpu", n, *more)) + b"Q")


def rebuilt(store: Any, shape: Any, strides: Any = None, offset: Any = 0) -> Raw:
    if strides is None:
        strides = tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1][: len(shape)]
    return called(found("torch._utils", "_rebuild_tensor_v2"), store, offset, shape, strides, False, ORDERED)


def write(path: Path, state: Any, storages: dict[str, np.ndarray], form: str = "zip", **members: bytes) -> Path:
    """A file of that form; `state` is a value for `emit`, or a whole pickle in bytes."""
    pickled = state if type(state) is bytes else whole(state)
    if form == "old":
        path.write_bytes(old_bytes(pickled, storages))
        return path
    compression = zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", compression) as archive:
        contents = {"data.pkl": pickled, "byteorder": b"little"}
        contents |= {f"data/{key}": values.tobytes() for key, values in storages.items()}
        for name, data in (contents | {"version": b"3\n"} | members).items():
            archive.writestr(f"any top/{name}", data)
    return path


def old_bytes(pickled: bytes, storages: dict[str, np.ndarray], little: bool = True, protocol: int = 1001) -> bytes:
    facts = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [whole(0x1950A86A20F9469CFC6C), whole(protocol), whole(facts), pickled, whole(list(storages))]
    tail = [struct.pack("<q", values.size) + values.tobytes() for values in storages.values()]
    return b"".join(head + tail)


def one(store: Raw | None = None, shape: Any = (3,), **options: Any) -> dict[str, Any]:
    return {"w": rebuilt(store or storage("0", 3), shape, **options)}


THREE = {"0": np.arange(3, dtype=np.float32)}
STORE = storage("0", 3)
TENSOR = rebuilt(STORE, (3,))
