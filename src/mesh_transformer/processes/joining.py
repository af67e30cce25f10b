"""`join`: finds out from the surroundings who takes part in this run, and meets the others.

A process alone pays nothing: JAX is not imported, no port is opened.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import socket
import time
from collections.abc import Callable, Mapping

from mesh_transformer import compat
from mesh_transformer.config.checks import shown
from mesh_transformer.config.errors import ConfigError, RunError
from mesh_transformer.processes.group import ONE, Processes
from mesh_transformer.processes.meeting import come_to, receive_all, split_address

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TIMEOUT = "MESH_TRANSFORMER_JOIN_TIMEOUT"
_BIND = "JAX_COORDINATOR_BIND_ADDRESS"
_DEFAULT_TIMEOUT = 300.0  # seconds
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LEAVING = 60  # seconds that a process at its end waits for the others to come to theirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """Where this process stands; device_ids: the local devices that are its own, None for all."""

    address: str
    count: int
    index: int
    device_ids: tuple[int, ...] | None = None

    @property
    def bind(self) -> str:
        """Where process 0 listens. At an address of this machine alone nobody else can come, nor need be let in."""
        host, port = split_address(self.address)
        return os.environ.get(_BIND) or (self.address if host in _LOOPBACK else f"[::]:{port}")


def join(report: Callable[[str], None], *, timeout: float | None = None) -> Processes:
    """The processes of this run, all of which have come when this returns. To be called before JAX computes anything.

    Looked at, in this order:

    1. `jax.distributed` is initialised already, by Ray Train for example;
    2. the environment variables JAX_COORDINATOR_ADDRESS ("host:port" of process 0), JAX_NUM_PROCESSES and
       JAX_PROCESS_ID (0 to count-1), all three; JAX_COORDINATOR_BIND_ADDRESS and JAX_LOCAL_DEVICE_IDS as JAX has them;
    3. SLURM (`srun` with more than one task), Open MPI with more than one process, a Cloud TPU slice of several hosts;
       as JAX itself recognises them;
    4. otherwise this process is alone.

    Args:
        report: told in one line what was found, if there is more than one process.
        timeout: seconds to wait for the others; None: MESH_TRANSFORMER_JOIN_TIMEOUT, or 300.

    Raises:
        ConfigError: the environment is incomplete or contradicts itself; the message names the variable.
        RunError: the others did not come in time, or the coordinator's port cannot be had.
    """
    seconds = _timeout(os.environ) if timeout is None else timeout
    if compat.is_distributed():
        return _together(report, seconds)
    place = place_in_variables(os.environ) or _from_cluster(os.environ, seconds)
    if place is None or place.count == 1:
        return ONE
    report(f"process {place.index} of {place.count}; process 0 is at {place.address}")
    _meet_and_start(place, seconds)
    processes = _together(report, seconds)
    if processes.count != place.count:
        raise RunError(
            f"JAX sees {processes.count} of {place.count} processes: its devices are not connected with each other\n"
            "On CPU set JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo; elsewhere see that JAX's plugin fits its version."
        )
    return processes


def _timeout(environment: Mapping[str, str]) -> float:
    text = environment.get(TIMEOUT, "")
    try:
        seconds = float(text) if text else _DEFAULT_TIMEOUT
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{TIMEOUT} = {shown(text)} must be a number of seconds above 0")
    return seconds


def place_in_variables(environment: Mapping[str, str]) -> _Place | None:
    """What the JAX_ variables say; None without them.

    Raises:
        ConfigError: they are incomplete or contradict themselves; the message names the variable.
    """
    values = {name: environment.get(name, "") for name in (ADDRESS, COUNT, INDEX)}
    if not any(values.values()):
        return None
    missing = [name for name, value in values.items() if not value]
    if missing:
        given = ", ".join(f"{name} = {shown(value)}" for name, value in values.items() if value)
        raise ConfigError(
            f"{' and '.join(missing)} not set, though {given}\n"
            f"Set {ADDRESS} (host:port of process 0), {COUNT} and {INDEX} (0 to count-1), or none of them."
        )
    count, index = _integer(COUNT, values[COUNT]), _integer(INDEX, values[INDEX])
    if count < 1:
        raise ConfigError(f"{COUNT} = {count} must be at least 1")
    if not 0 <= index < count:
        raise ConfigError(f"{INDEX} = {index} must lie in 0..{count - 1}, since {COUNT} = {count}")
    for name, address in ((ADDRESS, values[ADDRESS]), (_BIND, environment.get(_BIND, ""))):
        try:
            complete = not address or all(split_address(address)) or name == _BIND
        except ValueError:
            complete = False
        if not complete:
            raise ConfigError(f"{name} = {shown(address)} must be host:port, such as 10.0.0.1:8476")
    return _Place(address=values[ADDRESS], count=count, index=index)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} = {shown(text)} must be an integer") from None


def _from_cluster(environment: Mapping[str, str], timeout: float) -> _Place | None:
    if not _is_in_cluster(environment):
        return None
    try:
        found = compat.detect_cluster(math.ceil(timeout))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise RunError(
            f"the cluster around this process cannot be understood ({type(error).__name__}: {error})\n"
            f"Set {ADDRESS}, {COUNT} and {INDEX} in every process instead."
        ) from error
    if found is None:
        return None
    address, count, index, device_ids = found
    return _Place(address=address, count=count, index=index, device_ids=device_ids)


def _is_in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether it is worth importing JAX to ask it. JAX's own test of SLURM and Open MPI is also true of one task."""
    tasks = {
        "SLURM_STEP_NODELIST": environment.get("SLURM_NTASKS", "1"),
        "OMPI_MCA_orte_hnp_uri": environment.get("OMPI_COMM_WORLD_SIZE", "1"),
    }
    if any(name in environment and count != "1" for name, count in tasks.items()):
        return True
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    return "TPU_LIBRARY_PATH" in environment or importlib.util.find_spec("libtpu") is not None


def _meet_and_start(place: _Place, timeout: float) -> None:
    began = time.monotonic()
    if place.index == 0:
        receive_all(place.bind, place.count, timeout)
    else:
        come_to(place.address, place.index, place.count, timeout)
    import jax

    # JAX's preemption service, which nothing here uses, swallows SIGTERM: the process could not be asked to end.
    jax.config.update("jax_enable_preemption_service", False)
    left = timeout - (time.monotonic() - began)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.device_ids,
        # What was found is given: JAX is not to mix it with what it finds itself.
        cluster_detection_method="deactivate",
        coordinator_bind_address=place.bind,
        # All are there and about to do the same; this bounds only what may happen to them now.
        initialization_timeout=math.ceil(max(left, 30.0)),
        shutdown_timeout_seconds=_LEAVING,
    )


def _together(report: Callable[[str], None], timeout: float) -> Processes:
    import jax

    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return ONE
    processes = Processes(index=index, count=count, store=compat.KeyValueStore())
    hosts = processes.exchange("host", socket.gethostname(), timeout)
    if index == 0:
        report(f"{count} processes on {', '.join(dict.fromkeys(hosts))}")
    return dataclasses.replace(processes, hosts=tuple(hosts))
