"""The server as a process: its socket, its signals, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from mesh_transformer.config.errors import UserError
from mesh_transformer.data.chat import prepare
from mesh_transformer.serve.app import make_app
from mesh_transformer.serve.served import Served

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 30
# Beyond shutdown_timeout: for what was cut to be told to its clients.
_SECONDS_TO_TELL = 5

Note = Callable[[str], None]


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which does not listen yet; port 0 takes any free one.

    Raises:
        UserError: no such host, not this machine's, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise UserError(f"--host {host}: no such host ({error})\ngive an address of this machine") from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    # So that a server can be started again at once.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    return UserError(
        f"cannot listen at {host} port {port}: {error.strerror or error}\n"
        "give another --port (0 takes any free one), or another --host"
    )


def url_of(bound: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches a bound socket."""
    host = bound.getsockname()[0]
    return host.startswith("127.") or host == "::1"


def run(served: Served, bound: socket.socket, note: Note) -> int:
    """Serves until a signal: its exit status.

    0 after SIGTERM or SIGINT if all that ran was finished, 128 and the signal's number if `shutdown_timeout` cut
    something off; 1 if the engine has ended by itself, so that a supervisor starts another server. A second signal ends
    the process at once.

    Raises:
        UserError: meanwhile another process listens at the address.
    """
    server = Server(served, bound, note)
    served.service.start()
    server.run(sockets=[bound])
    status = 1 if server.engine_ended else 0 if server.finished else 128 + server.stopped_by
    if server.force_exit or server.abandoned:
        # The engine's thread may be in the middle of a compilation, which nothing interrupts.
        sys.stderr.flush()
        os._exit(status)
    return status


def _listen(bound: socket.socket, write_timeout: float) -> None:
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # The system closes the connections that WriteTimeout has given up; accepted sockets inherit it.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(write_timeout * 1000))
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        raise _cannot_listen(bound.getsockname()[0], bound.getsockname()[1], error) from error


class Server(uvicorn.Server):
    """Ends without dying of the signal that ended it, and closes the engine while the connections finish.

    Raises:
        UserError: another process listens at the address.
    """

    def __init__(self, served: Served, bound: socket.socket, note: Note) -> None:
        options = served.options
        _listen(bound, options.write_timeout)
        config = uvicorn.Config(
            make_app(served),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # what anybody can send is no news
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(options.shutdown_timeout) + _SECONDS_TO_TELL,
        )
        super().__init__(config)
        self._served, self._note, self._begun = served, note, time.monotonic()
        self._told_ready = False
        self.stopped_by: int = signal.SIGTERM
        self.finished = self.abandoned = self.engine_ended = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Tests run it on other threads, where no handlers can be set.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks for the end, a second one does not wait for it."""
        self.force_exit = self.should_exit
        self.should_exit, self.stopped_by = True, sig
        self._served.stopping = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says where; from here on signals are answered."""
        if self._served.model.tokenizer is not None:
            # So that no first conversation waits, and a template that cannot be used is known of.
            for wrong in await asyncio.to_thread(prepare, self._served.model.tokenizer):
                self._note(f"warning: {wrong}; chats that need it are refused")
        url = url_of((sockets or [])[0])
        await super().startup(sockets)
        self._note(f"serving {self._served.options.name} at {url}")

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        ready = self._served.service.ready
        if not self._told_ready and ready:
            self._told_ready = True
            self._note(f"ready after {time.monotonic() - self._begun:.1f} s of warming up")
        if counter % 10 == 0 and not ready and self._served.engine_ended():
            self.engine_ended = self.should_exit = True
            self._note("the engine has ended; what is logged above says why")
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes nothing more, finishes what runs, and says what had to be cut off."""
        self._served.stopping = True
        if not (self._told_ready or self.engine_ended or self._served.service.load().waiting):
            self._note("stopping before it was ready; nothing was asked")
            self.finished = self.abandoned = True
            await super().shutdown(sockets)
            return
        self._note("stopping: finishing what runs")
        closed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def close() -> None:
            self.finished = self._served.service.close(self._served.options.shutdown_timeout)
            loop.call_soon_threadsafe(closed.set)

        # A thread of its own, for the loop would wait for one from its pool even after a second signal.
        threading.Thread(target=close, name="closing", daemon=True).start()
        await super().shutdown(sockets)
        while not self.force_exit and not closed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(closed.wait(), 0.1)
        if not self.finished:
            self._note("stopped before everything was finished")
