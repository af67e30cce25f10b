"""Hostile PyTorch files: nothing that they say is run, and nothing that they claim is believed."""

from __future__ import annotations

import collections
import itertools
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint.torch_bytes import (
    ORDERED,
    STORE,
    TENSOR,
    THREE,
    Raw,
    called,
    emit,
    found,
    one,
    rebuilt,
    storage,
    write,
)
from mesh_transformer.checkpoint import torch_pickle
from mesh_transformer.checkpoint.torch_file import TorchFile
from mesh_transformer.config.errors import CheckpointError


class Runs:
    """What pickle.loads would run; `state` goes through the instruction BUILD."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = function, arguments, state

    def __reduce__(self) -> Any:
        return self.reduced


def hostile(sentinel: Path) -> dict[str, Any]:
    shell = Runs(os.system, f"touch '{sentinel}'")
    code = f"__import__('pathlib').Path({str(sentinel)!r}).touch()"
    return {
        "called": shell,
        "eval": Runs(eval, code),
        "exec": Runs(exec, code),
        "mkdir": Runs(os.mkdir, str(sentinel)),
        "among tensors": {"w": 1, "v": [shell, shell]},
        "an argument": Runs(collections.OrderedDict, [["a", shell]]),
        "built into an OrderedDict": Runs(collections.OrderedDict, state={"x": shell}),
        "a key": {shell: 1},
    }


@pytest.mark.parametrize("case", hostile(Path("x")))
@pytest.mark.parametrize("form", ["zip", "old"])
def test_programs_are_refused_and_nothing_runs(tmp_path: Path, form: str, case: str) -> None:
    sentinel = tmp_path / "it ran"
    for protocol in range(6):
        data = pickle.dumps(hostile(sentinel)[case], protocol)
        path = write(tmp_path / "x.bin", (b"\x80\x02" if protocol < 2 else b"") + data, {}, form)
        with pytest.raises(CheckpointError, match=r"x\.bin: .*; refused, nothing was run") as caught:
            TorchFile(path)
        assert str(caught.value).count("\n") <= 1
        if protocol >= 2 and case != "an argument":
            assert any(f"holds {module}." in str(caught.value) for module in ("posix", "builtins", "__builtin__"))
        assert not sentinel.exists()
    pickle.loads(data)  # the proof that it would have run
    assert sentinel.exists()


GLOBALS = [
    ("torch", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.storage", "UntypedStorage"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch.nn.modules.linear", "Linear"),
    ("collections", "Counter"),
    ("collections.OrderedDict", "fromkeys"),
    ("torch", "FloatStorage.from_file"),
    ("torch", "a" * 100 + "Storage"),
    ("os", "Storage"),
]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("module", "name"), GLOBALS)
def test_other_globals_are_refused_by_name(tmp_path: Path, module: str, name: str, stacked: bool) -> None:
    word = Raw(emit(module) + emit(name) + b"\x93") if stacked else found(module, name)
    with pytest.raises(CheckpointError, match=f"holds {module}\\.{name[:20]}") as caught:
        TorchFile(write(tmp_path / "x.bin", {"w": called(word, "x")}, {}))
    assert "nothing was run" in str(caught.value) and len(str(caught.value).splitlines()[0]) < 300


CLASS = found("torch._utils", "_rebuild_tensor_v2")
STRANGE = {
    "BUILD on a function": Raw(CLASS + emit((None, {"__code__": 1})) + b"b"),
    "BUILD on a tensor": Raw(TENSOR + emit({"shape": (9,)}) + b"b"),
    "BUILD on a storage kind": Raw(found("torch", "FloatStorage") + emit({"n": 9}) + b"b"),
    "an instance made by NEWOBJ": Raw(found("collections", "OrderedDict") + b")\x81"),
    "an instance made by INST": Raw(b"(icollections\nOrderedDict\n"),
    "an instance made by OBJ": Raw(b"(" + found("collections", "OrderedDict") + b"o"),
    "an extension": Raw(b"\x82\x01"),
    "a persistent identity as text": Raw(b"Pstorage\n"),
    "a called string": Raw(emit("w") + b")R"),
    "a called tensor": Raw(TENSOR + b")R"),
    "an OrderedDict of items": called(found("collections", "OrderedDict"), [["a", 1]]),
    "a storage kind that is called": called(found("torch", "FloatStorage"), 5),
    "a parameter of no tensor": called(found("torch._utils", "_rebuild_parameter"), 1, True, ORDERED),
    "a tensor of no storage": called(CLASS, "0", 0, (3,), (1,), False, ORDERED),
    "too few arguments": called(CLASS, STORE, 0, (3,)),
    "too many arguments": called(CLASS, STORE, 0, (3,), (1,), False, ORDERED, {}, 1),
    "arguments in a list": Raw(CLASS + emit([STORE, 0]) + b"R"),
    "a module": Raw(emit(("module", "a", "b", "c", "d")) + b"Q"),
    "a short identity": Raw(emit(("storage", found("torch", "FloatStorage"), "0")) + b"Q"),
    "an identity in a list": Raw(emit(["storage", found("torch", "FloatStorage"), "0", "cpu", 3]) + b"Q"),
    "a storage of class dict": Raw(emit(("storage", found("collections", "OrderedDict"), "0", "cpu", 3)) + b"Q"),
    "a storage kind in words": Raw(emit(("storage", "torch.FloatStorage", "0", "cpu", 3)) + b"Q"),
    "a number as key": storage(0, 3),
    "-1 values": storage("0", -1),
    "2**63 values": storage("0", 1 << 63),
    "True values": storage("0", True),
    "a view of a storage": storage("0", 3, "FloatStorage", ("1", 0, 2)),
    "one storage, two sizes": (STORE, storage("0", 2)),
    "one storage, two kinds": (STORE, storage("0", 3, "IntStorage")),
    "a dict with a tuple for a key": {("a",): 1},
    "a dict with a huge key": {1 << 40: 1},
    "a bytearray": Raw(b"\x96" + struct.pack("<Q", 1) + b"x"),
    "a set": Raw(b"\x8f"),
}


@pytest.mark.parametrize("case", STRANGE)
@pytest.mark.parametrize("form", ["zip", "old"])
def test_strange_instructions_are_refused(tmp_path: Path, case: str, form: str) -> None:
    with pytest.raises(CheckpointError, match=r"x\.bin: (?!is damaged)"):
        TorchFile(write(tmp_path / "x.bin", {"w": STRANGE[case]}, THREE, form))


MISFITS = {
    "longer": ((4,), (1,), 0),
    "pushed out": ((3,), (1,), 1),
    "offset beyond": ((1,), (1,), 3),
    "huge offset": ((1,), (1,), (1 << 63) - 1),
    "huge stride": ((2,), ((1 << 63) - 1,), 0),
    "wrapping stride": ((3,), (1 << 62,), 0),
    "negative stride": ((3,), (-1,), 2),
    "negative offset": ((1,), (1,), -1),
    "negative shape": ((-1,), (1,), 0),
    "two negatives": ((-1, -3), (1, 1), 0),
    "stride of nothing": ((1 << 40,), (0,), 0),
    "stride of nothing twice": ((2, 2), (1, 0), 0),
    "huge": ((1 << 31, 1 << 31), (1, 1), 0),
    "huge without values": ((0, 1 << 62, 1 << 62), (1, 1, 1), 0),
    "65 axes": ((1,) * 65, (1,) * 65, 0),
    "strides of another rank": ((3,), (1, 1), 0),
    "no strides": ((3,), None, 0),
    "a list": ([3], [1], 0),
    "a fraction": ((3.0,), (1,), 0),
    "a bool": ((True,), (1,), 0),
    "a bool offset": ((1,), (1,), True),
    "a text": ("3", "1", 0),
    "a tensor inside": ((TENSOR,), (1,), 0),
    "a huge number": ((1 << 600,), (1,), 0),
}


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_tensor_that_leaves_its_storage_is_refused_by_name(tmp_path: Path, case: str, form: str) -> None:
    shape, strides, offset = MISFITS[case]
    made = called(CLASS, STORE, offset, shape, strides, False, ORDERED)
    with pytest.raises(CheckpointError, match=r'x\.bin: the tensor "h\.0\.w" ') as caught:
        TorchFile(write(tmp_path / "x.bin", {"h.0.w": made}, THREE, form))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("form", ["zip", "old"])
@pytest.mark.parametrize("n", [2, 4, 1 << 40, (1 << 63) - 1])
def test_a_storage_of_another_size_than_claimed_is_refused(tmp_path: Path, form: str, n: int) -> None:
    with pytest.raises(CheckpointError, match=r"x\.bin: "):
        TorchFile(write(tmp_path / "x.bin", one(storage("0", n), (2,)), THREE, form))


@pytest.mark.parametrize("form", ["zip", "old"])
def test_an_unknown_kind_is_refused_by_the_tensors_name(tmp_path: Path, form: str) -> None:
    state = {"a": TENSOR, "b.c": rebuilt(storage("1", 3, "ComplexFloatStorage"), (3,))}
    with pytest.raises(CheckpointError, match=r'"b\.c" lies in a torch\.ComplexFloatStorage; only these .*BFloat16'):
        TorchFile(write(tmp_path / "x.bin", state, THREE | {"1": np.zeros(3, np.complex64)}, form))


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    doubled = Raw(b")" + b"2\x86" * 10_000)  # each tuple holds the last one twice: to hash or copy it never ends
    bombs = {
        "a list": doubled,
        "deep": Raw(b"]" * 200_000 + b"a" * 199_999),
        "a key": Raw(b"}" + doubled + b"Ns"),
        "a shape": called(CLASS, STORE, 0, doubled, (1,), False, ORDERED),
        "an offset": called(CLASS, STORE, doubled, (1,), (1,), False, ORDERED),
        "a place": Raw(emit(("storage", found("torch", "FloatStorage"), "0", "cpu", 3, doubled)) + b"Q"),
        "a text of 2 GB": Raw(b"X\xff\xff\xff\x7f"),
        "a number of 2 GB": Raw(b"\x8b\xff\xff\xff\x7f"),
    }
    for bomb, form in itertools.product(bombs.values(), ["zip", "old"]):
        with pytest.raises(CheckpointError):
            TorchFile(write(path, {"w": bomb}, THREE, form))
    with pytest.raises(CheckpointError, match=r"data\.pkl\" has 67,108,865 bytes; expected at most"):
        TorchFile(write(path, bytes((64 << 20) + 1), {}, "deflated"))
    monkeypatch.setattr(torch_pickle, "_MAX_STEPS", 1000)
    with pytest.raises(CheckpointError, match="too long for a state dict"):
        TorchFile(write(path, Raw(b"N" * 1000), {}))
