"""A server that answers the page as the real one does, with everything else in the hands of a test.

It holds no model: `PageServer.answer` says what the next completion streams. Gates in a stream wait until the test
opens them, so that a test decides what has come and what has not.
"""

from __future__ import annotations

import dataclasses
import json
import mimetypes
import re
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mesh_transformer

PAGE = Path(mesh_transformer.__file__).parent / "serve" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MODEL = {"object": "list", "data": [{"id": "geese-6b", "object": "model", "created": 0, "max_model_len": 2048}]}
_LONGEST = 30.0  # seconds that anything is waited for


class Gate(threading.Event):
    """A place in a stream where the server waits for the test."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a completion: how it is named, the text that becomes certain with it, its alternatives."""

    name: str
    text: str
    offset: int
    top: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def logprob(self) -> float:
        """Its own, among the alternatives."""
        return self.top.get(self.name, -1.0)


@dataclasses.dataclass
class Answer:
    """What a request for a completion gets: pieces of the body in turn, and gates."""

    body: Sequence[bytes | Gate] = ()
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=lambda: {"Content-Type": "text/event-stream"})
    breaks: bool = False  # whether the connection is cut off instead of ended
    pace: float = 0.0  # seconds before each piece


def words(text: str) -> list[Token]:
    """A token for each word of a text with the space before it, and each line's end."""
    tokens = []
    at = 0
    for name in re.findall(r"\n| ?[^ \n]+", text):
        top = {name: -0.4, " perhaps": -2.0, "\n": -3.0, " naïve": -4.0, "<|endoftext|>": -6.0}
        tokens.append(Token(name, name, at, top))
        at += len(name)
    return tokens


def chunk(token: Token | None = None, *, text: str = "", finish: str | None = None) -> bytes:
    """One event of a stream, in the shape of the server's."""
    logprobs = None
    if token:
        logprobs = {"tokens": [token.name], "token_logprobs": [token.logprob], "top_logprobs": [token.top]}
        logprobs["text_offset"] = [token.offset]
        text = token.text
    choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish}
    return event({"id": "cmpl-1", "object": "text_completion", "model": "geese-6b", "choices": [choice]})


def event(data: Any) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def ending(n_tokens: int, finish: str = "length", prompt_tokens: int = 7) -> list[bytes]:
    """What follows the last token."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": n_tokens, "total_tokens": prompt_tokens + n_tokens}
    return [chunk(finish=finish), event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


def completion(
    tokens: Sequence[Token], *, finish: str = "length", prompt_tokens: int = 7, gates: dict[int, Gate] | None = None
) -> Answer:
    """A whole completion; `gates` stand before the tokens of their numbers."""
    body: list[bytes | Gate] = []
    for i, token in enumerate(tokens):
        if gates and i in gates:
            body.append(gates[i])
        body.append(chunk(token))
    return Answer([*body, *ending(sum(bool(token.text) for token in tokens), finish, prompt_tokens)])


def refusal(status: int, message: str, **headers: str) -> Answer:
    """An error in OpenAI's shape."""
    body = json.dumps({"error": {"message": message, "type": "error", "param": None, "code": None}}).encode()
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer([body], status, {"Content-Type": "application/json"} | more)


class PageServer(ThreadingHTTPServer):
    """Serves the page on a free port of this machine.

    Attributes:
        answer: what a request for a completion gets.
        health: status and body of /health.
        key: the API key that is asked for, or none.
        n_completions: how many have been asked for.
        gone: set when the browser has left a completion that was not yet whole.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self.answer = completion(words("They flew south."))
        self.health: tuple[int, dict[str, str]] = (200, {"status": "ok"})
        self.key: str | None = None
        self.n_completions = 0
        self.gone = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PageServer
    connection: socket.socket

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/health":
            self._json(*self.server.health)
        elif path == "/v1/models":
            if self._allowed():
                self._json(200, MODEL)
        else:
            name = "index.html" if path == "/" else path.removeprefix("/page/")
            found = PAGE / name
            if (path != "/" and not path.startswith("/page/")) or not found.is_file():
                self._json(404, {"error": {"message": f"there is nothing at {path}"}})
                return
            kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0] or ""
            self._whole(200, found.read_bytes(), {"Content-Type": f"{kind}; charset=utf-8"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self._allowed():
            return
        self.server.n_completions += 1
        answer = self.server.answer
        if answer.status != 200:
            self._whole(answer.status, b"".join(p for p in answer.body if isinstance(p, bytes)), answer.headers)
            return
        try:
            self._stream(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()
            self.close_connection = True

    def _stream(self, answer: Answer) -> None:
        self.send_response(200)
        for name, value in (answer.headers | {"Transfer-Encoding": "chunked"}).items():
            self.send_header(name, value)
        self.end_headers()
        for piece in answer.body:
            time.sleep(answer.pace)
            if isinstance(piece, Gate):
                self._wait(piece)
            else:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
        if answer.breaks:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _wait(self, gate: Gate) -> None:
        """Until the test opens it or the browser leaves."""
        for _ in range(int(_LONGEST / 0.01)):
            if gate.wait(0.01):
                return
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise BrokenPipeError
        raise TimeoutError("nobody opened the gate")

    def _allowed(self) -> bool:
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self._json(401, {"error": {"message": "a key is needed"}})
        return False

    def _json(self, status: int, body: dict[str, Any]) -> None:
        self._whole(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _whole(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        headers = headers | {"Content-Length": str(len(body)), "X-Content-Type-Options": "nosniff"}
        for name, value in (headers | {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests have no use for a log."""


@contextmanager
def serving() -> Iterator[PageServer]:
    """A server that runs until the end of the block."""
    with PageServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def cut(data: bytes, sizes: Iterable[int]) -> list[bytes]:
    """Data in pieces of the given sizes, the rest last."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return [piece for piece in [*pieces, data[at:]] if piece]
