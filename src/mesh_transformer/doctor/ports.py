"""Whether the ports that a command will listen at are free, and whether the coordinator of a run can be found."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping

from mesh_transformer.doctor.finding import Finding, failed, ok
from mesh_transformer.processes.joining import place_in_variables
from mesh_transformer.processes.meeting import split_address

_ANY = "::"


def check_port(port: int, host: str = "127.0.0.1") -> Iterator[Finding]:
    """Whether `serve --port` can have this port."""
    yield _free(f"port {port}", host, port, "give `serve` another --port")


def check_coordinator(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Where several processes are configured by variables: the coordinator's port on its own machine, elsewhere its
    name. What SLURM, Open MPI or Cloud TPU configure is not looked at.
    """
    place = place_in_variables(environment)
    if place is None or place.count == 1:
        return
    name = f"coordinator {place.address}"
    host, port = split_address(place.address)
    if place.index == 0:
        bind_host, bind_port = split_address(place.bind)
        yield _free(name, bind_host or _ANY, bind_port or port, "give JAX_COORDINATOR_ADDRESS another port everywhere")
        return
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        mend = "write an address that this machine knows in JAX_COORDINATOR_ADDRESS, such as 10.0.0.1:8476"
        yield failed(name, f"the name {host} is not known here ({error.strerror})", mend)
        return
    yield ok(name, f"{host} is {found[0][4][0]}; whether process 0 listens there shows when the run begins")


def _free(name: str, host: str, port: int, mend: str) -> Finding:
    try:
        with _bound(host, port):
            return ok(name, "free")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            held = "in use by another process"
            return failed(name, held, f"{mend}, or end that process (ss -ltnp 'sport = :{port}' names it)")
        if error.errno == errno.EACCES:
            return failed(name, "below 1024, which only root may use", f"{mend}, 1024 or above")
        return failed(name, f"cannot be listened at ({error.strerror})", mend)


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            # As a server does it: a connection that was closed a moment ago holds the port for nobody.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
