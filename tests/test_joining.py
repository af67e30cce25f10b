"""Joining: what the environment says, the meeting before JAX starts, and real processes that come, fail and leave."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from mesh_transformer.config.errors import ConfigError, RunError
from mesh_transformer.processes import join
from mesh_transformer.processes.meeting import come_to, receive_all
from processes_cases import environment, free_port, run_processes

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


# Process 0 holds the meeting place: if it went first, the other might end of its loss instead of the signal.
TERMINATED = """
import os, signal, time
from mesh_transformer.processes import join
p = join(lambda line: None)
other = p.exchange("number", str(os.getpid()))[1]
def ended():
    try:
        with open(f"/proc/{other}/stat") as file:
            return ") Z " in file.read()
    except FileNotFoundError:
        return True
while p.index == 0 and not ended():
    time.sleep(0.02)
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
