"""Headers of the original's .npz files: read as NumPy reads them, and in many threads at once."""

from __future__ import annotations

import gc
import io
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from legacy.npz import header
from mesh_transformer.checkpoint.legacy.npz import NpzFile
from mesh_transformer.config.errors import CheckpointError


@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32])
def test_what_numpy_writes_is_read(shape: tuple[int, ...], dtype: Any) -> None:
    file = io.BytesIO()
    values = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    np.savez(file, values)
    with NpzFile(file, "x.npz") as opened:
        assert opened.members[0].shape == shape and opened.members[0].dtype == dtype
        np.testing.assert_array_equal(opened.read(0), values)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (4)",
        b"{'descr': '<f4', 'fortran_order': 0, 'shape': (4,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (4,,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': 4, }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (4,), 'more': 1, }",
        b"__import__('os').system('true')",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1 " * 30000 + b"), }",
    ],
)
def test_another_header_is_refused(text: bytes) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16))
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        NpzFile(file, "x.npz")


@pytest.fixture
def threads_that_change_often() -> Iterator[None]:
    """Python code runs, and may hand over to another thread, at almost every allocation."""

    def busy(*_: object) -> None:
        sum(range(100))

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(5)
    gc.callbacks.append(busy)
    yield
    gc.callbacks.remove(busy)
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("threads_that_change_often")
def test_headers_in_many_threads(tmp_path: Path) -> None:
    path = tmp_path / "0.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", header((8, 32), "<V2") + bytes(512))

    def read(_: int) -> tuple[int, ...]:
        with NpzFile(path, path) as opened:
            return opened.members[0].shape

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, range(400))) == {(8, 32)}
