"""POST /v1/chat/completions: answers to messages, by the chat template that came with the model."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mesh_transformer.config.errors import UserError
from mesh_transformer.data.chat import NoTemplate, WrongType, check_variables, encode_chat
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.engine.request import Request
from mesh_transformer.serve.answering import MUCH_TO_WRITE, Answer, respond
from mesh_transformer.serve.answers import Piece, chat_logprobs_object
from mesh_transformer.serve.asking import (
    Asked,
    check_biases,
    check_choices,
    check_common,
    check_length,
    check_prompt,
    sampling,
)
from mesh_transformer.serve.chat_schema import ChatRequest, with_objects
from mesh_transformer.serve.errors import bad_request
from mesh_transformer.serve.reading import parse_object
from mesh_transformer.serve.served import Served
from mesh_transformer.serve.validation import validate


async def chat(request: HttpRequest, served: Served) -> Response:
    """Answers messages. Raises as `respond`."""
    # What a template computes, no stream of others has to wait for.
    return await respond(request, served, ask_chat, _Chat, apart=True)


def ask_chat(body: bytes, served: Served) -> Asked:
    """The completions that a body asks for.

    Raises:
        ApiError: 400 or 404; the message names the field, its value and what is expected.
    """
    asked = validate(ChatRequest, parse_object(body))
    check_common(asked, served)
    n = asked.n if asked.n is not None else 1
    check_choices(1, n, served)
    check_biases(asked, served)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise bad_request(
            f"top_logprobs = {asked.top_logprobs} is given without logprobs; leave it out, or set logprobs to true",
            param="top_logprobs",
        )
    prompt = _prompt(asked, served)
    options = sampling(asked, _max_tokens(asked, len(prompt), served))
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    requests = [
        Request(prompt=prompt, options=dataclasses.replace(options, sample=sample), logprobs=logprobs)
        for sample in range(n)
    ]
    return Asked(
        requests=tuple(requests),
        prompts=(prompt,),
        texts=("",),
        before=(0,),
        n=n,
        echo=False,
        logprobs=logprobs,
        stream=bool(asked.stream),
        include_usage=asked.stream_options is not None and bool(asked.stream_options.include_usage),
    )


def _prompt(asked: ChatRequest, served: Served) -> tuple[int, ...]:
    """The ids of the conversation."""
    if served.model.tokenizer is None:
        raise bad_request("this model has no tokenizer; give token ids to /v1/completions", "messages")
    try:
        check_variables(asked.chat_template_kwargs)
    except UserError as error:
        raise bad_request(f"chat_template_kwargs: {error}", "chat_template_kwargs") from error
    try:
        ids = _encoded(asked, served.model.tokenizer)
    except NoTemplate as error:
        message = f"{error}; prompts are taken at /v1/completions"
        raise bad_request(message, code="chat_template_missing") from error
    except UserError as error:
        raise bad_request(str(error), "messages") from error
    if not ids:
        raise bad_request("the model's chat template makes an empty prompt of these messages", "messages")
    check_prompt(tuple(ids), served, "messages")
    return tuple(ids)


def _encoded(asked: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """The ids, with the arguments of tool calls as objects; where the template fails on their type, as texts."""
    tools = None if asked.tool_choice == "none" else asked.tools
    how: dict[str, Any] = {"tools": tools, "variables": asked.chat_template_kwargs}
    messages = with_objects(asked.messages)
    try:
        return encode_chat(tokenizer, messages, **how)
    except WrongType as error:
        if messages == asked.messages:
            raise
        try:
            return encode_chat(tokenizer, asked.messages, **how)
        except UserError:
            raise error from None


def _max_tokens(asked: ChatRequest, n_prompt: int, served: Served) -> int:
    """As asked, else what the context has left, as far as the server allows it."""
    given = {"max_tokens": asked.max_tokens, "max_completion_tokens": asked.max_completion_tokens}
    for name, tokens in given.items():
        check_length(tokens, served, name)
    wanted = {tokens for tokens in given.values() if tokens is not None}
    if len(wanted) > 1:
        raise bad_request(
            f"max_tokens = {asked.max_tokens} and max_completion_tokens = {asked.max_completion_tokens} say the same "
            "thing differently; give one of them",
            param="max_tokens",
        )
    left = max(1, served.model.config.n_ctx - n_prompt)
    return wanted.pop() if wanted else min(left, served.options.max_tokens_limit)


class _Chat(Answer):
    prefix, kind, kind_of_chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def openings(self) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": ""}
        return [
            {"index": i, "delta": first, "logprobs": None, "finish_reason": None} for i in range(len(self._choices))
        ]

    async def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        logprobs = await self._logprobs(piece)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    async def part(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
        logprobs = await self._logprobs(piece)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    async def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """Of the tokens of the content, the end not among them."""
        if self.asked.logprobs is None:
            return None
        entries = piece.entries[: len(piece.entries) - piece.n_ended]
        how = (entries, self.served.token_texts, self.asked.logprobs)
        if len(entries) > MUCH_TO_WRITE:
            return await asyncio.to_thread(chat_logprobs_object, *how)
        return chat_logprobs_object(*how)
