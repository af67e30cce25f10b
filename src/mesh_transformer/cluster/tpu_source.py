"""What goes to the hosts of a TPU: one archive of this project's source, a configuration and the hosts' script."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path, PurePosixPath

import mesh_transformer
from mesh_transformer.cluster.tpu_commands import HOST_SCRIPT
from mesh_transformer.config import checks
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.load import read_config_file
from mesh_transformer.config.overrides import parse_override
from mesh_transformer.config.run import LogConfig

_FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
_PACKAGE = "src/mesh_transformer"


def default_source() -> Path:
    """The checkout that this very program runs from, if it does run from one."""
    return Path(mesh_transformer.__file__).parents[2]


def check_source(source: Path) -> None:
    """Raises ConfigError where `source` is no checkout of this project."""
    for name in (*_FILES, f"{_PACKAGE}/__init__.py"):
        if not (source / name).is_file():
            raise ConfigError(
                f"{source}: has no {name}; expected a checkout of mesh-transformer, which the hosts install\n"
                "give one with --source DIRECTORY"
            )


def remote_config(config: str) -> str:
    """What the hosts call the configuration: a URL as it is, a file under `config/`."""
    return config if "://" in config else f"config/{Path(config).name}"


def make_archive(source: Path, config: str, target: Path) -> None:
    """Writes the .tar.gz at `target`; equal contents give equal bytes.

    Raises:
        OSError: something cannot be read, or `target` not be written.
    """
    contents = {name: (source / name).read_bytes() for name in _FILES}
    for directory, inner, names in os.walk(source / _PACKAGE):
        inner[:] = [name for name in inner if name != "__pycache__" and not name.startswith(".")]
        for path in (Path(directory, name) for name in names if not name.startswith(".")):
            contents[path.relative_to(source).as_posix()] = path.read_bytes()
    contents[HOST_SCRIPT] = Path(__file__).with_name("tpu_host.sh").read_bytes()
    if "://" not in config:
        contents[remote_config(config)] = Path(config).expanduser().read_bytes()
    # No time of day and no owner: neither is a part of the contents.
    with (
        target.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, data in sorted(contents.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))


def directory_on_host(config: str, settings: tuple[str, ...]) -> str | None:
    """`log.directory` as it is given, where that is on a host's own disk: a relative path or one under `~`.

    Args:
        settings: what `--set` gives.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    raw, is_legacy = read_config_file(os.path.expanduser(config))
    log = {} if is_legacy else dict(raw.get("log", {}))
    for key, value in map(parse_override, settings):
        if key == ("log",) and isinstance(value, dict):
            log = dict(value)
        elif key == ("log", "directory"):
            log["directory"] = value
    given = str(log.get("directory", LogConfig().directory))
    return None if PurePosixPath(given).is_absolute() else given


def refuse_lost_runs(directory: str) -> None:
    """Raises ConfigError: a run in `directory` would be lost with the TPU, and a preemption would begin it anew."""
    raise ConfigError(
        f"log.directory = {checks.shown(directory)} is on the TPU's own disk, which a preemption takes with it\ngive a "
        "mounted file system that outlives it and that all hosts share, e.g. --set log.directory=/mnt/runs"
    )
