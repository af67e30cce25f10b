"""A client of POST /v1/completions that takes little of the machine it measures, and checks what it is answered.

A general HTTP library costs more time for each streamed piece than the server does; this one speaks just the HTTP/1.1
that it needs, one connection a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from mesh_transformer.bench.load_plan import Planned
from mesh_transformer.config.errors import UserError

_LINE_LIMIT = 4 * 2**20  # bytes of one line of a stream

_EXAMPLE = "http://127.0.0.1:8000"

# Kinds of an answer that are no failure.
DONE, VANISHED, REFUSED = "done", "vanished", "refused"


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a server is. key: sent as a bearer token."""

    host: str
    port: int
    secure: bool = False
    path: str = ""
    key: str | None = None

    @classmethod
    def of(cls, url: str, key: str | None) -> Address:
        """Of "http://HOST:PORT" or "https://HOST[:PORT]", with or without a path before /v1.

        Raises:
            UserError: it is no such URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UserError(
                f"--url {url!r} is not a URL ({error}); expected something like http://127.0.0.1:8000"
            ) from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"--url {url!r} cannot be used; expected something like {_EXAMPLE}")
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if secure else 80), secure, path, key)


@dataclasses.dataclass
class Answer:
    """What became of one request; times in seconds of time.perf_counter().

    Attributes:
        kind: DONE, VANISHED (this client left, as planned), REFUSED (429), or in a few words what failed.
        n_tokens: of the completion: what the server's usage says, else the pieces received.
        pieces: when each piece of text came.
        retry_after: seconds that a refusal asks to wait.
    """

    number: int
    begun: float
    ended: float = 0.0
    kind: str = ""
    n_tokens: int = 0
    n_cached: int = 0
    text: str = ""
    pieces: list[float] = dataclasses.field(default_factory=list)
    retry_after: float = 1.0

    @property
    def failed(self) -> bool:
        """Whether it is neither done, nor left as planned, nor refused."""
        return self.kind not in (DONE, VANISHED, REFUSED)


class _Failure(Exception):
    """The answer is not what the protocol promises; the text is the kind of failure."""


async def ask(address: Address, request: Planned, *, stream: bool, timeout: float) -> Answer:
    """Sends a request and reads its answer to the end, or leaves as planned. Failures are a kind of answer."""
    answer = Answer(request.number, time.perf_counter())
    try:
        async with asyncio.timeout(timeout):
            await _ask(address, request, stream, answer)
    except TimeoutError:
        answer.kind = "no end in time"
    except _Failure as failure:
        answer.kind = str(failure)
    except (OSError, EOFError) as error:
        answer.kind = f"connection: {type(error).__name__}"
    except (ValueError, KeyError, IndexError, TypeError, asyncio.LimitOverrunError) as error:
        answer.kind = f"unreadable answer: {type(error).__name__}"
    answer.ended = time.perf_counter()
    return answer


async def get(address: Address, path: str, *, timeout: float = 10.0) -> tuple[int, bytes]:
    """Status and body of a GET.

    Raises:
        OSError, EOFError: the server cannot be reached, or breaks off; TimeoutError among them.
    """
    async with asyncio.timeout(timeout), _sent(address, "GET", path, b"") as (reader, _):
        status, headers = await _head(reader)
        return status, b"".join([block async for block in _blocks(reader, headers)])


async def _ask(address: Address, request: Planned, stream: bool, answer: Answer) -> None:
    body = json.dumps(request.body(stream)).encode()
    async with _sent(address, "POST", "/v1/completions", body) as (reader, writer):
        status, headers = await _head(reader)
        if status == 429:
            answer.kind, answer.retry_after = REFUSED, _retry_after(headers)
        elif status != 200:
            raise _Failure(f"status {status}")
        elif stream:
            await _read_stream(reader, writer, headers, request, answer)
        else:
            whole = json.loads(b"".join([block async for block in _blocks(reader, headers)]))
            answer.pieces.append(time.perf_counter())
            answer.text = whole["choices"][0]["text"]
            _finish(answer, request, whole["choices"][0]["finish_reason"], whole["usage"])


async def _read_stream(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    headers: dict[str, str],
    request: Planned,
    answer: Answer,
) -> None:
    if not headers.get("content-type", "").startswith("text/event-stream"):
        raise _Failure("a stream that is no text/event-stream")
    finish: str | None = None
    usage: dict[str, Any] | None = None
    done = False
    texts: list[str] = []
    async for data in _events(_blocks(reader, headers)):
        if done:
            raise _Failure("more after [DONE]")
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            raise _Failure(f"error in the stream: {event['error'].get('type')}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            if choice["text"]:
                answer.pieces.append(time.perf_counter())
                texts.append(choice["text"])
            if choice["finish_reason"] is not None:
                finish = choice["finish_reason"]
        if request.vanish_after is not None and finish is None and len(answer.pieces) >= request.vanish_after:
            # Some close the connection, some are cut off: the server sees an end of file or a reset.
            if request.number % 2:
                writer.transport.abort()
            answer.kind, answer.n_tokens = VANISHED, len(answer.pieces)
            return
    if not done:
        raise _Failure("a stream without [DONE]")
    answer.text = "".join(texts)
    _finish(answer, request, finish, usage)


def _finish(answer: Answer, request: Planned, finish: str | None, usage: dict[str, Any] | None) -> None:
    """Checks that the completion is whole. `ignore_eos` was asked for, so that its length is known."""
    if usage is None:
        raise _Failure("no usage")
    answer.n_tokens = usage["completion_tokens"]
    answer.n_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if finish != "length":
        raise _Failure(f"finish_reason {finish!r} in place of 'length'")
    if answer.n_tokens != request.max_tokens or usage["prompt_tokens"] != len(request.prompt):
        raise _Failure("another number of tokens than asked for")
    answer.kind = DONE


@contextlib.asynccontextmanager
async def _sent(
    address: Address, method: str, path: str, body: bytes
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which a request has been sent; closed at the end."""
    context = ssl.create_default_context() if address.secure else None
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, limit=_LINE_LIMIT)
    host = f"[{address.host}]" if ":" in address.host else address.host
    lines = [
        f"{method} {address.path}{path} HTTP/1.1",
        f"Host: {host}:{address.port}",
        "Connection: close",
        f"Content-Length: {len(body)}",
        *(["Content-Type: application/json"] if body else []),
        *([f"Authorization: Bearer {address.key}"] if address.key else []),
    ]
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, names in lower case."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in filter(None, lines):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(first.split(" ", 2)[1]), headers


async def _blocks(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes; one that breaks off raises IncompleteReadError, an EOFError."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while block := await reader.read(2**16):
            yield block


async def _events(blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of every server-sent event."""
    held = b""
    async for block in blocks:
        *events, held = (held + block).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            lines = [line for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(line[5:].removeprefix(b" ") for line in lines)
    if held.strip():
        raise _Failure("a stream that ends within an event")


def _retry_after(headers: dict[str, str]) -> float:
    value = headers.get("retry-after", "")
    if not value.isdecimal():
        raise _Failure("429 without Retry-After in seconds")
    return float(value)
