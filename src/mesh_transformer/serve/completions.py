"""POST /v1/completions: whole answers and streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mesh_transformer.engine.request import Output
from mesh_transformer.serve.answers import ChoiceText, Piece, logprobs_object, usage_object
from mesh_transformer.serve.asking import Asked, ask
from mesh_transformer.serve.bridge import Submission, unless_gone
from mesh_transformer.serve.errors import ApiError, ClientGone
from mesh_transformer.serve.reading import read_body
from mesh_transformer.serve.served import Served

# Work on more than this (bytes of a body, tokens of a prompt) would be felt by the streams of others.
_MUCH_TO_READ = 16_384
_MUCH_TO_WRITE = 64


async def complete(request: HttpRequest, served: Served) -> Response:
    """Answers a request for completions.

    Raises:
        ApiError: the request cannot be served; nothing has been sent.
        ClientGone: the client went away; its completions are cancelled.
    """
    body = await read_body(request, served.options)
    if len(body) > _MUCH_TO_READ:
        asked = await asyncio.to_thread(ask, body, served)
    else:
        asked = ask(body, served)
    completions = _Completions(asked, served)
    if asked.stream:
        return _EventStream(completions, served)
    try:
        answer = await unless_gone(completions.whole(), request.receive)
    finally:
        completions.cancel()
    return Response(_written(answer), media_type="application/json")


class _Completions:
    """The completions of one request, submitted when it is made."""

    def __init__(self, asked: Asked, served: Served) -> None:
        self._asked, self._served = asked, served
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.options.name,
            "system_fingerprint": served.fingerprint,
        }
        echoed = asked.echo and asked.logprobs is not None
        self._choices = [
            ChoiceText(
                served.model.tokenizer,
                echo=asked.texts[i // asked.n] if asked.echo else None,
                # Of an empty prompt nothing is echoed, the end-of-text that it stands for neither.
                echoed=echoed and bool(asked.prompts[i // asked.n]),
            )
            for i in range(len(asked.requests))
        ]
        self._submission = Submission(served, asked.requests)

    def cancel(self) -> None:
        self._submission.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        async for index, piece in self._pieces():
            pieces[index].append(piece)
        choices = []
        for index, several in enumerate(pieces):
            entries = tuple(entry for piece in several for entry in piece.entries)
            reason = several[-1].finish_reason
            choices.append(await self._choice(index, Piece("".join(p.text for p in several), entries, reason)))
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        more: dict[str, Any] = {"usage": None} if self._asked.include_usage else {}
        async for index, piece in self._pieces():
            yield _event({**self._head, "choices": [await self._choice(index, piece)], **more})
        if self._asked.include_usage:
            yield _event({**self._head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        async for index, output in self._submission.outputs():
            piece = await self._add(index, output)
            if not piece.empty:
                yield index, piece

    async def _add(self, index: int, output: Output) -> Piece:
        if len(output.prompt_logprobs or ()) > _MUCH_TO_WRITE:
            return await asyncio.to_thread(self._choices[index].add, output)
        return self._choices[index].add(output)

    async def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._asked.logprobs is not None:
            texts = self._served.token_texts
            if len(piece.entries) > _MUCH_TO_WRITE:
                logprobs = await asyncio.to_thread(logprobs_object, piece.entries, texts)
            else:
                logprobs = logprobs_object(piece.entries, texts)
        return {"text": piece.text, "index": index, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _usage(self) -> dict[str, Any]:
        n, requests = self._asked.n, self._asked.requests
        # The samples of a prompt share it: it is counted once, and as cached only where it was before the first.
        cached = sum(min(c.n_cached for c in self._choices[i : i + n]) for i in range(0, len(requests), n))
        read = sum(len(request.prompt) for request in requests[::n])
        return usage_object(read, sum(choice.n_tokens for choice in self._choices), cached)


class _EventStream(Response):
    """Server-sent events; ends the completions when the client does not want them any more."""

    def __init__(self, completions: _Completions, served: Served) -> None:
        super().__init__(
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self._completions, self._served = completions, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._served.metrics.streams.inc()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(self._send_all(send), receive)
        except ClientGone:
            self._served.metrics.gone.inc()
        finally:
            self._completions.cancel()
            self._served.metrics.streams.dec()

    async def _send_all(self, send: Send) -> None:
        try:
            # Closed here, and not when somebody collects the garbage.
            async with contextlib.aclosing(self._completions.events()) as events:
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
