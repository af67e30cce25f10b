"""`tf.train.Example` put together by hand, from the protobuf specification."""

from __future__ import annotations


def varint(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def packed(values: list[int]) -> bytes:
    return message(1, b"".join(map(varint, values)))


def unpacked(values: list[int]) -> bytes:
    return b"".join(varint(1 << 3) + varint(value) for value in values)


def mixed(values: list[int]) -> bytes:
    """Some packed, some not: the protobuf specification lets a reader see both in one list."""
    half = len(values) // 2
    return packed(values[:half]) + unpacked(values[half:])


def int64s(name: str, values: list[int], how: object = packed) -> bytes:
    return message(1, message(1, name.encode()) + message(2, message(3, how(values))))  # type: ignore[operator]


def strings(name: str, values: list[bytes]) -> bytes:
    return message(1, message(1, name.encode()) + message(2, message(1, b"".join(message(1, v) for v in values))))


def example(*features: bytes) -> bytes:
    return message(1, b"".join(features))
