"""What a check says, and how checks are carried out so that none stops the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from mesh_transformer.config.errors import MeshTransformerError

Status = Literal["ok", "warning", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    name: what was looked at. message: what was found, one line. mend: what to do about it, one line; empty where
    nothing is wrong. "warning": a run starts, but may not go as expected. "failed": it would not start, or not end.
    """

    name: str
    status: Status
    message: str
    mend: str = ""

    def as_line(self) -> str:
        """As `train` shows it, which goes on in any case."""
        return f"warning: {self.name}: {self.message}; {self.mend}"

    def __post_init__(self) -> None:
        if (self.status == "ok") == bool(self.mend):
            raise ValueError(f"{self.name}: a finding that is {self.status} has the mend {self.mend!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """Something to look at.

    mend: what to do where the check is refused with an error that does not say it.
    """

    name: str
    look: Callable[[], Iterable[Finding]]
    mend: str


def ok(name: str, message: str) -> Finding:
    """Nothing to mend."""
    return Finding(name=name, status="ok", message=message)


def warning(name: str, message: str, mend: str) -> Finding:
    """A run starts all the same."""
    return Finding(name=name, status="warning", message=message, mend=mend)


def failed(name: str, message: str, mend: str) -> Finding:
    """A run would not start, or not come to its end."""
    return Finding(name=name, status="failed", message=message, mend=mend)


def carry_out(checks: Iterable[Check]) -> Iterator[Finding]:
    """The findings of each check in turn, as they come. What a check raises is a finding too, and the next one runs."""
    for check in checks:
        try:
            yield from check.look()
        except MeshTransformerError as error:
            yield refused(check.name, error, check.mend)
        except Exception as error:  # whatever it is, the other checks go on
            text = _one_line(str(error)) or "no more is said"
            yield failed(check.name, f"{type(error).__name__}: {text}", check.mend)


def refused(name: str, error: MeshTransformerError, mend: str) -> Finding:
    """The error as a failed finding; the lines of its text after the first are the mend, where it has them."""
    first, _, rest = str(error).partition("\n")
    return failed(name, _one_line(first), _one_line(rest) or mend)


def _one_line(text: str) -> str:
    return " ".join(text.split())
