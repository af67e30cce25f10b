"""Planted faults of places, disks and ports; and that a place is left as it was."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from doctor_cases import check, everything
from fsspec.implementations.memory import MemoryFileSystem

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.doctor.ports import check_coordinator, check_port
from mesh_transformer.doctor.storage import check_compile_cache, check_place


def test_a_place_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    before = everything(tmp_path)
    (there,) = check_place("storage", str(tmp_path / "there"))
    (absent,) = check_place("storage", str(tmp_path / "a" / "b"))
    assert there.status == absent.status == "ok"
    assert f"{tmp_path / 'there'}: written at" in there.message
    assert f"{tmp_path}, where {tmp_path / 'a' / 'b'} would be made" in absent.message
    assert everything(tmp_path).keys() == before.keys()


def test_a_file_where_a_directory_must_be(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    (found,) = check_place("storage", str(tmp_path / "runs" / "tiny"), "or set log.directory")
    check(found, "failed", f"{tmp_path / 'runs'} is a file", mend=f"move {tmp_path / 'runs'} out of the way")
    assert found.mend.endswith("or set log.directory")


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "away")
    (found,) = check_place("storage", str(tmp_path / "runs"))
    check(found, "failed", "a link that leads nowhere", mend="out of the way")


@pytest.mark.parametrize(
    ("number", "mend"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "mount it for writing"), (errno.EACCES, "chown")],
    ids=["full", "read-only", "denied"],
)
def test_a_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, mend: str
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    (found,) = check_place("storage", str(tmp_path))
    check(found, "failed", str(tmp_path), "writing a file failed", os.strerror(number), mend=mend)
    assert not list(tmp_path.iterdir())


def test_a_directory_in_which_nothing_can_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        (found,) = check_place("storage", str(tmp_path))
    check(found, "failed", "deleting a file failed", "is left", mend="chown")


def test_a_disk_that_gives_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"other")
    (found,) = check_place("storage", str(tmp_path))
    check(found, "failed", "not what was written", mend="do not use")
    assert not list(tmp_path.iterdir())


class _Bucket(MemoryFileSystem):
    """A bucket in memory that refuses one kind of call."""

    protocol = "bucket"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refuses = ""

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self._refuse("write")
        super().pipe_file(path, value, **options)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        self._refuse("read")
        return super().cat_file(path, *arguments, **options)

    def rm_file(self, path: str) -> None:
        self._refuse("delete")
        super().rm_file(path)

    def _refuse(self, what: str) -> None:
        if what == _Bucket.refuses:
            _Bucket.refuses = ""
            raise PermissionError(errno.EACCES, "no right to do that")


fsspec.register_implementation("bucket", _Bucket, clobber=True)


@pytest.mark.parametrize(("refuses", "doing"), [("write", "writing"), ("read", "reading back"), ("delete", "deleting")])
def test_a_bucket_that_refuses(monkeypatch: pytest.MonkeyPatch, refuses: str, doing: str) -> None:
    monkeypatch.setattr(_Bucket, "refuses", refuses)
    (found,) = check_place("storage", "bucket://runs/mine")
    check(found, "failed", "bucket://runs/mine", f"{doing} a file failed", "no right", mend="rights of the account")
    assert not _Bucket.store  # nothing stays behind


def test_a_bucket_is_left_as_it_was() -> None:
    system = fsspec.filesystem("memory")
    before = system.find("/", withdirs=True)
    (found,) = check_place("storage", "memory://kept/runs")
    assert found.status == "ok" and "memory://kept/runs: written at" in found.message
    assert system.find("/", withdirs=True) == before


def test_an_address_that_nothing_can_open() -> None:
    (found,) = check_place("storage", "nowhere://bucket")
    check(found, "failed", "nowhere", mend="address")


def test_a_compile_cache_that_cannot_be_written(tmp_path: Path, own_cache: Path) -> None:
    assert next(check_compile_cache({})).status == "ok" and not own_cache.exists()
    own_cache.touch()
    check(next(check_compile_cache({})), "warning", "is a file", "compiles anew", mend="MESH_TRANSFORMER_CACHE")
    given = {"JAX_COMPILATION_CACHE_DIR": str(own_cache / "xla")}
    check(next(check_compile_cache(given)), "warning", mend="JAX_COMPILATION_CACHE_DIR")


# -------------------------------------------------------------------------------------------------------------- ports


def test_a_port_in_use() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        check(next(check_port(port)), "failed", "in use", mend="another --port")
        variables = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "0",
        }
        check(next(check_coordinator(variables)), "failed", "in use", mend="JAX_COORDINATOR_ADDRESS another port")
        away = variables | {"JAX_PROCESS_ID": "1"}
        assert next(check_coordinator(away)).status == "ok"
    assert next(check_port(port)).status == "ok"


def test_an_address_of_another_machine() -> None:
    # 192.0.2.0/24 is kept for documents and is nobody's.
    check(next(check_port(8000, "192.0.2.1")), "failed", "cannot be listened at", mend="--port")


def test_a_coordinator_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    variables = {"JAX_COORDINATOR_ADDRESS": "head:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    check(next(check_coordinator(variables)), "failed", "head is not known here", mend="JAX_COORDINATOR_ADDRESS")


def test_half_a_coordinator() -> None:
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID not set"):
        next(check_coordinator({"JAX_COORDINATOR_ADDRESS": "head:8476", "JAX_NUM_PROCESSES": "2"}))
    assert not list(check_coordinator({}))
