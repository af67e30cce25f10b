"""The real server before the fake engine, on a thread; and clients that speak through a bare socket."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from fake_engine import TOKENIZER, FakeService
from serve_cases import CONFIG

from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.serve.options import ServeOptions
from mesh_transformer.serve.run import Server, bind
from mesh_transformer.serve.served import ModelFacts, Served

DEADLINE = 60.0


class ServerThread:
    """A server at a free port; a context manager."""

    def __init__(
        self, *, held: bool = True, send_buffer: int | None = None, tokenizer: Tokenizer = TOKENIZER, **options: Any
    ) -> None:
        self.service = FakeService(held=held)
        facts = ModelFacts(config=CONFIG, tokenizer=tokenizer)
        self.served = Served(facts, self.service, ServeOptions(**{"name": "tiny", **options}))  # type: ignore[arg-type]
        self.bound = bind("127.0.0.1", 0)
        if send_buffer is not None:
            self.bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.address = self.bound.getsockname()
        self.notes: list[str] = []
        self.server = Server(self.served, self.bound, self.notes.append)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.bound]})

    def __enter__(self) -> ServerThread:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """A connection; closing it is the caller's."""
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(DEADLINE)
        client.connect(self.address)
        return client

    def submitted(self) -> Any:
        """The next group that the engine gets."""
        return self.service.submitted.get(timeout=DEADLINE)


def post(path: str, body: Any, *more: str) -> bytes:
    """A request; `body` is JSON unless it is bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*head, *more, "", ""]).encode() + content


def read_until(client: socket.socket, wanted: bytes) -> bytes:
    """What arrives until it holds `wanted`, or the connection ends."""
    found = b""
    while wanted not in found and (part := client.recv(65536)):
        found += part
    return found


def read_all(client: socket.socket) -> bytes:
    """What arrives until the connection ends."""
    return read_until(client, b"\0 never \0")


def wait_for(true: Callable[[], bool]) -> None:
    """Returns once `true()`; fails after a deadline."""
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
