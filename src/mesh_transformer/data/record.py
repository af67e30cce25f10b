"""The record that `prepare` leaves beside a data set: which tokenizer made it, and how long its sequences are."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

from mesh_transformer.config.errors import DataError
from mesh_transformer.data import places
from mesh_transformer.data.files import write_atomic
from mesh_transformer.data.finding import is_record_file, resolve_data

_FORMAT = "mesh-transformer data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataRecord:
    """How a data set was made.

    `tokenizer` is "gpt2", "bytes" or the path of a tokenizer.json; `tokenizer_sha256` is `Tokenizer.sha256`;
    `sequence_length` is T, each record holding T + 1 ids; counts are of sequences.
    """

    tokenizer: str
    tokenizer_sha256: str
    n_vocab: int
    sequence_length: int
    sequences: int
    validation_sequences: int


def write_data_record(path: Path, record: DataRecord) -> None:
    """Writes `record` as JSON; a tokenizer that is a file must lie beside `path`. Raises DataError if it cannot."""
    content = {"format": _FORMAT, **dataclasses.asdict(record)}
    content["tokenizer"] = os.path.basename(record.tokenizer)
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def data_record(spec: str) -> DataRecord | None:
    """The record beside the data set that `spec` names (as for `resolve_data`), or None where there is none.

    NAME.json stands beside NAME.index, NAME.val.index and NAME_{count}.tfrecords. An index without a record of its own,
    a directory and a glob have the record that all their files share; if some differ in tokenizer there is none.

    Raises:
        DataError: the data does not exist, or a record is malformed.
    """
    files = resolve_data(spec)
    path = places.normal(spec)
    is_index = path.endswith(".index") if places.is_url(path) else os.path.isfile(path) and not is_record_file(path)
    if is_index:
        name = path.removesuffix(".index").removesuffix(".val")
        if (found := _read(f"{name}.json")) is not None:
            return found
    beside = {re.sub(r"(\.val)?_\d+\.tfrecords$", "", file) for file in files}
    records = [_read(f"{name}.json") for name in sorted(beside)]
    first = records[0]
    if first is None or any(each is None or each.tokenizer_sha256 != first.tokenizer_sha256 for each in records):
        return None
    return first


def _read(path: str) -> DataRecord | None:
    data = places.read_file(path)
    if data is None:
        return None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the data's record cannot be read ({error}); prepare the data again") from error
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        return None  # some other file of that name
    try:
        record = DataRecord(**content)
        if not isinstance(record.tokenizer, str) or not isinstance(record.sequence_length, int):
            raise TypeError("tokenizer must be a string, sequence_length a whole number")
    except TypeError as error:
        raise DataError(f"{path}: the data's record is malformed ({error}); prepare the data again") from error
    if record.tokenizer.endswith(".json"):
        record = dataclasses.replace(record, tokenizer=places.join(places.parent(path), record.tokenizer))
    return record
