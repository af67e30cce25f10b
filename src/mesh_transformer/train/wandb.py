"""The curves of a run for Weights & Biases. Never asks for anything; without a key or a network it records offline."""

from __future__ import annotations

import importlib.util
import netrc
import os
import secrets
import socket
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh_transformer.config.load import to_toml
from mesh_transformer.config.run import RunConfig
from mesh_transformer.files import write_atomically
from mesh_transformer.train.metrics import AnyMetrics
from mesh_transformer.train.tracking import curves_for

ID_FILE = "wandb-run-id.txt"
_HOST = "https://api.wandb.ai"
_SECONDS_TO_CONNECT = 5.0


def is_installed() -> bool:
    """Whether the package is there; it is not imported."""
    spec = importlib.util.find_spec("wandb")
    # A directory of that name in the working directory, as a run offline leaves one, has no origin.
    return spec is not None and spec.origin is not None


class WeightsAndBiases:
    """Logs to one run of the service; going on with a run directory goes on with its run there.

    Args:
        directory: the run directory, where the id of the run is kept and a run offline is recorded.
        step: of the checkpoint that the run goes on from; 0 begins a new run there too.
        note: told where a run offline is.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, run: RunConfig, directory: Path, step: int, note: Callable[[str], None]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import tomllib

        import wandb

        offline = None if os.environ.get("WANDB_MODE") else _why_offline()
        self._run: Any = wandb.init(
            project=run.log.wandb_project,
            name=run.name,
            id=_run_id(directory / ID_FILE, new=step == 0),
            resume="allow",
            dir=str(directory),
            config=tomllib.loads(to_toml(run)),
            mode="offline" if offline else None,
        )
        if offline:
            note(
                f"Weights & Biases: {offline}; recording offline, and `wandb sync {directory / 'wandb'}/offline-run-*` "
                "sends it"
            )

    def write(self, metrics: AnyMetrics) -> None:
        """Every curve's value at the step. Of steps that the service has already, nothing is taken twice."""
        self._run.log(curves_for(metrics), step=metrics.step)

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


def _run_id(file: Path, *, new: bool) -> str:
    if not new and file.exists():
        return file.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(4)
    write_atomically(file, made.encode())
    return made


def _why_offline() -> str | None:
    """Why the service cannot be used; None if it can. What wandb would ask for on a terminal is looked for here."""
    address = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or _HOST)
    host = address.hostname or ""
    if not os.environ.get("WANDB_API_KEY") and not _has_netrc_entry(host):
        return "there is no key (WANDB_API_KEY, or `wandb login`)"
    try:
        socket.create_connection((host, address.port or 443), timeout=_SECONDS_TO_CONNECT).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return None


def _has_netrc_entry(host: str) -> bool:
    for name in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            if netrc.netrc(os.path.expanduser(name)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue  # that file says nothing; wandb does not take a key from it either
    return False
