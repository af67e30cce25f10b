"""All processes of a run meet at the coordinator's address before JAX starts there.

JAX's own coordination service ends the whole process from C++ when somebody does not come in time, without a word on
who. So process 0 first listens at the address itself and hears out every other process; when all are there it closes
the port, tells them to go, and JAX takes the port over.

The other processes say one line of JSON, {"index", "count"}, and hear one: {} to go, or {"error", "message"}.
"""

from __future__ import annotations

import contextlib
import errno
import json
import selectors
import socket
import time
from collections.abc import Iterable
from typing import NoReturn

from mesh_transformer.config.errors import ConfigError, MeshTransformerError, RunError

_LONGEST_LINE = 4096  # bytes
_PAUSE = 0.2  # seconds between two attempts to reach process 0
_CONNECT = 5.0  # seconds for one attempt
_LAST_WORDS = 2.0  # seconds for the others to close their connections


def receive_all(bind: str, count: int, timeout: float) -> None:
    """Process 0's part: returns when processes 1 to count-1 are all there and were told to go.

    Args:
        bind: "host:port" to listen at; an empty host: all of this machine's addresses.
        timeout: seconds to wait for them.

    Raises:
        ConfigError: one came with another number of processes, or two with one index. The others hear of it too.
        RunError: the port cannot be had, or some did not come; the message names them.
    """
    deadline = time.monotonic() + timeout
    host, port = split_address(bind)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(host, port))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(listener, selectors.EVENT_READ)
        heard: dict[socket.socket, bytes] = {}
        arrived: dict[int, socket.socket] = {}
        while len(arrived) < count - 1:
            if (left := deadline - time.monotonic()) <= 0:
                missing = [index for index in range(1, count) if index not in arrived]
                came = f"{len(arrived) + 1} of {count} processes came to {bind} in {timeout:.0f} s"
                _refuse(heard, RunError(f"only {came}; missing: {', '.join(map(str, missing))}\n{_CAUSES}"))
            for key, _ in selector.select(min(1.0, left)):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is listener:
                    connection = stack.enter_context(listener.accept()[0])
                    selector.register(connection, selectors.EVENT_READ)
                    heard[connection] = b""
                elif (data := _receive(connection)) and len(heard[connection]) < _LONGEST_LINE:
                    heard[connection] += data
                    if data.endswith(b"\n"):
                        _arrive(heard, arrived, connection, count)
                else:  # it left, or is none of ours
                    selector.unregister(connection)
                    connection.close()
                    del heard[connection]
                    arrived = {index: each for index, each in arrived.items() if each is not connection}
        # The port is free before anybody is told to use it, and they close first, so that it is free at once.
        selector.unregister(listener)
        listener.close()
        _say(arrived.values(), {})


def come_to(address: str, index: int, count: int, timeout: float) -> None:
    """The part of processes 1 to count-1: returns when process 0 says that all are there.

    Raises:
        ConfigError: process 0 has another number of processes, or another came with this index.
        RunError: process 0 was not there in time, or others were not.
    """
    deadline = time.monotonic() + timeout
    host, port = split_address(address)
    last = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(_CONNECT, left)) as connection:
                connection.sendall(json.dumps({"index": index, "count": count}).encode() + b"\n")
                # Process 0 may have begun its wait later than this process did.
                answer = _answer(connection, deadline + timeout)
        except OSError as error:
            last = error.strerror or str(error)
        else:
            if answer is not None:
                return _obey(answer)
            last = "what answers there is not process 0 of this run, or it ended"
        time.sleep(min(_PAUSE, max(0.0, deadline - time.monotonic())))
    raise RunError(
        f"process {index} of {count}: process 0 could not be reached at {address} "
        f"in {timeout:.0f} s ({last})\n{_CAUSES}"
    )


_CAUSES = (
    "Start all processes, with one address that all reach and a port that no firewall closes; "
    "MESH_TRANSFORMER_JOIN_TIMEOUT sets the seconds to wait."
)


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" or "[IPv6]:port" as (host, port). Raises ValueError where there is no port in 1..65535."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} has no port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _listen(host: str, port: int) -> socket.socket:
    try:
        if host in ("", "::"):
            if socket.has_dualstack_ipv6():
                return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            host = ""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = "another program uses it" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise RunError(
            f"process 0 cannot listen at port {port}{f' of {host}' if host else ''}: {reason}\n"
            "Give the coordinator another port, and an address of the machine that process 0 runs on."
        ) from error


def _arrive(
    heard: dict[socket.socket, bytes], arrived: dict[int, socket.socket], connection: socket.socket, count: int
) -> None:
    try:
        said = json.loads(heard[connection])
        index, their_count = int(said["index"]), int(said["count"])
    except (ValueError, TypeError, KeyError):  # none of ours: it is not answered
        return
    if their_count != count or not 0 < index < count:
        _refuse(
            heard,
            ConfigError(
                f"process {index} counts {their_count} processes, process 0 counts {count}\n"
                "Give all processes the same number, and each an index of its own below it."
            ),
        )
    if index in arrived:
        _refuse(
            heard,
            ConfigError(
                f"two processes came with index {index}\nGive each process an index of its own, from 0 to {count - 1}."
            ),
        )
    arrived[index] = connection


def _refuse(heard: dict[socket.socket, bytes], error: MeshTransformerError) -> NoReturn:
    _say(heard, {"error": type(error).__name__, "message": str(error)})
    raise error


def _say(listeners: Iterable[socket.socket], message: dict[str, str]) -> None:
    connections = list(listeners)
    deadline = time.monotonic() + _LAST_WORDS
    line = json.dumps(message).encode() + b"\n"
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(line)
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            while connection.recv(_LONGEST_LINE):
                pass


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_LONGEST_LINE)
    except OSError:
        return b""


def _answer(connection: socket.socket, deadline: float) -> dict[str, str] | None:
    """What process 0 says; None if it closes without a word or says something else."""
    data = b""
    while not data.endswith(b"\n") and len(data) < _LONGEST_LINE:
        if (left := deadline - time.monotonic()) <= 0:
            return None
        connection.settimeout(min(1.0, left))  # signals are seen in between
        try:
            more = connection.recv(_LONGEST_LINE)
        except TimeoutError:
            continue
        if not more:
            return None
        data += more
    try:
        answer = json.loads(data)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _obey(answer: dict[str, str]) -> None:
    if answer:
        kind = ConfigError if answer.get("error") == "ConfigError" else RunError
        raise kind(answer.get("message", "process 0 gave up"))
