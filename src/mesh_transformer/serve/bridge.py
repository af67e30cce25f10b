"""Between the engine's thread and the event loop, and between an answer in the making and the client that may go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from mesh_transformer.config.errors import RunError, UserError
from mesh_transformer.engine.request import Output, Request
from mesh_transformer.engine.service import QueueFull
from mesh_transformer.serve.errors import ApiError, ClientGone, bad_request, shutting_down
from mesh_transformer.serve.served import Served

T = TypeVar("T")


class Submission:
    """Requests in the engine's hands as one group, and what comes of them, on the event loop.

    Raises:
        ApiError: 400 a request could never be served, 429 the queue is full, 503 the server is stopping.
    """

    def __init__(self, served: Served, requests: Sequence[Request]) -> None:
        self._served, self._begun = served, time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._running = set(range(len(requests)))
        self._first: dict[int, float] = {}
        self._counts = [0] * len(requests)
        if served.stopping:
            raise shutting_down()
        try:
            self._group = served.service.submit(requests, self._receive)
        except UserError as error:
            raise bad_request(str(error)) from error
        except QueueFull:
            raise queue_full(served) from None
        except RunError as error:
            raise shutting_down() if served.stopping else _engine_ended() from error

    def _receive(self, index: int, output: Output) -> None:
        # On the engine's thread. The loop outlives the service, which is closed before the server ends.
        self._loop.call_soon_threadsafe(self._outputs.put_nowait, (index, output))

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """What the engine adds to the requests, each with its place in the group, until all have ended.

        Raises:
            ApiError: 500 the engine failed on one of them, 503 if that was because the server stops, 504 if not all
                have ended `request_timeout` after the submission.
        """
        seconds = self._served.options.request_timeout
        while self._running:
            try:
                async with asyncio.timeout_at(self._loop.time() + seconds - (time.monotonic() - self._begun)):
                    index, output = await self._outputs.get()
            except TimeoutError:
                raise ApiError(
                    504,
                    f"the answer was not done within {seconds:g} seconds; ask for fewer tokens or try again later",
                    kind="server_error",
                    code="request_timeout",
                ) from None
            if output.last:
                self._running.discard(index)
                self._served.count_finished()
            if output.error is not None:
                raise failure(self._served, output.error) from output.error
            self._measure(index, output)
            yield index, output

    def cancel(self) -> None:
        """Frees what the group holds; without effect once all of it has ended."""
        if self._running:
            self._running.clear()
            self._group.cancel()

    def _measure(self, index: int, output: Output) -> None:
        now, metrics = time.monotonic(), self._served.metrics
        if output.tokens and index not in self._first:
            if not self._first:
                metrics.first_token_seconds.observe(now - self._begun)
            self._first[index] = now
            self._counts[index] = 0  # tokens after those of the first output
        else:
            self._counts[index] += len(output.tokens)
        if output.last and self._counts[index]:
            metrics.token_seconds.observe((now - self._first[index]) / self._counts[index])


def queue_full(served: Served) -> ApiError:
    """429."""
    seconds = served.retry_after()
    return ApiError(
        429,
        f"the queue is full; try again in {seconds} seconds",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def _engine_ended() -> ApiError:
    message = "the engine has ended and so will the server, whose log says why; ask again in a while"
    return ApiError(503, message, kind="server_error", code="engine_ended", headers={"Retry-After": "30"})


def failure(served: Served, error: Exception) -> ApiError:
    """What the engine's failure is to the client."""
    if served.stopping:
        return shutting_down()
    first_line = next(iter(str(error).splitlines()), type(error).__name__)
    return ApiError(500, f"the model failed on this request: {first_line}", kind="server_error", code="engine_error")


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled if the client closes its connection first.

    The request's body must have been read. Raises ClientGone if it does.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
