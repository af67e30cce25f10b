"""Agreeing, comparing, stopping together and being watched: threads over a dict stand in for processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mesh_transformer.config.errors import CheckpointError, ConfigError, DataError, RunError
from mesh_transformer.processes import ONE, Processes, StopAgreement, Watchdog, check_same, version_facts


class Dict:
    """A key-value store between threads."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str, timeout_s: float) -> str | None:
        with self.changed:
            self.changed.wait_for(lambda: key in self.values, timeout_s)
            return self.values.get(key)

    def try_get(self, key: str) -> str | None:
        return self.values.get(key)

    def entries(self, directory: str) -> dict[str, str]:
        with self.changed:
            prefix = f"{directory}/"
            return {k.removeprefix(prefix): v for k, v in self.values.items() if k.startswith(prefix)}

    def delete(self, directory: str) -> None:
        with self.changed:
            for key in [key for key in self.values if key.startswith(f"{directory}/")]:
                del self.values[key]


def in_threads(count: int, body: Callable[[Processes], Any], store: Dict | None = None) -> list[Any]:
    """What `body` returns or raises in each of `count` processes."""
    store = store or Dict()
    hosts = tuple("abcdefgh"[:count])

    def one(index: int) -> Any:
        try:
            return body(Processes(index=index, count=count, hosts=hosts, store=store))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


# ------------------------------------------------------------------------------------------------ agreeing


def test_one_process_needs_nobody() -> None:
    assert ONE.exchange("x", "a") == ["a"] and ONE.from_first("x", "b") == "b" and ONE.is_first
    ONE.barrier("x")
    with pytest.raises(ZeroDivisionError), ONE.agree("x"):
        raise ZeroDivisionError
    check_same(ONE, {"a": "b"})
    assert StopAgreement(ONE).stop_after(3, None) is None
    assert StopAgreement(ONE).stop_after(3, signal.SIGTERM) == signal.SIGTERM


def test_everyone_hears_everyone_again_and_again() -> None:
    store = Dict()

    def body(processes: Processes) -> list[Any]:
        heard = [processes.exchange("numbers", f"{processes.index}.{i}") for i in range(20)]
        return [*heard, processes.from_first("word", "first" if processes.is_first else None)]

    for heard in in_threads(4, body, store):
        assert heard == [*([f"{p}.{i}" for p in range(4)] for i in range(20)), "first"]
    # What was answered is forgotten, but for the newest of each name.
    assert {key.split("/")[2] for key in store.values if "numbers" in key} == {"20"}


def test_who_does_not_answer_is_named_by_all_others() -> None:
    def body(processes: Processes) -> list[str]:
        return processes.exchange("roll call", "here", 0.2) if processes.index not in (1, 3) else []

    for index, error in enumerate(in_threads(4, body)):
        if index not in (1, 3):
            assert isinstance(error, RunError)
            assert "roll call: process 1 (host b), process 3 (host d) did not answer in 0 s\n" in str(error)


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, RunError])
def test_an_error_in_one_is_an_error_of_its_class_in_all(kind: type[Exception]) -> None:
    def body(processes: Processes) -> None:
        with processes.agree("reading"):
            if processes.index == 2:
                raise kind("a file is missing\nput it back")

    for index, error in enumerate(in_threads(4, body)):
        assert type(error) is kind
        assert str(error) == ("process 2 (host c): " if index != 2 else "") + "a file is missing\nput it back"


def test_mistakes_of_ours_reach_all_as_well_and_the_names_stay_in_step() -> None:
    def body(processes: Processes) -> list[str]:
        try:
            with processes.agree("work"):
                assert processes.index != 1, "a mistake of ours"
        except (AssertionError, RunError) as error:
            with processes.agree("work"):
                pass
            return processes.exchange("work", str(error).partition("\n")[0])
        return []

    told = "process 1 (host b): AssertionError: a mistake of ours"
    assert in_threads(3, body) == [[told, "a mistake of ours", told]] * 3


def test_two_threads_may_agree_on_different_things() -> None:
    def body(processes: Processes) -> list[list[str]]:
        with ThreadPoolExecutor(2) as pool:
            # The odd processes begin with the other: were one name to wait for another, none would end.
            names = ["left", "right"] if processes.index % 2 else ["right", "left"]
            calls = {name: pool.submit(processes.exchange, name, name, 5) for name in names}
            return [calls["left"].result(), calls["right"].result()]

    assert in_threads(2, body) == [[["left"] * 2, ["right"] * 2]] * 2


# ------------------------------------------------------------------------------------------------ comparing


def test_equal_facts_pass_and_a_difference_is_told_to_all() -> None:
    assert in_threads(3, lambda processes: check_same(processes, version_facts())) == [None] * 3

    def body(processes: Processes) -> None:
        rate = "0.1" if processes.index < 2 else "0.2"
        check_same(processes, {"version of jax": "1", "configuration": f"[train]\nlearning_rate = {rate}\nsteps = 3\n"})

    for error in in_threads(4, body):
        assert type(error) is ConfigError
        assert str(error).startswith(
            "configuration of process 2 (host c), process 3 (host d) differs from process 0's: "
            'line 2: "learning_rate = 0.2" instead of "learning_rate = 0.1"\n'
        )


@pytest.mark.parametrize(("there", "shown"), [("a\nb\nc", 'line 3: "c" instead of nothing'), ("a\nb\n", "instead of")])
def test_texts_that_differ_at_their_end(there: str, shown: str) -> None:
    for error in in_threads(2, lambda p: check_same(p, {"configuration": there if p.index else "a\nb"})):
        assert shown in str(error) and str(error).count("\n") == 1


def test_a_fact_that_only_some_have() -> None:
    for error in in_threads(2, lambda p: check_same(p, {"code": "x"} if p.index else {})):
        assert type(error) is ConfigError and "code of process 1 (host b)" in str(error)


def test_the_version_facts_name_what_must_be_equal(tmp_path: Path) -> None:
    from mesh_transformer.processes.sameness import _code_digest

    assert list(version_facts()) == ["version of mesh-transformer", "version of jax", "version of jaxlib", "code"]
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "notes").write_text("x")
    before = _code_digest(tmp_path)
    (tmp_path / "notes").write_text("y")
    assert _code_digest(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2")
    assert _code_digest(tmp_path) != before


# ------------------------------------------------------------------------------------------------ stopping


@pytest.mark.parametrize(
    ("signals", "last"), [({1: 3}, 4), ({0: 3, 2: 3}, 4), ({0: 5, 2: 2}, 3), ({1: 3, 2: 4}, 4), ({}, 9)]
)
def test_all_stop_after_the_same_step(signals: dict[int, int], last: int) -> None:
    """Steps are barriers, as collectives are: none is finished before all have begun it."""
    barrier = threading.Barrier(3)

    def body(processes: Processes) -> tuple[int, int | None]:
        agreement = StopAgreement(processes)
        for step in range(1, 10):
            barrier.wait(10)
            time.sleep(0.001 * (processes.index * 7 % 3))
            signalled = signal.SIGTERM if step >= signals.get(processes.index, 99) else None
            stop = agreement.stop_after(step, signalled)
            if stop is not None:
                return step, stop
        return step, None

    assert in_threads(3, body) == [(last, signal.SIGTERM if signals else None)] * 3


def test_an_agreement_to_stop_holds_for_one_run_only() -> None:
    def body(processes: Processes) -> list[int | None]:
        first = StopAgreement(processes)
        stops = [first.stop_after(1, signal.SIGINT), first.stop_after(2, None)]
        processes.barrier("end of the first")
        return [*stops, StopAgreement(processes).stop_after(5, None)]

    assert in_threads(1, body) == [[None, signal.SIGINT, None]]


# ------------------------------------------------------------------------------------------------ watching


def test_a_step_that_hangs_is_reported_with_what_is_known_of_the_others() -> None:
    reports: dict[int, str] = {}

    def body(processes: Processes) -> None:
        if processes.index == 3:
            return  # never heard
        with Watchdog(processes, 0.4, lambda report: reports.update({processes.index: report})) as watchdog:
            watchdog.beat(40)
            if processes.index == 2:
                return  # leaves
            time.sleep(0.2)
            watchdog.beat(41)
            time.sleep(0.9)

    in_threads(4, body)
    assert sorted(reports) == [0, 1]
    lines = reports[1].splitlines()
    assert lines[0].startswith("process 1 (host b): step 42 has not finished after 0 s")
    assert lines[1].startswith("process 0 (host a) was last heard at step 41, ")
    assert lines[2] == "process 2 (host c) was never heard" or "step 40" in lines[2]
    assert lines[3] == "process 3 (host d) was never heard"


def test_a_process_that_left_ends_the_others_even_in_a_pause() -> None:
    reports: list[str] = []
    processes = Processes(index=0, count=2, hosts=("a", "b"), store=Dict())
    with Watchdog(processes, 0.4, reports.append) as watchdog, watchdog.paused():
        time.sleep(0.3)
        assert not reports
        processes.store.set("mesh-transformer/left/1", "3")
        time.sleep(0.4)
    assert reports == ["process 1 (host b) ended after an error; see what it printed"]


def test_a_process_that_falls_silent_is_lost_and_one_that_is_done_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh_transformer.processes import watchdog as module

    monkeypatch.setattr(module, "_SILENCE", 0.5)
    reports: list[str] = []

    def body(processes: Processes) -> None:
        if processes.index == 2:  # killed after its first step, as far as the others can see
            watchdog = Watchdog(processes, 0.4)
            processes.store.set(f"{watchdog._key}/2", '{"step": 6, "time": 0, "paused": false, "over": false}')
            return
        with Watchdog(processes, 0.4, reports.append) as watchdog, watchdog.paused():
            watchdog.beat(7)
            time.sleep(0.15 if processes.index else 1.2)

    assert in_threads(3, body) == [None] * 3
    (report,) = reports
    first, *others = report.splitlines()
    assert first == "process 2 (host c) is lost"
    assert others[0].startswith("process 1 (host b) was last heard at step 7")
    assert others[1].startswith("process 2 (host c) was last heard at step 6")


def test_steps_in_time_pauses_and_zero_do_not_wake_it() -> None:
    reports: list[str] = []
    with Watchdog(ONE, 0.4, reports.append) as watchdog:
        for step in range(8):
            watchdog.beat(step)
            time.sleep(0.1)
        with watchdog.paused(), watchdog.paused():
            time.sleep(0.7)
        time.sleep(0.1)
    with Watchdog(ONE, 0, reports.append):
        time.sleep(0.1)
    assert not reports
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_process_that_hangs_is_ended_with_its_stacks() -> None:
    script = (
        "import time\nfrom mesh_transformer.processes import ONE, Watchdog\n"
        "def stuck():\n    time.sleep(60)\nwith Watchdog(ONE, 0.3) as watchdog:\n    watchdog.beat(7)\n    stuck()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "error: process 0: step 8 has not finished after 0 s\n" in done.stderr and "in stuck" in done.stderr
