"""Services on fake programs, their callers, and a gate before every step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from fake_programs import FakePrograms, config, expected

from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.request import Output, Request
from mesh_transformer.engine.service import EngineService, Group

DEADLINE = 20.0


class Listener:
    """What a group has received. Waits have a deadline."""

    def __init__(self, requests: Sequence[Request], on_output: Callable[[int, Output], None] | None = None) -> None:
        self.requests, self.outputs = requests, [list[Output]() for _ in requests]
        self.last: list[Output | None] = [None] * len(requests)
        self.problems: list[str] = []
        self._on_output, self._changed = on_output, threading.Condition()

    def __call__(self, index: int, output: Output) -> None:
        with self._changed:
            if self.last[index] is not None:
                self.problems.append(f"request {index} heard {output} after its last output")
            self.outputs[index].append(output)
            if output.last:
                self.last[index] = output
            self._changed.notify_all()
        if self._on_output is not None:
            self._on_output(index, output)

    @property
    def ended(self) -> bool:
        return all(last is not None for last in self.last)

    def tokens(self, index: int = 0) -> list[int]:
        return [t for output in self.outputs[index] for t in output.tokens]

    def wait(self, what: Callable[[], bool] | None = None) -> None:
        """Until something is so, by default that all have ended."""
        with self._changed:
            assert self._changed.wait_for(what or (lambda: self.ended), DEADLINE), "a request was left waiting"

    def check(self) -> None:
        """All of it was completed as its prompt says."""
        assert not self.problems
        for i, request in enumerate(self.requests):
            last = self.last[i]
            assert last is not None and last.finish_reason == "length" and last.error is None
            assert self.tokens(i) == expected(request.prompt, request.options.max_tokens, config())


class Gate:
    """Holds the engine before a step until it may go on."""

    made: ClassVar[list[Gate]] = []

    def __init__(self, engine: Engine) -> None:
        self._step, self._may_go, self._asked = engine.step, threading.Semaphore(0), threading.Semaphore(0)
        self._open = False
        self.made.append(self)
        engine.step = self._gated  # type: ignore[method-assign]

    def _gated(self) -> Any:
        if not self._open:
            self._asked.release()
            assert self._may_go.acquire(timeout=DEADLINE)
        return self._step()

    def wait(self) -> None:
        """Until the engine stands before a step."""
        assert self._asked.acquire(timeout=DEADLINE)

    def let(self) -> None:
        """One step."""
        self._may_go.release()

    def open(self) -> None:
        """All of them."""
        self._open = True
        self._may_go.release()


Made = tuple[EngineService, Engine, FakePrograms]


def send(service: EngineService, *requests: Request, on_output: Any = None) -> tuple[Group, Listener]:
    listener = Listener(requests, on_output)
    return service.submit(requests, listener), listener
