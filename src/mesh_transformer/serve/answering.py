"""Answering a request for texts: whole or as a stream, in whatever shape its protocol has."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mesh_transformer.engine.request import Output
from mesh_transformer.serve.answers import ChoiceText, Piece, usage_object
from mesh_transformer.serve.asking import Asked
from mesh_transformer.serve.bridge import Submission, unless_gone
from mesh_transformer.serve.errors import ApiError, ClientGone
from mesh_transformer.serve.reading import read_body
from mesh_transformer.serve.served import Served

# Work on more than this (bytes of a body, tokens of a prompt) would be felt by the streams of others.
_MUCH_TO_READ = 16_384
MUCH_TO_WRITE = 64


async def respond(
    request: HttpRequest,
    served: Served,
    ask: Callable[[bytes, Served], Asked],
    shape: type[Answer],
    *,
    apart: bool = False,
) -> Response:
    """Answers a request.

    Args:
        ask: what its body asks for.
        shape: of the answer.
        apart: whether a body is always looked at on another thread, and not only a large one.

    Raises:
        ApiError: the request cannot be served; nothing has been sent.
        ClientGone: the client went away; its completions are cancelled.
    """
    body = await read_body(request, served.options)
    if apart or len(body) > _MUCH_TO_READ:
        asked = await asyncio.to_thread(ask, body, served)
    else:
        asked = ask(body, served)
    answer = shape(asked, served)
    if asked.stream:
        return _EventStream(answer, served)
    try:
        whole = await unless_gone(answer.whole(), request.receive)
    finally:
        answer.cancel()
    return Response(_written(whole), media_type="application/json")


class Answer(abc.ABC):
    """The completions of one request, submitted when it is made; their shape is the subclass's.

    Attributes:
        prefix: of its id.
        kind, kind_of_chunk: what it calls itself, whole and as a stream.
    """

    prefix: str
    kind: str
    kind_of_chunk: str

    def __init__(self, asked: Asked, served: Served) -> None:
        self.asked, self.served = asked, served
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        echoed = asked.echo and asked.logprobs is not None
        self._choices = [
            ChoiceText(
                served.model.tokenizer,
                echo=asked.texts[i // asked.n] if asked.echo else None,
                # Of an empty prompt nothing is echoed, the end-of-text that it stands for neither.
                echoed=echoed and bool(asked.prompts[i // asked.n]),
                n_before=asked.before[i // asked.n],
            )
            for i in range(len(asked.requests))
        ]
        self._submission = Submission(served, asked.requests)

    @abc.abstractmethod
    async def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice of the whole answer."""

    @abc.abstractmethod
    async def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """What a piece of a choice is in a stream."""

    def openings(self) -> list[dict[str, Any]]:
        """What a stream says of its choices before there is any text."""
        return []

    def cancel(self) -> None:
        """Frees what the request holds; without effect once all of it has ended."""
        self._submission.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        async for index, piece in self._pieces():
            pieces[index].append(piece)
        choices = []
        for index, several in enumerate(pieces):
            entries = tuple(entry for piece in several for entry in piece.entries)
            text, n_ended = "".join(piece.text for piece in several), several[-1].n_ended
            choices.append(await self.choice(index, Piece(text, entries, several[-1].finish_reason, n_ended)))
        return {**self._head(self.kind), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        head = self._head(self.kind_of_chunk)
        more: dict[str, Any] = {"usage": None} if self.asked.include_usage else {}
        for opening in self.openings():
            yield _event({**head, "choices": [opening], **more})
        async for index, piece in self._pieces():
            yield _event({**head, "choices": [await self.part(index, piece)], **more})
        if self.asked.include_usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        facts = {"created": self._created, "model": self.served.options.name}
        return {"id": self._id, "object": kind, **facts, "system_fingerprint": self.served.fingerprint}

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        async for index, output in self._submission.outputs():
            piece = await self._add(index, output)
            if not piece.empty:
                yield index, piece

    async def _add(self, index: int, output: Output) -> Piece:
        if len(output.prompt_logprobs or ()) > MUCH_TO_WRITE:
            return await asyncio.to_thread(self._choices[index].add, output)
        return self._choices[index].add(output)

    def _usage(self) -> dict[str, Any]:
        n, requests = self.asked.n, self.asked.requests
        # The samples of a prompt share it: it is counted once, and as cached only where it was before the first.
        cached = sum(min(c.n_cached for c in self._choices[i : i + n]) for i in range(0, len(requests), n))
        read = sum(len(request.prompt) for request in requests[::n])
        return usage_object(read, sum(choice.n_tokens for choice in self._choices), cached)


class _EventStream(Response):
    """Server-sent events; ends the completions when the client does not want them any more."""

    def __init__(self, answer: Answer, served: Served) -> None:
        super().__init__(
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self._answer, self._served = answer, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._served.metrics.streams.inc()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(self._send_all(send), receive)
        except ClientGone:
            self._served.metrics.gone.inc()
        finally:
            self._answer.cancel()
            self._served.metrics.streams.dec()

    async def _send_all(self, send: Send) -> None:
        try:
            # Closed here, and not when somebody collects the garbage.
            async with contextlib.aclosing(self._answer.events()) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApiError as error:
            # The status has been sent: what is left is an event that clients know as an error, and the end.
            await send({"type": "http.response.body", "body": _event(error.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _written(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _event(value: Any) -> bytes:
    return b"data: " + _written(value) + b"\n\n"
