"""Predictions asked for now and fetched later, kept for a bounded time and number."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any

from mesh_transformer.serve.errors import ApiError, shown
from mesh_transformer.serve.options import ServeOptions

# Characters of all that is kept: a context may be as long as a request.
_MOST_KEPT = 64_000_000


@dataclasses.dataclass
class _Kept:
    task: asyncio.Task[dict[str, Any]]
    done_at: float | None = None
    size: int = 0


class Predictions:
    """Predictions by number, from 1.

    One that is done is kept for `results_seconds`, until `max_results` others are done, or until those done after it
    hold 64 million characters; one that is not done is never dropped, and the engine's queue bounds how many there are.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._asked = 0

    def start(self, work: Coroutine[Any, Any, dict[str, Any]]) -> int:
        """Begins a prediction; its number."""
        self._asked += 1
        number = self._asked
        task = asyncio.ensure_future(work)
        self._kept[number] = _Kept(task)
        task.add_done_callback(lambda _: self._done(number))
        return number

    async def get(self, number: int) -> dict[str, Any]:
        """Waits for a prediction; any number of times for the same one.

        Raises:
            ApiError: 404 there is none of this number any more or yet; or what the prediction itself ended with.
        """
        self._expire()
        kept = self._kept.get(number)
        if kept is None:
            raise ApiError(
                404,
                f"qid = {shown(number)} is not known; predictions are kept for "
                f"{self._options.results_seconds:g} seconds after they are done, the last {self._options.max_results} "
                "of them",
                param="qid",
                code="prediction_not_found",
            )
        # Whoever waits may go; the prediction goes on.
        return await asyncio.shield(kept.task)

    def _done(self, number: int) -> None:
        kept = self._kept[number]
        kept.done_at = time.monotonic()
        # Asking for the exception marks it as seen: it is told to whoever asks for the prediction.
        if not kept.task.cancelled() and kept.task.exception() is None:
            kept.size = sum(len(value) for value in kept.task.result().values() if isinstance(value, str))
        # In the order of being done, the oldest first.
        self._kept.move_to_end(number)
        self._expire()

    def _expire(self) -> None:
        oldest = time.monotonic() - self._options.results_seconds
        size, n_done = 0, 0
        for number, kept in reversed(list(self._kept.items())):
            if kept.done_at is None:
                continue
            size, n_done = size + kept.size, n_done + 1
            # The newest is kept whatever its size, so that every prediction can be fetched.
            too_much = n_done > 1 and size > _MOST_KEPT
            if kept.done_at < oldest or n_done > self._options.max_results or too_much:
                del self._kept[number]
