"""POST /v1/completions: texts that go on from prompts."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mesh_transformer.serve.answering import MUCH_TO_WRITE, Answer, respond
from mesh_transformer.serve.answers import Piece, logprobs_object
from mesh_transformer.serve.asking import ask
from mesh_transformer.serve.served import Served


async def complete(request: HttpRequest, served: Served) -> Response:
    """Answers a request for completions. Raises as `respond`."""
    return await respond(request, served, ask, _Completions)


class _Completions(Answer):
    prefix, kind, kind_of_chunk = "cmpl", "text_completion", "text_completion"

    async def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self.asked.logprobs is not None:
            texts = self.served.token_texts
            if len(piece.entries) > MUCH_TO_WRITE:
                logprobs = await asyncio.to_thread(logprobs_object, piece.entries, texts)
            else:
                logprobs = logprobs_object(piece.entries, texts)
        return {"text": piece.text, "index": index, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    async def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return await self.choice(index, piece)
