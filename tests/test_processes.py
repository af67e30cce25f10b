"""Joining, agreeing, comparing, stopping together and being watched: threads over a dict, and real processes."""

from __future__ import annotations

import json
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
from mesh_transformer.processes import ONE, Processes, StopAgreement, Watchdog, check_same, join, version_facts
from mesh_transformer.processes.meeting import come_to, receive_all
from processes_cases import environment, free_port, run_processes


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


# ------------------------------------------------------------------------------------------------ joining

PLACE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ("127.0.0.1:9", "", ""),
            'JAX_NUM_PROCESSES and JAX_PROCESS_ID not set, though JAX_COORDINATOR_ADDRESS = "127',
        ),
        (("", "2", "1"), 'JAX_COORDINATOR_ADDRESS not set, though JAX_NUM_PROCESSES = "2", JAX_PROCESS_ID = "1"'),
        (("127.0.0.1:9", "2", ""), "JAX_PROCESS_ID not set"),
        (("127.0.0.1:9", "2", "2"), r"JAX_PROCESS_ID = 2 must lie in 0\.\.1"),
        (("127.0.0.1:9", "2", "-1"), r"JAX_PROCESS_ID = -1 must lie in 0\.\.1"),
        (("127.0.0.1:9", "0", "0"), "JAX_NUM_PROCESSES = 0 must be at least 1"),
        (("127.0.0.1:9", "two", "0"), 'JAX_NUM_PROCESSES = "two" must be an integer'),
        (("127.0.0.1", "2", "0"), 'JAX_COORDINATOR_ADDRESS = "127.0.0.1" must be host:port'),
        (("127.0.0.1:x", "2", "0"), "JAX_COORDINATOR_ADDRESS .* must be host:port"),
        (("127.0.0.1:70000", "2", "0"), "JAX_COORDINATOR_ADDRESS .* must be host:port"),
        ((":9", "2", "0"), "JAX_COORDINATOR_ADDRESS .* must be host:port"),
    ],
)
def test_an_incomplete_environment_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, values: tuple[str, ...], message: str
) -> None:
    for name, value in zip(PLACE, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        join(pytest.fail)
    assert str(caught.value).count("\n") <= 1


@pytest.mark.parametrize("seconds", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_to_wait_that_is_none(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv("MESH_TRANSFORMER_JOIN_TIMEOUT", seconds)
    with pytest.raises(ConfigError, match="MESH_TRANSFORMER_JOIN_TIMEOUT = "):
        join(pytest.fail)


ALONE = """
import sys
from mesh_transformer.processes import join, ONE
assert join(print) is ONE
assert "jax" not in sys.modules and "socket" not in dir(), "a process alone pays for the others"
"""


@pytest.mark.parametrize(
    "around",
    [
        {},
        dict(zip(PLACE, ("127.0.0.1:9", "1", "0"), strict=True)),
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # a batch script that is not under srun
        {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NODELIST": "a",
            "SLURM_NTASKS": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        },
        {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://127.0.0.1:5", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=["nothing", "one by variables", "sbatch", "one task", "one rank"],
)
def test_a_process_alone_imports_and_opens_nothing(around: dict[str, str]) -> None:
    own = environment(None, 1, 0, 1, **around)
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=60, env=own)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_slurm_and_open_mpi_are_found_by_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh_transformer.processes.joining import _from_cluster, _Place

    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[3-4]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5"}
    for name, value in (slurm | {"SLURM_LOCALID": "1"}).items():
        monkeypatch.setenv(name, value)
    found = _from_cluster(slurm, 1)
    assert found == _Place(address="n3:61447", count=8, index=5, device_ids=(1,)) and found.bind == "[::]:61447"
    for name in slurm:
        monkeypatch.delenv(name)
    mpi = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:5", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    for name, value in (mpi | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert _from_cluster(mpi, 1) == _Place(address="10.0.0.1:61441", count=2, index=1, device_ids=(0,))


def test_the_coordinator_on_this_machine_is_open_to_it_alone() -> None:
    from mesh_transformer.processes.joining import _Place

    for host, bind in {"127.0.0.1": "127.0.0.1:9", "[::1]": "[::1]:9", "10.0.0.1": "[::]:9"}.items():
        assert _Place(address=f"{host}:9", count=2, index=0).bind == bind


# ------------------------------------------------------------------------------------------------ meeting


def meet(count: int, come: dict[int, tuple[int, int]], seconds: float = 10) -> list[Exception | None]:
    """Process 0 for `count`, and others who come as (index, count); what each raised."""
    port = free_port()

    def run(call: Callable[[], None]) -> Exception | None:
        try:
            call()
        except Exception as error:
            return error
        return None

    calls: list[Callable[[], None]] = [lambda: receive_all(f"127.0.0.1:{port}", count, seconds)]
    for index, their_count in come.values():
        calls.append(lambda i=index, n=their_count: come_to(f"127.0.0.1:{port}", i, n, seconds))  # type: ignore[misc]
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_all_meet() -> None:
    assert meet(5, {i: (i, 5) for i in range(1, 5)}) == [None] * 5


def test_who_did_not_come_is_named_on_every_side() -> None:
    for error in meet(5, {2: (2, 5), 4: (4, 5)}, seconds=0.5):
        assert type(error) is RunError
        assert "only 3 of 5 processes came to 127.0.0.1:" in str(error) and "missing: 1, 3\n" in str(error)
        assert str(error).count("\n") == 1


@pytest.mark.parametrize(
    ("come", "message"),
    [({1: (1, 3)}, "process 1 counts 3 processes, process 0 counts 4"), ({1: (1, 4), 2: (1, 4)}, "with index 1")],
)
def test_processes_that_contradict_each_other(come: dict[int, tuple[int, int]], message: str) -> None:
    for error in meet(4, come):
        assert type(error) is ConfigError and message in str(error)


def test_strangers_at_the_port_do_no_harm() -> None:
    import socket

    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        zero = pool.submit(receive_all, f"127.0.0.1:{port}", 2, 10)
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"null\n", b'{"index": "x"}\n', b"x" * 9000, b""):
            while True:
                try:
                    stranger = socket.create_connection(("127.0.0.1", port))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
            with stranger:
                stranger.sendall(data)
        come_to(f"127.0.0.1:{port}", 1, 2, 10)
        zero.result()


def test_a_coordinator_that_is_not_there() -> None:
    port = free_port()
    began = time.monotonic()
    with pytest.raises(
        RunError, match=rf"process 1 of 2: process 0 could not be reached at 127.0.0.1:{port} in 1 s \("
    ):
        come_to(f"127.0.0.1:{port}", 1, 2, 0.6)
    assert time.monotonic() - began < 5


def test_a_port_that_is_taken() -> None:
    import socket

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(RunError, match=r"process 0 cannot listen at port \d+ of 127.0.0.1: another program uses it\n"),
    ):
        receive_all(f"127.0.0.1:{taken.getsockname()[1]}", 2, 1)


# ------------------------------------------------------------------------------------------------ real processes

TOGETHER = """
import json, sys
from mesh_transformer.processes import check_same, join
from mesh_transformer.config.errors import MeshTransformerError
lines = []
p = join(lines.append)
values = p.exchange("x", f"v{p.index}")
try:
    with p.agree("work"):
        if p.index == 1:
            raise FileNotFoundError("not here")
except Exception as error:
    told = f"{type(error).__name__}: {error}"
try:
    check_same(p, {"configuration": f"steps = {p.index}"})
except MeshTransformerError as error:
    differ = str(error)
again = join(lines.append)
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("data",))
x = jax.make_array_from_callback((4,), NamedSharding(mesh, P("data")), lambda i: jnp.arange(4.0)[i])
total = float(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(x))
print(json.dumps([p.index, p.count, again.count, len(p.hosts), values, told, differ, total, len(lines)]))
"""


def test_two_processes_join_and_compute_together() -> None:
    for index, ended in enumerate(run_processes(TOGETHER)):
        assert ended.status == 0, ended.stderr
        own, count, again, hosts, values, told, differ, total, lines = json.loads(ended.stdout.splitlines()[-1])
        assert (own, count, again, hosts, values, total) == (index, 2, 2, 2, ["v0", "v1"], 6.0)
        assert ("FileNotFoundError: not here" if index else "RunError: process 1 (host ") in told
        assert differ.startswith("configuration of process 1 (host ") and '"steps = 1" instead of "steps = 0"' in differ
        assert lines == (1 if index else 3)


KILLED = """
import os, signal, sys
from mesh_transformer.processes import end_after_error, join
from mesh_transformer.config.errors import RunError
p = join(print)
if p.index == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    p.barrier("before the first step", 2)
except RunError as error:
    print(error)
    end_after_error(3, 0.5)
"""


def test_a_killed_process_does_not_hold_the_others_at_a_barrier() -> None:
    first, second = run_processes(KILLED, timeout=60)
    assert second.status == -signal.SIGKILL
    # The exit status is its own: it did not wait for the dead at its end, as JAX does.
    assert first.status == 3, first.stderr
    assert "before the first step: process 1 (host " in first.stdout and "did not answer in 2 s" in first.stdout


LEFT_ALONE = """
import sys, time
from mesh_transformer.processes import Watchdog, end_after_error, join, watchdog
p = join(lambda line: None)
watchdog._LONGEST_LOOK = 0.2
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("data",))
x = jax.make_array_from_callback((4,), NamedSharding(mesh, P("data")), lambda i: jnp.arange(4.0)[i])
step = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
step(x).block_until_ready()
if p.index == 1:
    end_after_error(3, 0.5)
with Watchdog(p, 0):
    step(x).block_until_ready()
print("finished")
"""


def test_a_process_that_fails_alone_ends_the_step_of_the_others() -> None:
    first, second = run_processes(LEFT_ALONE, timeout=60)
    assert (first.status, second.status) == (1, 3), first.stderr + second.stderr
    assert "finished" not in first.stdout
    assert "error: process 1 (host " in first.stderr and "ended after an error" in first.stderr


TERMINATED = """
import os, signal
from mesh_transformer.processes import join
p = join(lambda line: None)
p.barrier("both are here")
os.kill(os.getpid(), signal.SIGTERM)
signal.pause()
"""


def test_a_process_that_has_joined_can_still_be_terminated() -> None:
    assert [each.status for each in run_processes(TERMINATED, timeout=60)] == [-signal.SIGTERM] * 2


WAITING = """
import sys
from mesh_transformer.processes import join
from mesh_transformer.config.errors import RunError
try:
    join(lambda line: None)
except RunError as error:
    print(error)
    sys.exit(error.exit_status)
"""


@pytest.mark.parametrize(
    ("only", "message"), [(0, "only 1 of 2 processes came"), (1, "process 0 could not be reached at 127.0.0.1:")]
)
def test_a_process_whose_others_never_come_ends_with_an_error(only: int, message: str) -> None:
    (ended,) = run_processes(WAITING, only=[only], variables={only: {"MESH_TRANSFORMER_JOIN_TIMEOUT": "1"}})
    assert ended.status == 1, ended.stderr
    assert message in ended.stdout and ended.stdout.count("\n") == 2 and not ended.stderr
