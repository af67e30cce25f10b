"""PyTorch files written by hand, without torch: sound ones and damaged ones."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint.torch_bytes import (
    FORMS,
    KINDS,
    ORDERED,
    TENSOR,
    THREE,
    Raw,
    called,
    emit,
    found,
    old_bytes,
    one,
    rebuilt,
    storage,
    whole,
    write,
)
from mesh_transformer.checkpoint.torch_file import TorchFile
from mesh_transformer.config.errors import CheckpointError

# --- Sound files ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", KINDS)
def test_every_dtype_arrives_bit_for_bit(tmp_path: Path, dtype: Any, form: str) -> None:
    want = np.random.default_rng(1).integers(0, 256, 24 * np.dtype(dtype).itemsize, np.uint8)
    want = (want % 2).view(dtype) if dtype is np.bool_ else want.view(dtype)
    state = {"w": rebuilt(storage("0", 24, KINDS[dtype]), (2, 3, 4)), "s": rebuilt(storage("1", 1, KINDS[dtype]), ())}
    file = TorchFile(write(tmp_path / "x.bin", state, {"0": want, "1": want[5:6]}, form))
    assert [(name, t.shape, t.dtype) for name, t in file.tensors.items()] == [
        ("w", (2, 3, 4), np.dtype(dtype)),
        ("s", (), np.dtype(dtype)),
    ]
    for name, values in {"w": want.reshape(2, 3, 4), "s": want[5].reshape(())}.items():
        got = file.read(name)
        assert isinstance(got, np.ndarray) and got.flags.c_contiguous and got.flags.writeable
        assert (got.shape, got.dtype, got.tobytes()) == (values.shape, values.dtype, values.tobytes())


@pytest.mark.parametrize("form", FORMS)
def test_views_of_one_storage(tmp_path: Path, form: str) -> None:
    base = np.arange(60, dtype=np.int64) * 3
    store = storage("k", 60, "LongStorage")
    views = {
        "all": (base.reshape(6, 10), 0),
        "transposed": (base.reshape(6, 10).T, 0),
        "rows": (base.reshape(6, 10)[2:5], 20),
        "corner": (base.reshape(6, 10)[3:, 7:], 37),
        "every third": (base[1::3], 1),
        "last": (base[59:].reshape(()), 59),
        "windows": (np.lib.stride_tricks.sliding_window_view(base[:9], 3), 0),
        "none": (base[:0].reshape(4, 0), 0),
        "none beyond": (base[:0].reshape(0, 4), 60),
    }
    state = {
        name: rebuilt(store, view.shape, tuple(s // 8 for s in view.strides), offset)
        for name, (view, offset) in views.items()
    }
    file = TorchFile(write(tmp_path / "x.bin", state, {"k": base}, form))
    for name, (view, _) in views.items():
        got = file.read(name)
        assert got.flags.c_contiguous and got.shape == view.shape and got.dtype == np.int64, name
        np.testing.assert_array_equal(got, view, err_msg=name)
    file.read("all")[:] = 0  # a copy: neither the file nor a later read changes
    np.testing.assert_array_equal(file.read("rows"), base.reshape(6, 10)[2:5])


@pytest.mark.parametrize("form", FORMS)
def test_a_modules_state_dict_with_metadata_parameters_and_scalars(tmp_path: Path, form: str) -> None:
    parameter = called(found("torch._utils", "_rebuild_parameter"), rebuilt(storage("0", 3), (3,)), True, ORDERED)
    items = b"(" + emit("w") + parameter + emit("tied") + parameter
    items += b"".join(emit(k) + emit(v) for k, v in {"epoch": 3, "lr": 0.5, "none": None, "x": "y", "b": True}.items())
    metadata = {"_metadata": {"": {"version": 1}}}
    state = Raw(ORDERED + items + b"u" + emit(metadata) + b"b")
    file = TorchFile(write(tmp_path / "x.bin", state, THREE, form))
    assert list(file.tensors) == ["w", "tied"]
    np.testing.assert_array_equal(file.read("tied"), [0, 1, 2])


def test_the_old_forms_sixth_part_and_memoised_values(tmp_path: Path) -> None:
    store = Raw(storage("0", 3, "FloatStorage", None) + b"r\xff\xff\xff\x7f")  # put under a huge number
    state = {"w": rebuilt(store, (3,)), "v": rebuilt(Raw(b"j\xff\xff\xff\x7f"), (2,), offset=1)}
    file = TorchFile(write(tmp_path / "x.bin", state, THREE, "old"))
    np.testing.assert_array_equal(file.read("v"), [1, 2])


@pytest.mark.parametrize("form", FORMS)
def test_any_byte_of_a_bool_is_a_sound_bool(tmp_path: Path, form: str) -> None:
    state = one(storage("0", 4, "BoolStorage"), (4,))
    got = TorchFile(write(tmp_path / "x.bin", state, {"0": np.array([0, 1, 2, 255], np.uint8)}, form)).read("w")
    assert got.view(np.uint8).tolist() == [0, 1, 1, 1]


# --- Memory ---


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_is_held_once_and_a_small_view_alone(tmp_path: Path, form: str) -> None:
    n = 6_000_000
    store = storage("0", n)
    state = {
        "all": rebuilt(store, (n,)),
        "view": rebuilt(store, (10,), offset=n - 20),
        "turned": rebuilt(store, (2, n // 2), (1, 2)),
    }
    path = write(tmp_path / "x.bin", state, {"0": np.arange(n, dtype=np.float32)}, form)
    tracemalloc.start()
    try:
        file = TorchFile(path)
        for name, most in {"view": 5e6, "all": 4 * n + 5e6, "turned": 8 * n + 5e6}.items():
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            got = file.read(name)
            assert tracemalloc.get_traced_memory()[1] - before < most, name
            assert got[..., -1].tolist() == {"view": n - 11, "all": n - 1, "turned": [n - 2, n - 1]}[name]
            del got
    finally:
        tracemalloc.stop()


# --- Containers ---


def test_containers_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=r"x\.bin: .*" + message):
            TorchFile(path)

    refused("No such file")
    path.mkdir()
    refused("Is a directory")
    path.rmdir()
    for data, message in {
        b"": "it is empty",
        b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
        b"\x10\0\0\0\0\0\0\0{}": "is no PyTorch file",
        b"PK\x03\x04": "is damaged",
        whole({}): "none that torch.save wrote",
        whole(3) + b"x" * 99: "none that torch.save wrote",
        old_bytes(whole({}), {}, protocol=1002): "1001",
        old_bytes(whole({}), {}, little=False): "byte order",
        old_bytes(whole(one()), {}): "list of storages",
        old_bytes(whole({}), THREE): "list of storages",
        old_bytes(whole(one()), THREE)[:-1]: "cut short at storage",
        old_bytes(whole(one()), THREE)[:-12]: "cut short at storage",
    }.items():
        path.write_bytes(data)
        refused(message)
    write(path, one(), THREE, byteorder=b"big")
    refused("byte order is .*big")
    write(path, one(), {})
    refused("lacks the archive member .*data/0")
    for message, state in {"holds a list": [TENSOR], "holds a tensor": TENSOR, "holds a int": 5}.items():
        write(path, state, THREE)
        refused(message)
    write(path, {"state_dict": one(), "epoch": 1}, THREE)
    refused('the entry "state_dict" is a dict; expected a state dict')
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", b"")
    refused("has 0 members")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", whole({}))
        archive.writestr("b/data.pkl", whole({}))
    refused("has 2 members")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", whole({}))
        archive.writestr("a/data.pkl", whole({}))
    refused("same name")


def test_an_archive_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    """The directory alone says how large a member is; no allocation may follow from that word."""
    path = write(tmp_path / "x.bin", one(storage("0", 1 << 30), (1 << 30,)), THREE)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"any top/data/0") - 46
    for compression, compressed in ((0, 12), (0, 1 << 31), (8, 12)):
        struct.pack_into("<H", data, entry + 10, compression)
        struct.pack_into("<II", data, entry + 20, compressed, (1 << 32) - 4)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"data/0\" is cut short|0\" has"):
            TorchFile(path)


def test_a_tensor_that_is_not_there_and_a_file_that_went(tmp_path: Path) -> None:
    path = write(tmp_path / "x.bin", one(), THREE)
    file = TorchFile(path)
    with pytest.raises(CheckpointError, match=r'x\.bin: lacks the tensor "v"'):
        file.read("v")
    path.unlink()
    with pytest.raises(CheckpointError, match=r'x\.bin: the tensor "w": cannot be read: No such file'):
        file.read("w")


@pytest.mark.parametrize("form", ["zip", "deflated"])
def test_one_wrong_bit_in_a_tensor_is_found_also_outside_the_part_that_is_read(tmp_path: Path, form: str) -> None:
    values = np.random.default_rng(2).integers(0, 99, 3000).astype(np.float32)
    state = {"all": rebuilt(storage("0", 3000), (3000,)), "part": rebuilt(storage("0", 3000), (5,), offset=10)}
    path = write(tmp_path / "x.bin", state, {"0": values}, form)
    data = bytearray(path.read_bytes())
    data[data.index(b"any top/data/0") + 1000] ^= 1
    path.write_bytes(data)
    file = TorchFile(path)
    for name in ("all", "part"):
        with pytest.raises(CheckpointError, match=f'the tensor "{name}": is damaged'):
            file.read(name)


def damaged(data: bytes, n: int, seed: int) -> Any:
    rng = random.Random(seed)
    for trial in range(n):
        copy, place = bytearray(data), rng.randrange(len(data))
        match trial % 4:
            case 0:
                copy[place] ^= 1 << rng.randrange(8)
            case 1:
                copy[place] = rng.randrange(256)
            case 2:
                del copy[place:]
            case 3:
                copy[place : place + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
        yield bytes(copy)


@pytest.mark.parametrize("form", FORMS)
def test_damage_anywhere_ends_in_an_error_of_ours_or_does_no_harm(tmp_path: Path, form: str) -> None:
    want = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(5, dtype=np.int64)}
    state = {
        "a": rebuilt(storage("0", 12), (3, 4)),
        "b": rebuilt(storage("1", 5, "LongStorage"), (5,)),
        "n": 7,
    }
    path = write(tmp_path / "x.bin", state, {"0": want["a"], "1": want["b"]}, form)
    n_errors = n_sound = 0
    for data in damaged(path.read_bytes(), 600, seed=3):
        path.write_bytes(data)
        try:
            file = TorchFile(path)
            got = {name: file.read(name) for name in file.tensors}
        except CheckpointError as error:
            assert str(path) in str(error) and str(error).count("\n") <= 1
            n_errors += 1
            continue
        n_sound += 1
        for name, values in got.items():
            assert values.shape == file.tensors[name].shape and values.nbytes <= 1000
        if form != "old":  # which has no checksum
            assert list(got) == list(want)
            assert all(got[name].tobytes() == values.tobytes() for name, values in want.items())
    assert n_errors > 200 and n_sound > 5, (n_errors, n_sound)
