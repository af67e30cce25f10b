"""`manifest.json`: size and sha256 of every file of a directory, so that damage is found before it is used.

Any change of a single bit is found: in a listed file by its sha256, in the manifest itself because only the one text
that `write_manifest` would write for its entries is accepted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.files import write_atomically

MANIFEST = "manifest.json"
_FORMAT = {"format": "mesh-transformer manifest", "version": 1}
_MAX_THREADS = 16


def write_manifest(directory: str | os.PathLike[str]) -> None:
    """Writes `manifest.json` for the files that are under `directory` now.

    The file is {"format", "version", "files": [{"path", "sha256", "size"}]}: paths relative to `directory` with "/"
    and in byte order, sha256 in lower-case hexadecimal, size in bytes. Write it last.

    Raises:
        OSError: a file could not be read, or the manifest not written.
    """
    directory = Path(directory)
    names = [name for name in _files_under(directory) if name != MANIFEST]
    entries = [
        {"path": name, "sha256": sha256, "size": (directory / name).stat().st_size}
        for name, sha256 in zip(names, hashes(directory, names), strict=True)
    ]
    write_atomically(directory / MANIFEST, _text(entries))


def verify(directory: str | os.PathLike[str], *, sums_up_to: int | None = None) -> None:
    """Returns if the directory holds exactly the files of its manifest, byte for byte.

    Args:
        sums_up_to: of larger files, in bytes, the size alone is compared; `verify_file` does the rest.

    Raises:
        CheckpointError: it does not; the message names the first bad file and what is wrong with it.
    """
    directory = Path(directory)
    entries = _read(directory)
    present = set(_files_under(directory)) - {MANIFEST}
    listed = [entry["path"] for entry in entries]
    for name in sorted(present.symmetric_difference(listed), key=os.fsencode):
        if name not in present:
            raise CheckpointError(f"{directory / name}: missing, though {MANIFEST} lists it")
        raise CheckpointError(f"{directory / name}: unexpected, {MANIFEST} does not list it")
    try:
        for entry in entries:
            size = (directory / entry["path"]).stat().st_size
            if size != entry["size"]:
                raise CheckpointError(f"{directory / entry['path']}: {size} bytes, but {MANIFEST} says {entry['size']}")
        summed = [entry for entry in entries if sums_up_to is None or entry["size"] <= sums_up_to]
        for entry, sha256 in zip(summed, hashes(directory, [entry["path"] for entry in summed]), strict=True):
            if sha256 != entry["sha256"]:
                raise CheckpointError(f"{directory / entry['path']}: damaged, its sha256 differs from {MANIFEST}'s")
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: cannot be read ({error.strerror})") from error


def verify_file(directory: Path, name: str) -> None:
    """Returns if one file, by its name in the manifest, is byte for byte as that says. Raises as `verify`."""
    expected = {entry["path"]: entry["sha256"] for entry in _read(directory)}
    try:
        if _sha256(directory / name) != expected.get(name):
            raise CheckpointError(f"{directory / name}: damaged, its sha256 differs from {MANIFEST}'s")
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: cannot be read ({error.strerror})") from error


def _text(entries: list[dict[str, Any]]) -> bytes:
    return (json.dumps(_FORMAT | {"files": entries}, indent=1) + "\n").encode()


def _read(directory: Path) -> list[dict[str, Any]]:
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the save that began here was not finished") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        entries = json.loads(data)["files"]
        keys_are_right = all(set(entry) == {"path", "sha256", "size"} for entry in entries)
        well_formed = keys_are_right and _text(entries) == data
    except (ValueError, TypeError, KeyError, RecursionError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(f"{path}: damaged, it is not as a manifest is written")
    return entries


def _files_under(directory: Path) -> list[str]:
    """Relative names of everything that is no directory, in byte order."""
    found = [Path(parent, name) for parent, _, names in os.walk(directory) for name in names]
    return sorted((path.relative_to(directory).as_posix() for path in found), key=os.fsencode)


def hashes(directory: Path, names: Iterable[str]) -> Iterable[str]:
    """sha256 of each file in order; hashlib lets go of the interpreter, so threads help."""
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda name: _sha256(directory / name), names)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
