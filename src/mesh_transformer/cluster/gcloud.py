"""Running `gcloud`: its answer, or its output line by line. An interrupt ends it and what it started."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mesh_transformer.config.errors import UserError

INSTALLATION_PAGE = "https://cloud.google.com/sdk/docs/install"
_LAST_LINES = 5
_SECONDS_TO_END = 10.0  # between asking a process to end and making it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended. `status` is None where it was ended for taking too long."""

    status: int | None
    out: str = ""
    error: str = ""

    def last_words(self) -> str:
        """The last line of the error that says something, as gcloud writes it: its message follows `ERROR:`."""
        lines = [line.strip() for line in self.error.splitlines() if line.strip(" {}")]
        errors = [n for n, line in enumerate(lines) if line.startswith("ERROR:")]
        words = " ".join(lines[errors[-1] :] if errors else lines[-1:])
        return textwrap.shorten(words, 500, placeholder=" ...") or f"exit status {self.status}"


def require_gcloud() -> None:
    """Raises UserError where there is no gcloud to run."""
    if shutil.which("gcloud") is None:
        raise UserError(
            f"gcloud, the command line of Google Cloud, is not on PATH\ninstall it ({INSTALLATION_PAGE}) and log in "
            "with: gcloud auth login"
        )


def ask(command: Sequence[str], *, limit: float) -> Ended:
    """Runs `command` for at most `limit` seconds and returns what it wrote."""
    with _process(command, stderr=subprocess.PIPE) as process:
        try:
            out, error = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return Ended(status=None, error=f"no answer within {limit:.0f} s")
        return Ended(status=process.returncode, out=out, error=error)


def follow(
    command: Sequence[str], show: Callable[[str], None], *, directory: Path | None = None, limit: float | None = None
) -> Ended:
    """Runs `command` and gives every line of its output and errors to `show` as it comes.

    Args:
        directory: its working directory.
        limit: seconds after which it is ended; None: it may take as long as it likes.

    Returns:
        `out` has the last lines.
    """
    last: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    late = threading.Event()
    with _process(command, stderr=subprocess.STDOUT, cwd=directory) as process, contextlib.ExitStack() as stack:
        if limit is not None:
            timer = threading.Timer(limit, _end_late, (process, late))
            timer.start()
            stack.callback(timer.cancel)
        for line in process.stdout or ():
            last.append(line.rstrip("\n"))
            show(last[-1])
        status = process.wait()
    return Ended(status=None if late.is_set() else status, out="\n".join(last))


@contextlib.contextmanager
def _process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    # A session of its own: gcloud starts ssh, and ends without ending it.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True, **options,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            _end(process)


def _end_late(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
            return
