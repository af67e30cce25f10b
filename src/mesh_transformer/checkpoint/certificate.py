"""`conversion.json`: what a conversion made of what, and the sha256 of every file that it wrote.

Where it lies beside a model, the model's files are checked against it before they are used, so that damage is found in
formats that have no checksum of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.checkpoint.manifest import hashes
from mesh_transformer.config.errors import CheckpointError

CERTIFICATE = "conversion.json"
_FORMAT = {"format": "mesh-transformer conversion", "version": 1}


def write_certificate(directory: Path, facts: Mapping[str, Any], files: list[str]) -> None:
    """Writes `conversion.json` into `directory`: `facts`, then size and sha256 of `files`, then its own sha256.

    Args:
        files: relative names with "/".
    """
    entries = [
        {"path": name, "sha256": sha256, "size": (directory / name).stat().st_size}
        for name, sha256 in zip(files, hashes(directory, files), strict=True)
    ]
    (directory / CERTIFICATE).write_bytes(_text({**_FORMAT, **facts, "files": entries}))


def verify_certificate(directory: Path) -> dict[str, Any] | None:
    """Checks all files that `directory`'s certificate lists; returns the certificate, None if there is none.

    Raises:
        CheckpointError: a file is missing or not as it was written, or the certificate itself is not.
    """
    file = directory / CERTIFICATE
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        found = json.loads(data)
        intact = _text({key: value for key, value in found.items() if key != "sha256"}) == data
        entries = [(entry["path"], entry["sha256"], entry["size"]) for entry in found["files"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{file}: damaged, it is not as it was written; copy it again, or delete it")
    names = [name for name, _, _ in entries]
    for name, _, size in entries:
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name}: missing, though {CERTIFICATE} lists it; copy it again")
        if (directory / name).stat().st_size != size:
            raise CheckpointError(f"{directory / name}: {_changed(f'it should have {size} bytes')}")
    try:
        for name, (_, sha256, _), now in zip(names, entries, hashes(directory, names), strict=True):
            if now != sha256:
                raise CheckpointError(f"{directory / name}: {_changed('its sha256 is another')}")
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: cannot be read ({error.strerror})") from error
    return dict(found)


def _changed(how: str) -> str:
    return (
        f"not as {CERTIFICATE} says that it was written ({how}); copy it again, or delete {CERTIFICATE} if you mean it"
    )


def _text(document: Mapping[str, Any]) -> bytes:
    own = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**document, "sha256": own}, indent=1) + "\n").encode()
