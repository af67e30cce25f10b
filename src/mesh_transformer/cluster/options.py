"""How a launch is asked for, checked before Ray is started."""

from __future__ import annotations

import dataclasses
import os
import secrets
import socket

from mesh_transformer.config import checks
from mesh_transformer.config.errors import ConfigError

_CONNECT_TIMEOUT = 10.0  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Which workers, and how long to try.

    Attributes:
        workers: processes, one for each host where hosts have accelerators.
        address: "host:port" of a running cluster, or "auto" for the one on this machine; None: a local one is started.
        devices_per_worker: GPUs or TPU chips of a worker, or devices that JAX makes of its CPU.
        max_failures: times that failed workers are replaced.
        worker_timeout: seconds without a sign of life after which a worker counts as dead, and that workers may need
            to start.

    Raises:
        ConfigError: a value is impossible; the message names the option.
    """

    workers: int
    address: str | None = None
    devices_per_worker: int = 1
    max_failures: int = 3
    worker_timeout: float = 100.0

    def __post_init__(self) -> None:
        checks.check_count("--workers", self.workers, 1)
        checks.check_count("--devices-per-worker", self.devices_per_worker, 1)
        checks.check_count("--max-failures", self.max_failures, 0)
        checks.check_number("--worker-timeout", self.worker_timeout, positive=True)


def check_address(address: str) -> None:
    """Refuses an address where nobody answers: Ray itself would wait for minutes and then end the process.

    Raises:
        ConfigError: it is no address, or no connection can be made within ten seconds.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ConfigError(
            f"--address {checks.shown(address)} is no address of a cluster; expected host:port, such as 10.0.0.1:6379\n"
            "it is what `ray start --head` prints; leave --address out to start a local cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--address {address}: nothing answers there ({error})\n"
            "start a cluster with `ray start --head`, or leave --address out to start a local one"
        ) from error


def prepare_environment(options: ClusterOptions) -> None:
    """Ray's settings, which it reads from the environment when it is imported and when it starts processes."""
    timeout = str(options.worker_timeout)
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line a second time
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": timeout,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": timeout,
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": timeout,
    }
    if options.address is None:
        # By the name of what it was made for: no cluster beyond this machine, so that all listen on loopback only.
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
            # Ray would leave a token in the home directory; this one ends with the cluster.
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.update(settings)
