"""The original's shards in .tar, .tar.gz and .tar.zst: read where they lie, in as few passes as the order allows."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from v1_cases import TINY, is_truth, refused, snapshot

from legacy.generator import Truth, write_config, write_meta, write_v1
from mesh_transformer.checkpoint.convert import Conversion, convert
from mesh_transformer.checkpoint.legacy import archive as archive_module
from mesh_transformer.checkpoint.legacy.archive import ArchiveFiles
from mesh_transformer.checkpoint.logical import fingerprint
from mesh_transformer.checkpoint.models import open_weights

N_SHARDS = 4
SUFFIXES = (".tar", ".tar.gz", ".tar.zst")
ORDERS: dict[str, Callable[[Path], Any]] = {
    "shard-major": lambda file: (file.parent.name, int(file.stem)),
    "file-major": lambda file: (int(file.stem), file.parent.name),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """step_1201 of a full checkpoint, to be read only."""
    path = tmp_path_factory.mktemp("source")
    return path / "step_1201", write_v1(path / "step_1201", TINY, N_SHARDS, style="unequal")


def packed(step: Path, order: str = "shard-major", top: str = "step_1201/") -> bytes:
    """The .tar of a step directory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for file in sorted(step.rglob("*.npz"), key=ORDERS[order]):
            tar.add(file, f"{top}{file.parent.name}/{file.name}")
    return out.getvalue()


def compressed(tar: bytes, suffix: str) -> bytes:
    if suffix == ".tar.zst":
        return zstandard.ZstdCompressor(level=1).compress(tar)
    return gzip.compress(tar, 1) if suffix == ".tar.gz" else tar


def put(directory: Path, data: bytes, suffix: str = ".tar") -> Path:
    """The archive as a file, with its configuration beside it."""
    directory.mkdir(exist_ok=True)
    write_config(directory / "config.json", TINY.config(N_SHARDS))
    (directory / f"step_slim{suffix}").write_bytes(data)
    return directory / f"step_slim{suffix}"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """One entry for each time that an archive is read from its beginning."""
    found: list[Path] = []
    original = ArchiveFiles._stream

    def counted(self: ArchiveFiles, is_wanted: Any) -> Any:
        found.append(self.path)
        return original(self, is_wanted)

    monkeypatch.setattr(ArchiveFiles, "_stream", counted)
    return found


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_is_its_directory(tmp_path: Path, made: tuple[Path, Truth], suffix: str, order: str) -> None:
    path = put(tmp_path / "in", compressed(packed(made[0], order), suffix), suffix)
    before = snapshot(tmp_path)
    weights = open_weights(path)
    assert (weights.format, weights.where, weights.n_shards) == ("legacy", path, N_SHARDS)  # type: ignore[attr-defined]
    is_truth(weights, made[1])
    write_config(tmp_path / "given.json", TINY.config(N_SHARDS))
    directory = open_weights(made[0], config=str(tmp_path / "given.json"))
    assert fingerprint(weights) == fingerprint(directory)
    (tmp_path / "given.json").unlink()
    assert snapshot(tmp_path) == before
    assert open_weights(path, step=1201).step == 1201
    refused(lambda: open_weights(path, step=1), str(path), "holds step 1201, not 1")


@pytest.mark.parametrize("top", ["", "./", "some/where/step_9/"])
def test_members_may_lie_anywhere(tmp_path: Path, made: tuple[Path, Truth], top: str) -> None:
    is_truth(open_weights(put(tmp_path, packed(made[0], top=top))), made[1])


def test_what_else_an_archive_holds_is_left_alone(tmp_path: Path, made: tuple[Path, Truth]) -> None:
    out = io.BytesIO(packed(made[0]))
    with tarfile.open(fileobj=out, mode="a") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped"), io.BytesIO())
        link = tarfile.TarInfo("shard_0/99.npz")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    is_truth(open_weights(put(tmp_path, out.getvalue())), made[1])
    assert not (tmp_path.parent / "escaped").exists()


def test_several_compressed_frames(tmp_path: Path, made: tuple[Path, Truth]) -> None:
    tar = packed(made[0])
    parts = [compressed(tar[i : i + 100_000], ".tar.zst") for i in range(0, len(tar), 100_000)]
    assert len(parts) > 2
    is_truth(open_weights(put(tmp_path, b"".join(parts), ".tar.zst")), made[1])


# ------------------------------------------------------------------------------------------------ passes and memory


@pytest.mark.parametrize(("order", "n_passes"), [("file-major", 2), ("shard-major", 17)])
def test_how_often_an_archive_is_read(
    tmp_path: Path,
    made: tuple[Path, Truth],
    order: str,
    n_passes: int,
    monkeypatch: pytest.MonkeyPatch,
    passes: list[Path],
) -> None:
    monkeypatch.setattr(archive_module, "_KEPT", 1)  # nothing but the shards of one file
    weights = open_weights(put(tmp_path, packed(made[0], order)))
    assert len(passes) == 1  # headers and counters
    # From the first file to the last, as the leaves lie there.
    files, most = weights._files, 0  # type: ignore[attr-defined]
    for file in range(16):
        for shard in range(N_SHARDS):
            files.open(shard, file)
            most = max(most, len(files._kept))
    assert most == N_SHARDS and len(passes) == n_passes
    is_truth(weights, made[1])


def test_a_window_that_holds_all_needs_one_more_pass(
    tmp_path: Path, made: tuple[Path, Truth], passes: list[Path]
) -> None:
    weights = open_weights(put(tmp_path, packed(made[0])))
    is_truth(weights, made[1])
    fingerprint(weights)
    assert len(passes) == 2


@pytest.mark.parametrize("kept", [1, 200_000])
def test_a_conversion_through_a_small_window(
    tmp_path: Path, made: tuple[Path, Truth], kept: int, monkeypatch: pytest.MonkeyPatch, passes: list[Path]
) -> None:
    monkeypatch.setattr(archive_module, "_KEPT", kept)
    weights = open_weights(put(tmp_path / "in", compressed(packed(made[0]), ".tar.zst"), ".tar.zst"))
    facts = convert(weights, tmp_path / "native", Conversion(to="native", with_optimizer=True))
    given = str(tmp_path / "in" / "config.json")
    assert facts["target"]["digest"] == fingerprint(open_weights(made[0], config=given)).digest
    is_truth(open_weights(tmp_path / "native"), made[1])
    assert len(passes) > 2


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("left", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_cut_short(tmp_path: Path, made: tuple[Path, Truth], suffix: str, left: float) -> None:
    data = compressed(packed(made[0]), suffix)
    if suffix == ".tar":
        data = data.rstrip(b"\0")  # what a .tar ends with is not missed
    path = put(tmp_path, data[: int(left * len(data))], suffix)
    before = snapshot(tmp_path)
    refused(lambda: open_weights(path), str(path))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_changed_byte_is_found(tmp_path: Path, made: tuple[Path, Truth], suffix: str) -> None:
    """At the latest when the values are read; a .tar's own headers apart, all bytes count."""
    data = bytearray(compressed(packed(made[0]), suffix))
    at = bytes(data).index(b"\x93NUMPY") + 800 if suffix == ".tar" else len(data) // 2
    data[at] ^= 1
    path = put(tmp_path, bytes(data), suffix)
    refused(lambda: is_truth(open_weights(path), made[1]), str(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("data", [b"", b"no archive at all" * 100, b"\0" * 10240])
def test_what_is_no_archive(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = put(tmp_path, data, suffix)
    refused(lambda: open_weights(path), str(path))


def rebuilt(step: Path, change: Callable[[dict[str, bytes]], Any]) -> bytes:
    """A .tar of changed contents, name -> bytes."""
    files = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in sorted(step.rglob("*.npz"))}
    change(files)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"step_1201/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def drop(files: dict[str, bytes], prefix: str) -> None:
    for name in [name for name in files if name.startswith(prefix)]:
        del files[name]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda files: drop(files, "shard_2/"), ["shard_2", "missing"]),
        (lambda files: drop(files, "shard_3/"), ["holds 3 shards", "those of 4", "shard_3"]),
        (lambda files: drop(files, "shard_1/7."), ["lacks shard_1/7.npz"]),
        (lambda files: files.update({"shard_1/7.npz": b""}), ["step_1201/shard_1/7.npz", "damaged"]),
        (lambda files: files.update({"shard_1/7.npz": files["shard_1/7.npz"][:-9]}), ["step_1201/shard_1/7.npz"]),
        (lambda files: files.update({"shard_1/7.npz": files["shard_1/0.npz"]}), ["step_1201/shard_1/7.npz"]),
        (lambda files: files.update({"x/shard_1/7.npz": b""}), ["holds step_1201/shard_1/7.npz and step_1201/x/shard"]),
        (lambda files: files.clear(), ["holds no shard_0"]),
    ],
)
def test_files_that_are_missing_or_wrong(
    tmp_path: Path, made: tuple[Path, Truth], change: Callable[[dict[str, bytes]], Any], names: list[str]
) -> None:
    path = put(tmp_path, rebuilt(made[0], change))
    refused(lambda: open_weights(path), str(path), *names)


def test_an_archive_that_changes_meanwhile(tmp_path: Path, made: tuple[Path, Truth]) -> None:
    path = put(tmp_path, packed(made[0]))
    weights = open_weights(path)
    path.write_bytes(rebuilt(made[0], lambda files: drop(files, "shard_1/7.")))
    refused(lambda: fingerprint(weights), str(path), "changed while it was read")
    # Asked again, by another thread perhaps, for what did not come.
    refused(lambda: weights._files.open(1, 7), str(path), "changed while it was read")  # type: ignore[attr-defined]
    path.unlink()
    refused(lambda: fingerprint(weights), str(path))


def test_a_meta_beside_an_archive_is_not_asked(tmp_path: Path, made: tuple[Path, Truth]) -> None:
    path = put(tmp_path, packed(made[0]))
    write_meta(tmp_path / "meta.json", [5])
    is_truth(open_weights(path), made[1])
