"""`Processes`: exchanging short texts between the processes of a run, so that all decide alike and none waits in vain.

Everything goes through the key-value store of JAX's coordination service: no device takes part, so that a background
thread can agree on something while the devices are busy with a step.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from mesh_transformer.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MeshTransformerError,
    RunError,
    UserError,
)

_ROOT = "mesh-transformer"
LEFT = f"{_ROOT}/left"  # a key below it for every process that ended alone, after an error
_TIMEOUT = 600.0  # seconds that the others may need for what they do before they answer
_SLICE = 1.0  # seconds in one call that cannot be interrupted; signals are seen in between
_GRACE = 10.0  # seconds at most that the others wait for process 0's answer beyond its own wait
_MOST_TEXT = 20_000  # characters of an error's message that are passed on
_KINDS = {kind.__name__: kind for kind in (UserError, ConfigError, DataError, CheckpointError, RunError)}


class Store(Protocol):
    """What is needed of a key-value store; see `compat.KeyValueStore`."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str, timeout_s: float) -> str | None: ...
    def try_get(self, key: str) -> str | None: ...
    def entries(self, directory: str) -> dict[str, str]: ...
    def delete(self, directory: str) -> None: ...


class _Counters:
    """How often each name was used; equal in all processes, since all do the same in the same order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: collections.Counter[str] = collections.Counter()

    def next(self, name: str) -> int:
        with self._lock:
            self._used[name] += 1
            return self._used[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, seen from one of them; every method returns at once where there is one.

    A method that takes a name must be called by all processes, in the same order for each name; calls with different
    names may come from different threads at the same time.

    Attributes:
        index: this process, in 0..count-1.
        count: how many there are.
        hosts: name of the machine of each, in order of index; for messages.
        store: where the processes meet; None where there is one.
    """

    index: int = 0
    count: int = 1
    hosts: tuple[str, ...] = ()
    store: Store | None = None
    _counters: _Counters = dataclasses.field(default_factory=_Counters, init=False, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes what is written once."""
        return self.index == 0

    def name(self, index: int) -> str:
        """ "process 2 (host b)", for messages."""
        return f"process {index}" + (f" (host {self.hosts[index]})" if self.hosts else "")

    def names(self, indices: Iterable[int]) -> str:
        """`name` of each, with commas."""
        return ", ".join(map(self.name, indices))

    def fresh_key(self, name: str) -> str:
        """A key of the store, the same in all processes, that this run has not used."""
        return f"{_ROOT}/{name}/{self._counters.next(name)}"

    def exchange(self, name: str, value: str, timeout: float = _TIMEOUT) -> list[str]:
        """Every process's value, in order of index; returns when all have given theirs.

        Args:
            timeout: seconds that the slowest may need to come here.

        Raises:
            RunError: in all processes that came: some did not in time. The message names them.
        """
        if self.store is None:
            return [value]
        key = self.fresh_key(name)
        self.store.set(f"{key}/values/{self.index}", value)
        if self.is_first:
            values, missing = self._gather(self.store, key, timeout)
            self.store.set(f"{key}/answer", json.dumps([values, missing]))
            self._forget_the_one_before(self.store, key)
        else:
            answer = self._await(self.store, f"{key}/answer", timeout + min(_GRACE, max(1.0, timeout)))
            values, missing = json.loads(answer) if answer is not None else ([], [0])
        if missing:
            raise self._silence(name, missing, timeout)
        return values

    def barrier(self, name: str, timeout: float = _TIMEOUT) -> None:
        """Returns when all processes are here.

        Raises:
            RunError: as `exchange`.
        """
        self.exchange(name, "", timeout)

    def from_first(self, name: str, value: str | None, timeout: float = _TIMEOUT) -> str:
        """Process 0's value, in all processes; what the others give is not looked at.

        Raises:
            RunError: as `exchange`.
        """
        if self.is_first and value is None:
            raise ValueError("process 0 must give a value")
        return self.exchange(name, value if self.is_first and value is not None else "", timeout)[0]

    @contextlib.contextmanager
    def agree(self, name: str, timeout: float = _TIMEOUT) -> Iterator[None]:
        """The block succeeds in all processes or raises in all.

        Where the block raised, its own exception goes on. Elsewhere the error of the first process that failed is
        raised, of the same class if it is one of this project's and a RunError otherwise, with "process 3: " before it.

        Args:
            timeout: seconds that the slowest may need for the block beyond the fastest.

        Raises:
            RunError: some processes did not come to the end of the block in time; the message names them.
        """
        try:
            yield
        except Exception as error:
            with contextlib.suppress(RunError):  # its own error is the news
                self.exchange(name, _encode(error), timeout)
            raise
        for index, text in enumerate(self.exchange(name, "", timeout)):
            if text:
                raise _decode(text, self.name(index))

    def _gather(self, store: Store, key: str, timeout: float) -> tuple[list[str], list[int]]:
        """The values of all, or the processes that gave none in time."""
        deadline = time.monotonic() + timeout
        values: list[str] = []
        for index in range(self.count):
            value = self._await(store, f"{key}/values/{index}", deadline - time.monotonic())
            if value is None:
                present = store.entries(f"{key}/values")
                return [], [i for i in range(self.count) if str(i) not in present]
            values.append(value)
        return values, []

    @staticmethod
    def _await(store: Store, key: str, timeout: float) -> str | None:
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            value = store.get(key, min(_SLICE, left)) if left > 0 else store.try_get(key)
            if value is not None or left <= 0:
                return value

    @staticmethod
    def _forget_the_one_before(store: Store, key: str) -> None:
        # All came here, or are given up: so all have read the answer before this one.
        directory, _, number = key.rpartition("/")
        store.delete(f"{directory}/{int(number) - 1}")

    def _silence(self, name: str, missing: list[int], timeout: float) -> RunError:
        return RunError(
            f"{name}: {self.names(missing)} did not answer in {timeout:.0f} s\n"
            "Such a process has ended or hangs: see what it printed last, then repeat the command."
        )


ONE = Processes()


def _encode(error: Exception) -> str:
    if isinstance(error, MeshTransformerError):
        kind = next((each.__name__ for each in type(error).__mro__ if each.__name__ in _KINDS), RunError.__name__)
        text = str(error)
    else:
        kind, text = RunError.__name__, f"{type(error).__name__}: {error}"
    return json.dumps([kind, text[:_MOST_TEXT]])


def _decode(text: str, who: str) -> MeshTransformerError:
    kind, message = json.loads(text)
    return _KINDS[kind](f"{who}: {message}")
