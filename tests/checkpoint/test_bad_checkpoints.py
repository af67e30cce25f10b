"""Damaged, incomplete and mixed-up v1 checkpoints: each is refused, the file is named, and nothing is touched."""

from __future__ import annotations

import dataclasses
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from v1_cases import TINY, is_truth, refused, snapshot

from legacy.generator import Truth, write_model_directory, write_v1
from legacy.npz import Member, write_npz
from mesh_transformer.checkpoint.convert import Conversion, convert
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.config.errors import CheckpointError, UserError

N_SHARDS = 8
Made = tuple[Path, Truth]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A full model directory; to be copied."""
    path = tmp_path_factory.mktemp("good") / "model"
    return path, write_model_directory(path, TINY, N_SHARDS, [1201], config=True)[1201]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step directories of other checkpoints: another step, a slim one, another architecture."""
    path = tmp_path_factory.mktemp("others")
    write_v1(path / "later", TINY, N_SHARDS, step=1301)
    write_v1(path / "counts", TINY, N_SHARDS, adam_count=5)
    write_v1(path / "slim", TINY, N_SHARDS, variant="slim")
    write_v1(path / "wider", dataclasses.replace(TINY, d_model=64), N_SHARDS)
    write_v1(path / "deeper", dataclasses.replace(TINY, layers=3), N_SHARDS)
    write_v1(path / "half", TINY, N_SHARDS, early_cast=True)
    write_v1(path / "four", TINY, 4)
    return path


@pytest.fixture
def model(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "model"))


def arrays_of(file: Path) -> list[np.ndarray]:
    with np.load(file) as found:
        return [found[f"arr_{i}"] for i in range(len(found.files))]


def rewrite(file: Path, change: Callable[[list[np.ndarray]], Any]) -> None:
    """Writes the file again with changed arrays, as the generator does."""
    arrays = arrays_of(file)
    changed = change(arrays)
    write_npz(file, [Member(a, a.dtype.str) for a in (arrays if changed is None else changed)])


def renamed(file: Path, old: str, new: str) -> None:
    """The same members, one of another name."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(new if name == old else name, data)


def check_refused(model: Path, *names: str) -> str:
    """Opening, or at the latest converting, is refused; no file anywhere is changed or made."""
    place = model.parent
    before = snapshot(place)

    def everything() -> None:
        convert(open_weights(model), place / "out", Conversion(to="native", with_optimizer=True))

    message = refused(everything, *names)
    assert snapshot(place) == before
    return message


def at(model: Path, shard: int, file: int) -> Path:
    return model / "step_1201" / f"shard_{shard}" / f"{file}.npz"


def take(model: Path, other: Path, *places: tuple[int, int]) -> None:
    for shard, file in places:
        shutil.copy(other / f"shard_{shard}" / f"{file}.npz", at(model, shard, file))


# ------------------------------------------------------------------------------------------------ missing


@pytest.mark.parametrize("shard", [0, 3, 7])
def test_a_missing_shard(model: Path, shard: int) -> None:
    shutil.rmtree(at(model, shard, 0).parent)
    check_refused(model, f"shard_{shard}", "missing")


def test_a_shard_too_many(model: Path) -> None:
    shutil.copytree(at(model, 0, 0).parent, at(model, 8, 0).parent)
    check_refused(model, "holds 9 shards", "those of 8", "shard_8")


@pytest.mark.parametrize(("shard", "file"), [(0, 0), (0, 15), (5, 7)])
def test_a_missing_file(model: Path, shard: int, file: int) -> None:
    at(model, shard, file).unlink()
    check_refused(model, str(at(model, shard, file)), "missing", "copy")


def test_a_directory_in_place_of_a_file(model: Path) -> None:
    at(model, 2, 2).unlink()
    at(model, 2, 2).mkdir()
    check_refused(model, str(at(model, 2, 2)))


def test_no_shards_at_all(model: Path) -> None:
    for shard in range(N_SHARDS):
        shutil.rmtree(at(model, shard, 0).parent)
    check_refused(model, "step_1201", "shard_0")


# ------------------------------------------------------------------------------------------------ damaged


@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize(("shard", "file"), [(0, 4), (6, 11)])
def test_a_file_cut_short(model: Path, shard: int, file: int, left: float) -> None:
    data = at(model, shard, file).read_bytes()
    at(model, shard, file).write_bytes(data[: int(left * len(data))])
    check_refused(model, str(at(model, shard, file)), "copy it again")


@pytest.mark.parametrize("text", [b"not found", b"<html>404</html>" * 100, b"\0" * 4096, b"PK\x05\x06" + b"\0" * 18])
def test_a_file_that_is_something_else(model: Path, text: bytes) -> None:
    at(model, 1, 6).write_bytes(text)
    check_refused(model, str(at(model, 1, 6)))


def fuzz(model: Path, n: int) -> None:
    """One changed byte is refused, or changes no value; nothing but a CheckpointError is ever raised."""
    rng = random.Random(n)
    good_file, truth = at(model, 3, 12), None
    good = good_file.read_bytes()
    for _ in range(n):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] = rng.randrange(256)
        good_file.write_bytes(bad)
        try:
            weights = open_weights(model)
            found = [weights.read(piece).tobytes() for piece in weights.order()]
        except CheckpointError as error:
            assert str(good_file) in str(error) and str(error).count("\n") <= 1
            continue
        if truth is None:
            good_file.write_bytes(good)
            whole = open_weights(model)
            truth = [whole.read(piece).tobytes() for piece in whole.order()]
        assert found == truth


def test_changed_bytes(model: Path) -> None:
    fuzz(model, 40)


@pytest.mark.long
def test_many_changed_bytes(model: Path) -> None:
    fuzz(model, 2000)


@pytest.mark.parametrize("where", ["params", "moments"])
def test_a_flipped_bit_in_the_values(model: Path, where: str) -> None:
    file = at(model, 4, 13 if where == "params" else 2)
    data = bytearray(file.read_bytes())
    # The last array of some size: behind its header, within its values.
    data[bytes(data).rindex(b"\x93NUMPY") - 200] ^= 16
    file.write_bytes(data)
    check_refused(model, str(file), "damaged", "copy it again")


# ------------------------------------------------------------------------------------------------ mixed up


def test_shards_of_different_steps(model: Path, others: Path) -> None:
    take(model, others / "later", *[(2, file) for file in range(16)])
    check_refused(model, str(at(model, 2, 15)), "step is 1301, but 1201 in shard_0", "different steps")


def test_shards_of_different_counts(model: Path, others: Path) -> None:
    take(model, others / "counts", *[(2, file) for file in range(16)])
    check_refused(model, str(at(model, 2, 0)), "Adam's count is 5, but 901 in shard_0")


@pytest.mark.parametrize("other", ["slim", "wider", "deeper", "half", "four"])
@pytest.mark.parametrize(("shard", "file"), [(0, 12), (3, 12), (7, 11)])
def test_a_file_of_another_checkpoint(model: Path, others: Path, other: str, shard: int, file: int) -> None:
    shutil.copy(others / other / f"shard_{shard % 4}" / f"{file}.npz", at(model, shard, file))
    # What shard_0 has is the measure for the others; with it the architecture itself is in doubt.
    check_refused(model, "step_1201", *([] if shard == 0 else [f"shard_{shard}/{file}.npz"]))


def test_one_shard_of_a_slim_checkpoint(model: Path, others: Path) -> None:
    take(model, others / "slim", *[(5, file) for file in range(16)])
    check_refused(model, "shard_5/")


def test_files_exchanged_within_a_shard(model: Path) -> None:
    a, b = at(model, 1, 3), at(model, 1, 4)
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    check_refused(model, "shard_1/3.npz")


# ------------------------------------------------------------------------------------------------ strange


@pytest.mark.parametrize(
    ("old", "new"), [("arr_0.npy", "arr_99.npy"), ("arr_1.npy", "../arr_1.npy"), ("arr_0.npy", "x")]
)
def test_a_member_of_another_name(model: Path, old: str, new: str) -> None:
    renamed(at(model, 1, 8), old, new)
    check_refused(model, str(at(model, 1, 8)), new, "expected arr_0.npy to")


def test_a_member_that_is_there_twice(model: Path) -> None:
    file = at(model, 1, 8)
    with pytest.warns(UserWarning, match="Duplicate"):
        renamed(file, "arr_1.npy", "arr_0.npy")
    check_refused(model, str(file), "expected arr_0.npy to")


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_pickled_objects_are_never_opened(model: Path, tmp_path: Path) -> None:
    file = at(model, 0, 9)
    objects = np.empty((1,), object)
    objects[0] = Trap(tmp_path / "sprung")
    arrays: list[np.ndarray] = arrays_of(file)
    arrays[1] = objects
    with file.open("wb") as out:
        np.savez(out, *arrays)
    check_refused(model, str(file), "arr_1", "Python objects", "refused")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.complex64, np.uint8, ">f4", "U3"])
def test_a_dtype_that_the_original_never_wrote(model: Path, dtype: Any) -> None:
    file = at(model, 0, 12)
    rewrite(file, lambda arrays: [arrays[0].astype(dtype), *arrays[1:]])
    check_refused(model, str(file), "arr_0", "none of the original's")


def test_an_array_stored_by_columns(model: Path) -> None:
    file = at(model, 0, 12)
    i = next(i for i, a in enumerate(arrays_of(file)) if a.ndim == 2)
    arrays = arrays_of(file)
    arrays[i] = np.asfortranarray(arrays[i])
    with file.open("wb") as out:
        np.savez(out, *arrays)
    check_refused(model, str(file), f"arr_{i}", "column by column")


def test_a_counter_below_zero(model: Path) -> None:
    for shard in range(N_SHARDS):
        rewrite(at(model, shard, 15), lambda arrays: [*arrays[:-1], np.array(-1, np.int32)])
    check_refused(model, str(at(model, 0, 15)), "step is -1")


def test_a_header_of_great_depth_or_size(model: Path) -> None:
    file = at(model, 2, 10)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for text in (b"(" * 5000, b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999999999999,)}"):
        bad = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, bad if name == "arr_0.npy" else data)
        check_refused(model, str(file))


def test_compressed_members_are_read_all_the_same(model: Path, made: Made) -> None:
    for file in model.rglob("*.npz"):
        arrays = arrays_of(file)
        with file.open("wb") as out:
            np.savez_compressed(out, *arrays)
    is_truth(open_weights(model), made[1])


def test_other_entries_in_the_directory_do_not_matter(model: Path, made: Made) -> None:
    (model / "step_1201" / "shard_00").mkdir()
    (model / "step_1201" / "README").write_text("by whoever")
    (model / "step_1201" / "shard_0" / "16.npz").write_bytes(b"")
    is_truth(open_weights(model), made[1])


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    for name in ("empty", "file.txt", "absent"):
        refused(lambda: open_weights(tmp_path / name), name, error=UserError)  # noqa: B023
