"""`tf.train.Example`, the protobuf message inside a record, without TensorFlow (docs/formats.md, section 9.1).

Token ids are in the int64_list feature `text`. In memory an id that the model reads but does not learn to predict
stands as `~id`, which is negative; on disk a second int64_list feature, `learn`, then holds 0 for it and 1 for others.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mesh_transformer.config.errors import DataError

TEXT = b"text"
LEARN = b"learn"
_BYTES_LIST, _INT64_LIST = 1, 3  # fields of a Feature
_MAX_VARINT_BYTES = 10
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


# ---------------------------------------------------------------------------------------------------------- writing


def encode_example(ids: np.ndarray) -> bytes:
    """The `tf.train.Example` of a row of token ids (1-d, any integer type), `~id` where an id is not learned.

    Where all are learned the only feature is `text`. Packed varints, keys in order, as TensorFlow writes them.
    """
    ids = np.asarray(ids)
    hidden = ids < 0
    if not hidden.any():
        return _example({TEXT: ids})
    return _example({LEARN: ~hidden, TEXT: np.where(hidden, ~ids, ids)})


def _example(features: dict[bytes, np.ndarray]) -> bytes:
    entries = b""
    for key, values in features.items():
        feature = _field(_INT64_LIST, _field(1, _encode_varints(values)))
        entries += _field(1, _field(1, key) + _field(2, feature))
    return _field(1, entries)


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | _BYTES]) + _encode_varints(np.array([len(value)])) + value


def _encode_varints(values: np.ndarray) -> bytes:
    rest = values.astype(np.int64).view(np.uint64)
    columns = []
    while True:
        columns.append((rest & np.uint64(0x7F)).astype(np.uint8))
        rest = rest >> np.uint64(7)
        if not rest.any():
            break
    groups = np.stack(columns, axis=1)  # [n, bytes]: seven bits each, lowest first
    used = np.maximum.accumulate((groups != 0)[:, ::-1], axis=1)[:, ::-1]
    used[:, 0] = True
    groups[:, :-1] |= np.where(used[:, 1:], 0x80, 0).astype(np.uint8)
    return groups[used].tobytes()


# ---------------------------------------------------------------------------------------------------------- reading


class Example:
    """The features of a serialized `tf.train.Example`, each decoded when it is asked for.

    Args:
        payload: the message.
        where: what the messages of errors begin with.

    Raises:
        DataError: the message is malformed.
    """

    def __init__(self, payload: bytes, where: str = "record") -> None:
        self._where = where
        self._features: dict[bytes, bytes] = {}
        try:
            for message in _messages(payload, 1):
                for entry in _messages(message, 1):
                    # A later entry with the same key replaces an earlier one, as in every protobuf map.
                    key = b"".join(list(_messages(entry, 1))[-1:])
                    self._features[key] = b"".join(_messages(entry, 2))
        except ValueError as error:
            raise self._malformed(error) from error

    @property
    def names(self) -> frozenset[bytes]:
        """The features that there are."""
        return frozenset(self._features)

    def int64s(self, name: bytes) -> np.ndarray:
        """int64 [n]: the values of an int64_list, packed or not. Raises DataError if the feature is none."""
        try:
            lists = list(_messages(self._feature(name), _INT64_LIST))
            if not lists:
                raise ValueError(f"its feature {_shown(name)} is not an int64_list")
            parts = []
            for int64_list in lists:
                for number, value in _fields(int64_list):
                    if number == 1 and isinstance(value, int):  # unpacked
                        parts.append(np.array([value], np.uint64).view(np.int64))
                    elif number == 1 and isinstance(value, bytes):  # packed
                        parts.append(_decode_varints(value))
        except ValueError as error:
            raise self._malformed(error) from error
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def strings(self, name: bytes) -> list[bytes]:
        """The values of a bytes_list. Raises DataError if the feature is none."""
        try:
            lists = list(_messages(self._feature(name), _BYTES_LIST))
            if not lists:
                raise ValueError(f"its feature {_shown(name)} is not a bytes_list")
            return [value for bytes_list in lists for value in _messages(bytes_list, 1)]
        except ValueError as error:
            raise self._malformed(error) from error

    def _feature(self, name: bytes) -> bytes:
        if name not in self._features:
            names = ", ".join(sorted(each.decode("utf-8", "replace") for each in self._features)) or "none"
            raise ValueError(f"it has no feature {_shown(name)}; features found: {names}")
        return self._features[name]

    def _malformed(self, error: ValueError) -> DataError:
        return DataError(f"{self._where}: not a tf.train.Example with token ids ({error})")


def decode_example(payload: bytes, *, where: str = "record") -> np.ndarray:
    """The row in a serialized `tf.train.Example`: the ids of its feature `text`, as `~id` where `learn` is 0.

    Other features are skipped, and their order does not matter.

    Returns:
        int32 [n_ids].

    Raises:
        DataError: malformed, without an int64_list `text`, an id does not lie in 0..2^31-1, or `learn` is not a 0 or 1
            for each id; begins with `where`.
    """
    return text_row(Example(payload, where), where)


def text_row(example: Example, where: str) -> np.ndarray:
    """`decode_example` of an example that is parsed already."""
    ids = example.int64s(TEXT)
    if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
        outside = ids[(ids < 0) | (ids >= 2**31)][0]
        fault = "is negative" if outside < 0 else "does not fit in 32 bits"
        raise DataError(f"{where}: token id {outside} {fault}; expected ids from 0 on, prepare the data again")
    row = ids.astype(np.int32)
    if LEARN not in example.names:
        return row
    learn = example.int64s(LEARN)
    if learn.shape != row.shape or not np.isin(learn, (0, 1)).all():
        raise DataError(
            f"{where}: its feature 'learn' has {learn.size} values for the {row.size} ids of 'text'; expected a 0 or 1 "
            "for each, prepare the data again"
        )
    return np.where(learn == 1, row, ~row)


def _shown(name: bytes) -> str:
    return repr(name.decode("utf-8", "replace"))


def _messages(data: bytes, wanted: int) -> Iterator[bytes]:
    return (value for number, value in _fields(data) if number == wanted and isinstance(value, bytes))


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int | None]]:
    """Every field of a protobuf message: (number, int for a varint, bytes for a string or message, None otherwise)."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("field number 0")
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == _BYTES:
            size, position = _varint(data, position)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if position + size > len(data):
            raise ValueError("a field runs past the end of the message")
        yield number, data[position : position + size] if wire == _BYTES else None
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for i in range(_MAX_VARINT_BYTES):
        if position + i >= len(data):
            raise ValueError("a number runs past the end of the message")
        byte = data[position + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position + i + 1
    raise ValueError("a number is longer than 10 bytes")


def _decode_varints(data: bytes) -> np.ndarray:
    raw = np.frombuffer(data, np.uint8)
    if raw.size == 0:
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(raw < 0x80)
    if ends.size == 0 or ends[-1] != raw.size - 1:
        raise ValueError("a number runs past the end of the message")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MAX_VARINT_BYTES:
        raise ValueError("a number is longer than 10 bytes")
    values = np.zeros(ends.size, np.uint64)
    for i in range(lengths.max()):
        more = lengths > i
        values[more] |= (raw[starts[more] + i] & 0x7F).astype(np.uint64) << np.uint64(7 * i)
    return values.view(np.int64)
