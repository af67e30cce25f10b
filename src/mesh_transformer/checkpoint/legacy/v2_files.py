"""The files of a v2 step directory: its metadata, and arrays of which single layers are read."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.legacy.npz import NpzFile, reading
from mesh_transformer.checkpoint.legacy.v2_layout import NAMES, OPT_NAMES
from mesh_transformer.checkpoint.weights import Kind, aligned_empty
from mesh_transformer.config import checks
from mesh_transformer.config.errors import CheckpointError

METADATA = "meta.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """A step's meta.json. The orders are unchecked: `leaf_indices` reads them."""

    file: Path
    hosts: int
    step: int
    param_order: Any
    opt_order: Any


def read_metadata(directory: Path) -> Metadata:
    """The metadata of a step directory.

    Raises:
        CheckpointError: it is missing or damaged, or is not that of a v2 checkpoint.
    """
    file = directory / METADATA
    with reading(file):
        found = json.loads(file.read_bytes())
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds no keys; expected total_hosts, step, param_order and opt_order")
    for key, minimum in (("total_hosts", 1), ("step", 0)):
        if type(found.get(key)) is not int or found[key] < minimum:
            given = checks.shown(found[key]) if key in found else "missing"
            raise CheckpointError(f"{file}: {key} is {given}; expected an integer of at least {minimum}")
    return Metadata(
        file=file,
        hosts=found["total_hosts"],
        step=found["step"],
        param_order=found.get("param_order"),
        opt_order=found.get("opt_order"),
    )


def leaf_indices(metadata: Metadata, *, moments: bool) -> dict[tuple[Kind, str], int]:
    """(kind, name of a leaf) -> which array of the file it is, for the parameters or else for the moments.

    Raises:
        CheckpointError: the order does not name each of the leaves once (twice in opt_order, between the counters).
    """
    if not moments:
        return _indices(f"{metadata.file}: param_order", metadata.param_order, "params", 0)
    where, order, n = f"{metadata.file}: opt_order", metadata.opt_order, len(NAMES)
    if not isinstance(order, list) or len(order) != len(OPT_NAMES) or order[0] != "" or order[-1] != "":
        raise CheckpointError(
            f'{where} is not "", the {n} names of param_order for mu, the same for nu, and ""; copy the file again'
        )
    return _indices(where, order[1 : n + 1], "mu", 1) | _indices(where, order[n + 1 : -1], "nu", n + 1)


def _indices(where: str, names: Any, kind: Kind, first: int) -> dict[tuple[Kind, str], int]:
    if not isinstance(names, list):
        raise CheckpointError(
            f"{where} is {checks.shown(names)}; expected the list of the {len(NAMES)} names of leaves"
        )
    for name in names:
        if name not in NAMES:
            raise CheckpointError(f"{where} names {checks.shown(name)}, which is no leaf of a v2 model")
        if names.count(name) > 1:
            raise CheckpointError(f"{where} names {name} twice; expected each leaf once")
    missing = [name for name in NAMES if name not in names]
    if missing:
        raise CheckpointError(f"{where} lacks {missing[0]}")
    return {(kind, name): first + i for i, name in enumerate(names)}


class ShardFile:
    """One shard_h.npz, of which the headers have been read. It is open only while something is read.

    Args:
        n_members: how many arrays it must hold.
        order: the key of the metadata that says so, for messages.

    Raises:
        CheckpointError: it is missing or damaged.
    """

    def __init__(self, path: Path, n_members: int, order: str) -> None:
        self.path = path
        with NpzFile(path, path) as npz:
            self.members = npz.members
            if len(self.members) != n_members:
                raise CheckpointError(
                    f"{path}: holds {len(self.members)} arrays, and {order} in {METADATA} names {n_members}"
                )
            self._offsets = [npz.data_offset(i) for i in range(n_members)]
        with reading(path):
            self._identity = _identity(os.stat(path))
        self._verified = [False] * n_members
        self._locks = [threading.Lock() for _ in range(n_members)]

    def read(self, i: int, row: int | None = None) -> np.ndarray:
        """Member `i`, or `[row]` of it, in new memory. May be called from several threads.

        The first call reads all of the member, in bounded memory, to compare its checksum.
        """
        with self._locks[i]:
            if not self._verified[i]:
                with NpzFile(self.path, self.path) as npz:
                    npz.verify(i)
                self._verified[i] = True
        member = self.members[i]
        out = aligned_empty(member.shape if row is None else member.shape[1:], member.dtype)
        into = out.reshape(-1).view(np.uint8).data
        offset = self._offsets[i] + (row or 0) * out.nbytes
        done = 0
        with reading(self.path), open(self.path, "rb", buffering=0) as file:
            if _identity(os.fstat(file.fileno())) != self._identity:
                raise CheckpointError(f"{self.path}: changed while it was being read; start again")
            while done < len(into):
                n = os.preadv(file.fileno(), [into[done:]], offset + done)
                if not n:
                    raise EOFError("the file ends early")
                done += n
        return out


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    """Differs for a file that was written again."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def open_shards(directory: Path, hosts: int, n_members: int, order: str) -> Sequence[ShardFile]:
    """The files of all hosts. Raises CheckpointError as `ShardFile` does."""
    return [ShardFile(directory / f"shard_{host}.npz", n_members, order) for host in range(hosts)]
