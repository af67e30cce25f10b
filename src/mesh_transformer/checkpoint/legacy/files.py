"""Where the .npz files of a v1 checkpoint come from: a directory, or an archive (see `archive`)."""

from __future__ import annotations

import abc
import functools
import re
from pathlib import Path

from mesh_transformer.checkpoint.legacy.layout import N_FILES
from mesh_transformer.checkpoint.legacy.npz import Member, NpzFile
from mesh_transformer.checkpoint.weights import READERS
from mesh_transformer.config.errors import CheckpointError

_SHARD = re.compile(r"shard_(0|[1-9][0-9]*)")
_MOST_OPEN = 128  # files kept open


class ShardFiles(abc.ABC):
    """Sixteen .npz files for each of `n_shards` shards.

    `members[shard][file]` is what each file's headers say.
    """

    n_shards: int
    readers: int = READERS  # threads that may read at a time
    members: list[list[list[Member]]]

    @abc.abstractmethod
    def open(self, shard: int, file: int) -> NpzFile:
        """The file; the caller does not close it."""

    def counter(self, shard: int, file: int, member: int) -> int:
        """The value of a 0-d int32 array."""
        return int(self.open(shard, file).read(member))

    @abc.abstractmethod
    def name(self, shard: int, file: int) -> str:
        """What messages call the file."""


class DirectoryFiles(ShardFiles):
    """The files of a `step_N` directory.

    Raises:
        CheckpointError: a shard or a file is missing, damaged or cut short; it is named.
    """

    def __init__(self, step_directory: Path) -> None:
        self.directory = step_directory
        self.n_shards = check_shards(str(step_directory), [path.name for path in step_directory.iterdir()])
        for shard in range(self.n_shards):
            for file in range(N_FILES):
                path = Path(self.name(shard, file))
                if not path.is_file():
                    raise CheckpointError(
                        f"{path}: missing; every shard has {N_FILES} files, 0.npz to {N_FILES - 1}.npz: copy it again"
                    )
        self.open = functools.lru_cache(maxsize=_MOST_OPEN)(self._open)  # type: ignore[method-assign]
        self.members = [[self.open(shard, file).members for file in range(N_FILES)] for shard in range(self.n_shards)]

    def open(self, shard: int, file: int) -> NpzFile:
        return self._open(shard, file)

    def _open(self, shard: int, file: int) -> NpzFile:
        path = self.name(shard, file)
        return NpzFile(Path(path), path)

    def name(self, shard: int, file: int) -> str:
        return str(self.directory / f"shard_{shard}" / f"{file}.npz")


def check_shards(where: str, names: list[str]) -> int:
    """How many shards there are among the names of a directory.

    Raises:
        CheckpointError: their numbers have a gap, or there is none.
    """
    numbers = sorted(int(match[1]) for name in names if (match := _SHARD.fullmatch(name)))
    if not numbers:
        raise CheckpointError(f"{where}: holds no shard_0; expected the original's step directory")
    absent = sorted(set(range(numbers[-1] + 1)) - set(numbers))
    if absent:
        raise CheckpointError(
            f"{where}/shard_{absent[0]}: missing, while shard_{numbers[-1]} is there; copy the checkpoint again"
        )
    return len(numbers)


def has_shards(path: Path) -> bool:
    """Whether the directory has a shard of the original's v1."""
    return path.is_dir() and any(_SHARD.fullmatch(entry.name) and entry.is_dir() for entry in path.iterdir())
