"""An engine service without a model: it writes a text that is given to it, on a thread of its own."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from mesh_transformer.config.errors import RunError, UserError
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.engine.request import Output, Request, TokenLogprob
from mesh_transformer.engine.service import Load, QueueFull, Receive
from mesh_transformer.sample.text import TextStream

TOKENIZER = load_tokenizer("bytes")
END = 256
WRITTEN = "Hello, wörld of text"


class FakeGroup:
    """Requests that were submitted together."""

    def __init__(self, requests: Sequence[Request], receive: Receive) -> None:
        self.requests, self.receive = list(requests), receive
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class FakeService:
    """Answers every group in the order of submission: each request in turn gets the tokens of `written`.

    With `held`, nothing is answered until a test does it (`answer`, or `group.receive`). The log-probability of the
    k-th token of a text is -(k + 1) / 4, and its likeliest alternatives are "A", "B" and so on, at -k / 8 - 1.
    """

    def __init__(self, *, held: bool = False) -> None:
        self.held, self.ready, self.full, self.ended = held, True, False, False
        self.written: Sequence[int] = TOKENIZER.encode(WRITTEN) + [END]
        self.refusal: Exception | None = None
        self.n_cached = 0
        self.figures: dict[str, Any] = {}
        self.groups: list[FakeGroup] = []
        self.submitted: queue.Queue[FakeGroup] = queue.Queue()
        self.closed_with: float | None = None
        self.finishes = True
        self._work: queue.Queue[FakeGroup | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def start(self) -> None:
        self.ready = True

    def submit(self, requests: Sequence[Request], receive: Receive) -> FakeGroup:
        if self.refusal is not None:
            raise self.refusal
        if self.full:
            raise QueueFull
        if self.closed_with is not None or self.ended:
            raise RunError("closing")
        group = FakeGroup(requests, receive)
        self.groups.append(group)
        if not self.held:
            self._work.put(group)
        self.submitted.put(group)
        return group

    def load(self) -> Load:
        zeros = {field.name: 0 for field in dataclasses.fields(Load)}
        return Load(**{**zeros, **self.figures})

    def close(self, timeout: float) -> bool:
        """What is unanswered then ends with an error, unless `finishes`."""
        self.closed_with = timeout
        for group in self.groups:
            if self.held and not group.cancelled.is_set():
                if self.finishes:
                    self.answer(group)
                else:
                    for index in range(len(group.requests)):
                        group.receive(index, Output(error=RunError("closed")))
        self._work.put(None)
        return self.finishes

    def answer_with(self, answer: Callable[[FakeGroup], None]) -> None:
        """From now on groups are answered by this function, on the engine's thread."""
        self.held, self.answer = False, answer  # type: ignore[method-assign]

    def answer(self, group: FakeGroup) -> None:
        """Every output of a group."""
        for index, request in enumerate(group.requests):
            for output in outputs_of(request, self.written, self.n_cached):
                if not group.cancelled.is_set():
                    group.receive(index, output)

    def _run(self) -> None:
        while (group := self._work.get()) is not None:
            self.answer(group)


def outputs_of(request: Request, written: Sequence[int], n_cached: int = 0) -> list[Output]:
    """One output a token, as the engine gives them."""
    options, stream = request.options, TextStream(TOKENIZER, request.options.stop)
    first: dict[str, Any] = {"n_cached": n_cached}
    if request.prompt_logprobs:
        first["prompt_logprobs"] = tuple(
            TokenLogprob(t, None if k == 0 else _logprob(k), _top(request, k) if k else ())
            for k, t in enumerate(request.prompt)
        )
    if not request.prompt:
        raise UserError("the prompt is empty")
    outputs: list[Output] = []
    for k, token in enumerate(written[: options.max_tokens]):
        entry = TokenLogprob(token, _logprob(k), _top(request, k))
        logprobs = (entry,) if request.logprobs is not None else ()
        if token == END and not options.ignore_eos:
            outputs.append(Output(text=stream.flush(), logprobs=logprobs, finish_reason="stop", **first))
            return outputs
        text = stream.push(token)
        outputs.append(
            Output(
                tokens=(token,), text=text, logprobs=logprobs, finish_reason="stop" if stream.stopped else None, **first
            )
        )
        first = {}
        if stream.stopped:
            return outputs
    return [*outputs, Output(text=stream.flush(), finish_reason="length", **first)]


def _logprob(k: int) -> float:
    return -(k + 1) / 4


def _top(request: Request, k: int) -> tuple[tuple[int, float], ...]:
    return tuple((ord("A") + i, -k / 8 - 1 - i) for i in range(request.logprobs or 0))
