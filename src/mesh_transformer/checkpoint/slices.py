"""Parts of the arrays of a checkpoint, read and written singly: the only module that knows TensorStore.

Orbax reads and writes whole trees; a conversion must not hold one. What is written here Orbax restores as its own: one
Zarr array a leaf in a directory of its own, one chunk a layer, and the description of the tree in `_METADATA`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.config.errors import CheckpointError

_TREE = "_METADATA"
_OCDBT = "manifest.ocdbt"  # Orbax keeps all arrays in one database where this file is
_DICT_KEY = 2  # Orbax's number for the key of a dict


class ArrayReader:
    """The arrays of a directory that `arrays.start_write` or `ArrayWriter` wrote, under names like "params/head/b"."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """The whole array, or `array[row]`; no more is read than the chunks that hold it.

        Raises:
            CheckpointError: it is not there, or damaged.
        """
        try:
            array = self._open.get(name)
            if array is None:
                array = self._open[name] = _tensorstore().open(_spec(self.directory, name), open=True).result()
            return np.asarray((array if row is None else array[row]).read().result())
        except (ValueError, OSError) as error:
            reason = str(error).partition("\n")[0][:300]  # it may quote the file
            raise CheckpointError(f"{self.directory}: array {name} cannot be read: {reason}") from error


class ArrayWriter:
    """Writes arrays of known shapes in parts, in any order, from any thread.

    Args:
        directory: exists and is empty.
        shapes: "params/layers/attn/q" -> shape and dtype.
        by_row: names of those that are written one row of the first axis at a time.
    """

    def __init__(
        self, directory: Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], by_row: Iterable[str]
    ) -> None:
        rows = set(by_row)
        ts = _tensorstore()
        self._open = {}
        for name, (dimensions, dtype) in shapes.items():
            chunks = [1, *dimensions[1:]] if name in rows else list(dimensions)
            metadata = {
                "shape": list(dimensions),
                "chunks": chunks,
                "dtype": dtype.name if dtype.name == "bfloat16" else dtype.newbyteorder("<").str,
                "compressor": None,
            }
            spec = {"driver": "zarr", "kvstore": _plain(directory, name), "metadata": metadata}
            self._open[name] = ts.open(spec, create=True).result()
        (directory / _TREE).write_text(json.dumps(_tree(list(shapes))), encoding="utf-8")

    def write(self, name: str, row: int | None, values: np.ndarray) -> Callable[[], None]:
        """Begins to write the whole array, or one row of it; `values` must not change until the function returned ends.

        Raises (that function): OSError, the disk is full or cannot be written.
        """
        array = self._open[name]
        pending = (array if row is None else array[row]).write(values, can_reference_source_data_indefinitely=True)

        def finish() -> None:
            try:
                pending.result()
            except ValueError as error:  # how TensorStore reports what the system says
                raise OSError(str(error)) from error

        return finish


def _spec(directory: Path, name: str) -> dict[str, Any]:
    if not (directory / _OCDBT).exists():
        return {"driver": "zarr", "kvstore": _plain(directory, name)}
    store = {"driver": "ocdbt", "base": f"file://{directory.absolute()}/", "path": f"{_stored(name)}/"}
    return {"driver": "zarr", "kvstore": store}


def _plain(directory: Path, name: str) -> dict[str, str]:
    return {"driver": "file", "path": f"{directory.absolute()}/{_stored(name)}/"}


def _stored(name: str) -> str:
    return name.replace("/", ".")


def _tree(names: list[str]) -> dict[str, Any]:
    """What Orbax wants to know of the tree; a nested dict of NumPy arrays."""
    leaves = {}
    for name in names:
        keys = tuple(name.split("/"))
        leaves[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {
        "tree_metadata": leaves,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _tensorstore() -> Any:
    import tensorstore

    return tensorstore
