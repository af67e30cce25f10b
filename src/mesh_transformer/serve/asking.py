"""From a completion request to the engine's requests: tokens, options, and the limits between them."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from mesh_transformer.config.errors import UserError
from mesh_transformer.engine.request import Request
from mesh_transformer.sample.options import SamplingOptions
from mesh_transformer.serve.errors import ApiError, bad_request, shown
from mesh_transformer.serve.reading import parse_object
from mesh_transformer.serve.schema import CompletionRequest, SamplingFields
from mesh_transformer.serve.served import Served
from mesh_transformer.serve.validation import validate

_MAX_TOKENS = 16  # OpenAI's default


@dataclasses.dataclass(frozen=True)
class Asked:
    """A completion request, ready for the engine.

    requests: `n` for each prompt in turn. prompts, texts: of each prompt its ids and, for an echo, its text; a prompt
    may be empty where its request begins with end-of-text. before: of each prompt's ids, how many the tokenizer put
    before its text.
    """

    requests: tuple[Request, ...]
    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    before: tuple[int, ...]
    n: int
    echo: bool
    logprobs: int | None
    stream: bool
    include_usage: bool


def ask(body: bytes, served: Served) -> Asked:
    """The completions that a body asks for.

    Raises:
        ApiError: 400 or 404; the message names the field, its value and what is expected.
    """
    asked = validate(CompletionRequest, parse_object(body))
    _check_together(asked, served)
    found = [_tokens(prompt, served, bool(asked.echo)) for prompt in _prompts(asked.prompt)]
    prompts, texts, before = zip(*found, strict=True)
    n = asked.n if asked.n is not None else 1
    check_choices(len(prompts), n, served)
    echo, options = bool(asked.echo), sampling(asked, _MAX_TOKENS if asked.max_tokens is None else asked.max_tokens)
    check_biases(asked, served)
    requests = [
        Request(
            prompt=prompt or _beginning(served),
            options=dataclasses.replace(options, sample=sample),
            logprobs=asked.logprobs,
            prompt_logprobs=echo and asked.logprobs is not None,
        )
        for prompt in prompts
        for sample in range(n)
    ]
    usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    return Asked(tuple(requests), prompts, texts, before, n, echo, asked.logprobs, bool(asked.stream), usage)


def check_choices(n_prompts: int, n: int, served: Served) -> None:
    """Raises ApiError (400) for more choices than the server gives in one answer."""
    if n_prompts * n > served.options.max_choices:
        raise bad_request(
            f"{n_prompts} prompts times n = {n} are {n_prompts * n} choices; this server gives at most "
            f"{served.options.max_choices} in one answer",
            param="n",
        )


def check_biases(asked: SamplingFields, served: Served) -> None:
    """Raises ApiError (400) for a bias of an id that the model has not."""
    for token in asked.logit_bias:
        if token >= served.model.config.n_vocab:
            raise bad_request(f"logit_bias names {_outside(token, served)}", param="logit_bias")


def _check_together(asked: CompletionRequest, served: Served) -> None:
    check_common(asked, served)
    if asked.best_of is not None and asked.best_of != (asked.n if asked.n is not None else 1):
        expected = CompletionRequest.model_fields["best_of"].description
        raise bad_request(f"best_of = {asked.best_of}; expected {expected}", param="best_of")
    if asked.max_tokens == 0 and not asked.echo:
        raise bad_request(
            "max_tokens = 0 writes nothing; expected at least 1, or echo = true to get the prompt back",
            param="max_tokens",
        )
    check_length(asked.max_tokens, served, "max_tokens")


def check_common(asked: SamplingFields, served: Served) -> None:
    """Raises ApiError for another model (404), and for fields that do not go together (400)."""
    if asked.model is not None and asked.model != served.options.name:
        raise model_not_found(asked.model, served)
    if asked.stream_options is not None and not asked.stream:
        raise bad_request(
            "stream_options is given without stream; leave it out, or set stream to true", param="stream_options"
        )
    if asked.stop and served.model.tokenizer is None:
        raise bad_request(
            "stop strings are found in text, and this model has no tokenizer; leave them out", param="stop"
        )


def model_not_found(name: str, served: Served) -> ApiError:
    """404."""
    message = f"the model {shown(name)} is not served here; expected {shown(served.options.name)}"
    return ApiError(404, message, param="model", code="model_not_found")


def check_length(tokens: int | None, served: Served, param: str) -> None:
    """Raises ApiError (400) for more tokens than the server writes."""
    most = served.options.max_tokens_limit
    if tokens is not None and tokens > most:
        raise bad_request(f"{param} = {tokens}; this server writes at most {most} tokens in one completion", param)


def _prompts(prompt: Any) -> list[Any]:
    """The prompts, each a string or a list of ids."""
    if prompt is None or prompt == []:
        return [[]]
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _tokens(prompt: str | list[int], served: Served, echo: bool) -> tuple[tuple[int, ...], str, int]:
    """Of a prompt the ids, for an echo the text, and how many ids stand before the text; checked against the
    vocabulary and the context.
    """
    tokenizer, before = served.model.tokenizer, 0
    if isinstance(prompt, str):
        ids, text = encode(prompt, served, "prompt"), prompt
        before = len(tokenizer.begin) if tokenizer and ids else 0
    else:
        for token in prompt:
            if not 0 <= token < served.model.config.n_vocab:
                raise bad_request(f"prompt holds {_outside(token, served)}", param="prompt")
        ids, text = tuple(prompt), tokenizer.decode(prompt) if tokenizer and echo else ""
    check_prompt(ids, served, "prompt")
    return ids, text, before


def check_prompt(ids: tuple[int, ...], served: Served, param: str) -> None:
    """Raises ApiError (400) for more tokens than a prompt may have."""
    if len(ids) > served.max_prompt_tokens:
        what = "this server allows" if served.options.max_prompt_tokens else "the model's context holds"
        raise bad_request(
            f"the prompt has {len(ids)} tokens, and {what} {served.max_prompt_tokens}; "
            f"shorten it by {len(ids) - served.max_prompt_tokens} tokens",
            param=param,
            code="context_length_exceeded",
        )


def encode(text: str, served: Served, param: str) -> tuple[int, ...]:
    """The ids of a text, with what the tokenizer puts before every one. Raises ApiError (400) where there is none."""
    if not text:
        return ()
    if served.model.tokenizer is None:
        raise bad_request(f"{param} is text, and this model has no tokenizer; give token ids to /v1/completions", param)
    try:
        return tuple(served.model.tokenizer.encode_prompt(text))
    except UserError as error:
        raise bad_request(f"{param}: {error}", param) from error


def _beginning(served: Served) -> tuple[int, ...]:
    """What an empty prompt is to the model; without an end-of-text the engine says what is wrong."""
    start = served.model.tokenizer.start if served.model.tokenizer else None
    return () if start is None else (start,)


def _outside(token: int, served: Served) -> str:
    return f"token id {shown(token)}; expected ids from 0 to {served.model.config.n_vocab - 1}"


def random_seed() -> int:
    """For requests that name none."""
    return secrets.randbits(32)


def sampling(asked: SamplingFields, max_tokens: int) -> SamplingOptions:
    """The engine's options. Raises ApiError (400) for a value outside its range."""
    given = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "min_tokens": asked.min_tokens,
        "ignore_eos": asked.ignore_eos,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        return SamplingOptions(
            max_tokens=max_tokens,
            seed=random_seed() if asked.seed is None else asked.seed % 2**32,
            stop=tuple(asked.stop),
            logit_bias=tuple(asked.logit_bias.items()),
            **chosen,
        )
    except UserError as error:
        raise bad_request(str(error)) from error
