"""How a service ends, and that nobody is left without an answer whatever happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from engine_cases import ask, prompt_of
from fake_programs import FakePrograms, assert_idle
from service_cases import DEADLINE, Gate, Listener, Made, send

from mesh_transformer.config.errors import RunError
from mesh_transformer.engine.request import Output
from mesh_transformer.engine.service import EngineService, Group, QueueFull


def test_closing_finishes_what_was_accepted(make: Callable[..., Made]) -> None:
    service, engine, _ = make(max_batch=1)
    gate = Gate(engine)
    listeners = [send(service, ask(prompt_of(n), 5))[1] for n in (100, 3)]
    gate.wait()
    listeners.append(send(service, ask((1,), 5))[1])
    closing = threading.Thread(target=lambda: results.append(service.close(DEADLINE)))
    results: list[bool] = []
    closing.start()
    while not service._closing:
        pass
    assert not service.ready
    with pytest.raises(RunError, match="shutting down"):
        send(service, ask((1,)))
    gate.open()
    closing.join(DEADLINE)
    assert results == [True]
    for listener in listeners:
        listener.check()
    assert_idle(engine)


def test_closing_at_once_ends_everything_with_an_error(make: Callable[..., Made]) -> None:
    service, engine, _ = make(max_batch=1)
    gate = Gate(engine)
    _, running = send(service, ask(prompt_of(3), 50), ask(prompt_of(4), 50))
    gate.wait()
    gate.let()
    gate.wait()
    running.wait(lambda: len(running.tokens()) == 1)
    _, new = send(service, ask((1,), 5))  # which the engine has not seen when it ends
    results: list[bool] = []
    closing = threading.Thread(target=lambda: results.append(service.close(0.0)))
    closing.start()
    new.wait()
    gate.open()
    closing.join(DEADLINE)
    assert results == [False]
    for listener in (running, new):
        listener.wait()
        assert all(last is not None and isinstance(last.error, RunError) for last in listener.last)
        assert not listener.problems


def test_closed_before_it_started(make: Callable[..., Made]) -> None:
    service, _, _ = make(start=False)
    group, heard = send(service, ask((1,)), ask((2,)))
    assert not service.close(0.0)
    heard.wait()
    assert all(last is not None and isinstance(last.error, RunError) for last in heard.last)
    with pytest.raises(RunError, match="has been closed and cannot start"):
        service.start()
    with pytest.raises(RunError):
        send(service, ask((1,)))
    group.cancel()
    assert service.close(0.0)


def test_closed_while_it_compiles(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes minutes; those who wait for it are told at once."""
    service, _, _ = make(start=False)
    compiling, compiled = threading.Event(), threading.Event()

    def warm(engine: object) -> None:
        compiling.set()
        assert compiled.wait(DEADLINE)

    monkeypatch.setattr("mesh_transformer.engine.service.warm", warm)
    service.start()
    assert compiling.wait(DEADLINE)
    _, heard = send(service, ask((1,)))
    results: list[bool] = []
    closing = threading.Thread(target=lambda: results.append(service.close(0.0)))
    closing.start()
    heard.wait()
    compiled.set()
    closing.join(DEADLINE)
    assert results == [False] and not service.ready
    assert heard.last[0] is not None and isinstance(heard.last[0].error, RunError)


def test_a_model_that_does_not_compile(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    service, _, _ = make(start=False)
    _, heard = send(service, ask((1,)))

    def warm(engine: object) -> None:
        raise MemoryError("8 GB are not enough")

    monkeypatch.setattr("mesh_transformer.engine.service.warm", warm)
    service.start()
    heard.wait()
    assert heard.last[0] is not None and "8 GB are not enough" in str(heard.last[0].error)
    service._thread.join(DEADLINE)
    assert not service.ready


class _Storm:
    """Callers that submit, cancel and fail at random, on an engine whose steps fail now and then."""

    def __init__(self, service: EngineService, programs: FakePrograms, seed: int) -> None:
        self.service, self.programs, self.seed = service, programs, seed
        self.sent: list[tuple[Group, Listener]] = []
        self.cancelled: set[Group] = set()
        self.some_sent, self.closes = threading.Semaphore(0), False
        self.threads = [threading.Thread(target=self._call, args=(i,)) for i in range(6)]
        random = np.random.default_rng(seed)

        def before(name: str) -> None:
            if random.random() < 0.01:
                raise FloatingPointError("a step fails")

        programs.before = before

    def _call(self, number: int) -> None:
        random = np.random.default_rng([self.seed, number])
        n_left = 20
        while n_left:
            requests = [
                ask(prompt_of(int(random.integers(1, 160)), i), int(random.integers(0, 12)))
                for i in range(int(random.integers(1, 4)))
            ]
            faulty = random.random() < 0.1
            try:
                group, listener = send(self.service, *requests, on_output=self._fail if faulty else None)
            except QueueFull:
                time.sleep(0.001)  # and tries again
                continue
            except RunError:
                assert self.closes
                return
            n_left -= 1
            if faulty:
                self.cancelled.add(group)
            if random.random() < 0.3:
                self.cancelled.add(group)
                group.cancel()
            elif random.random() < 0.5 and not faulty:
                listener.wait()
            self.sent.append((group, listener))
            self.some_sent.release()

    @staticmethod
    def _fail(index: int, output: Output) -> None:
        raise ConnectionError("nobody is there")


@pytest.mark.parametrize("seed", range(12))
def test_no_request_is_left_without_an_answer(make: Callable[..., Made], seed: int) -> None:
    """Unless its group was cancelled. Half of the services are closed in the middle of it, half of these at once."""
    service, engine, programs = make(max_batch=3, max_queue=8, n_pages=7)
    storm = _Storm(service, programs, seed)
    storm.closes = seed % 2 == 0
    for thread in storm.threads:
        thread.start()
    if storm.closes:
        for _ in range(30):
            assert storm.some_sent.acquire(timeout=DEADLINE)
        service.close(0.0 if seed % 4 else DEADLINE)
    for thread in storm.threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert service.close(DEADLINE)
    for group, listener in storm.sent:
        assert not listener.problems
        assert group in storm.cancelled or listener.ended
        for i, last in enumerate(listener.last):
            if last is not None and last.error is None:
                assert len(listener.tokens(i)) == listener.requests[i].options.max_tokens
    assert not service._owners and not service._new
    if not storm.closes:
        assert len(storm.sent) == 6 * 20
        assert_idle(engine)
        load = service.load()
        assert (load.waiting, load.running) == (0, 0) and load.failures > 0
