"""The engine on its thread: many callers, failures, and an end for every request; on fake programs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from engine_cases import ask, prompt_of
from fake_programs import assert_idle
from service_cases import DEADLINE, Gate, Listener, Made, send

from mesh_transformer.config.errors import RunError, UserError
from mesh_transformer.engine.request import Output
from mesh_transformer.engine.service import Group, QueueFull


def test_many_threads(make: Callable[..., Made]) -> None:
    service, engine, _ = make(max_queue=1000)
    listeners: list[Listener] = []

    def caller(seed: int) -> None:
        for i in range(5):
            requests = [ask(prompt_of(1 + (7 * seed + i) % 150, seed), 4 + i, sample=n) for n in range(1 + i % 3)]
            listeners.append(send(service, *requests)[1])
            if i % 2:
                listeners[-1].wait()

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    for listener in listeners:
        listener.wait()
        listener.check()
    assert len(listeners) == 40
    assert service.close(DEADLINE)
    assert_idle(engine)
    load = service.load()
    assert (load.waiting, load.running, load.failures) == (0, 0, 0)
    assert load.generated_tokens == sum(len(each.tokens(i)) for each in listeners for i in range(len(each.requests)))


def test_requests_may_come_before_it_is_ready(make: Callable[..., Made]) -> None:
    service, _, _ = make(start=False)
    _, listener = send(service, ask(prompt_of(5), 3))
    assert not service.ready
    service.start()
    listener.wait()
    listener.check()
    assert service.ready


def test_the_queue(make: Callable[..., Made]) -> None:
    service, engine, _ = make(max_queue=3, max_batch=2)
    gate = Gate(engine)
    listeners = [send(service, *[ask(prompt_of(2, i), 3) for i in range(6)])[1]]  # never too many by itself
    gate.wait()
    assert service.load().waiting == 6
    with pytest.raises(QueueFull, match="6 requests wait already, of at most 3"):
        send(service, ask((1,)))
    gate.let()
    gate.wait()  # two are under way, four wait
    assert (service.load().waiting, service.load().running) == (4, 2)
    with pytest.raises(QueueFull):
        send(service, ask((1,)))
    while service.load().waiting > 2:
        gate.let()
        gate.wait()
    with pytest.raises(QueueFull):
        send(service, ask((1,)), ask((2,)))
    listeners.append(send(service, ask((1,), 3))[1])
    assert service.load().waiting == 3
    gate.open()
    for listener in listeners:
        listener.wait()
        listener.check()


def test_a_bad_request_queues_none_of_its_group(make: Callable[..., Made]) -> None:
    service, _, _ = make(start=False)
    for submit in (lambda: send(service, ask((999,))), lambda: send(service, ask((1,)), ask((999,)))):
        with pytest.raises(UserError, match="token id 999"):
            submit()
    assert service.load().waiting == 0


def test_what_is_cancelled_is_gone_before_the_next_step(make: Callable[..., Made]) -> None:
    service, engine, _ = make(max_batch=1)
    gate = Gate(engine)
    group, heard = send(service, ask(prompt_of(3), 50))
    _, other = send(service, ask(prompt_of(4), 2))
    gate.wait()
    gate.let()
    gate.wait()
    heard.wait(lambda: len(heard.tokens()) == 1)
    group.cancel()
    gate.let()  # the step under way: its token is not heard any more
    gate.wait()
    gate.let()
    other.wait(lambda: len(other.tokens()) == 1)
    assert len(heard.tokens()) == 1
    gate.open()
    other.wait()
    other.check()
    assert len(heard.outputs[0]) == 1 and not heard.ended


def test_cancelled_too_early_too_late_and_twice(make: Callable[..., Made]) -> None:
    service, engine, _ = make(start=False)
    early, unheard = send(service, ask((1,)), ask((2,)))
    early.cancel()
    service.start()
    group, heard = send(service, ask((1,), 3), ask((2,), 3))
    heard.wait()
    for _ in range(2):
        group.cancel()
        early.cancel()
    _, after = send(service, ask((3,), 2))
    after.wait()
    assert service.close(DEADLINE)
    group.cancel()
    for listener in (heard, after):
        listener.check()
    assert unheard.outputs == [[], []] and service.load().waiting == 0
    assert_idle(engine)


def test_cancelled_by_its_own_receiver(make: Callable[..., Made]) -> None:
    """As a server does that finds nobody listening any more."""
    service, engine, _ = make(max_batch=2)
    gate = Gate(engine)
    groups: list[Group] = []
    group, heard = send(
        service, ask((1,), 50), ask((2,), 50), on_output=lambda index, output: groups[0].cancel() if index else None
    )
    groups.append(group)
    gate.open()
    _, other = send(service, ask((3,), 60))
    other.wait()
    other.check()
    assert len(heard.tokens(1)) == 1 and not heard.ended


def test_a_receiver_that_fails_is_cancelled(make: Callable[..., Made], caplog: pytest.LogCaptureFixture) -> None:
    service, engine, _ = make()

    def fail(index: int, output: Output) -> None:
        raise RuntimeError("nobody is there")

    _, bad = send(service, ask((1,), 50), ask((2,), 50), on_output=fail)
    _, good = send(service, ask((3,), 60))
    good.wait()
    good.check()
    assert sum(len(each) for each in bad.outputs) == 1
    assert "a receiver has failed" in caplog.text
    assert service.close(DEADLINE)
    assert_idle(engine)


@pytest.mark.parametrize("program", ["fill", "prefill", "decode", "choose"])
def test_a_step_that_fails(make: Callable[..., Made], program: str, caplog: pytest.LogCaptureFixture) -> None:
    """What was under way gets the error; what waits is served, and so is what comes later."""
    service, engine, programs = make(max_batch=1, max_queue=1)
    gate = Gate(engine)
    _, first = send(service, ask(prompt_of(70), 20))
    gate.wait()
    if program == "decode":  # which no first step does
        for _ in range(2):
            gate.let()
            gate.wait()
    waits = [send(service, ask(prompt_of(70), 4))[1]] if program == "decode" else []
    broken = [True]

    def before(name: str) -> None:
        if name == program and broken:
            broken.clear()
            raise FloatingPointError("as if out of memory")

    programs.before = before
    gate.open()
    first.wait()
    last = first.last[0]
    assert last is not None and isinstance(last.error, FloatingPointError) and last.finish_reason is None
    if not waits:
        waits.append(send(service, ask(prompt_of(70), 4))[1])
    for listener in waits:
        listener.wait()
        listener.check()
    assert service.ready and service.load().failures == 1
    assert "a step has failed" in caplog.text
    assert service.close(DEADLINE)
    assert_idle(engine)


def test_what_ended_in_the_step_that_failed_is_told(make: Callable[..., Made]) -> None:
    """A request for nothing never gets a slot, and yet its answer is lost with the step."""
    service, engine, programs = make()
    gate = Gate(engine)
    _, heard = send(service, ask((1,), 0), ask((2,), 5))
    gate.wait()
    programs.before = lambda name: (_ for _ in ()).throw(FloatingPointError(name))
    gate.let()
    heard.wait()
    assert [isinstance(last and last.error, FloatingPointError) for last in heard.last] == [True, True]


def test_an_engine_that_cannot_begin_again_ends(make: Callable[..., Made], caplog: pytest.LogCaptureFixture) -> None:
    """Everybody is told, also those who wait; nobody else is let in."""
    service, engine, programs = make(max_batch=1)
    gate = Gate(engine)
    _, heard = send(service, *[ask((i,), 5) for i in range(3)])
    gate.wait()

    def broken(*_: Any) -> None:
        raise FloatingPointError("no memory at all")

    programs.before = engine.reset = broken  # type: ignore[method-assign]
    gate.let()
    heard.wait()
    errors = [last.error for last in heard.last if last is not None]
    assert isinstance(errors[0], FloatingPointError)
    assert all(isinstance(error, RunError) and "no memory at all" in str(error) for error in errors[1:])
    service._thread.join(DEADLINE)
    assert not service.ready
    with pytest.raises(RunError):
        send(service, ask((1,)))
    assert service.close(0.0)
