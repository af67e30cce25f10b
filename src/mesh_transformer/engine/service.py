"""The engine on a thread of its own, for callers on others: a bounded queue, and a way out of every failure."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

from mesh_transformer.config.errors import RunError
from mesh_transformer.engine import sequence as sequences
from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.request import Output, Request
from mesh_transformer.engine.warm import warm

# Called on the engine's thread with the request's place in the group and what a step adds to it; must not block.
Receive = Callable[[int, Output], None]
_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """No room for another request; worth trying again."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What goes on at the moment, in texts, and counts since the start.

    prompt_tokens: of all prompts; cached_tokens: of them taken over from earlier requests; steps: of the engine;
    failures: of steps; compiled: programs.
    """

    waiting: int
    running: int
    slots: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    failures: int
    compiled: int


@dataclasses.dataclass(eq=False)
class Group:
    """Requests that were submitted together."""

    receive: Receive
    _service: EngineService
    cancelled: bool = False

    def cancel(self) -> None:
        """Ends all of it before the next step; nothing is received after the step that is under way."""
        self._service._cancel(self)


class EngineService:
    """Serves requests from any thread.

    Everything that touches the engine happens on its thread, between two steps; callers leave their wishes in queues
    and are answered by calls of their `receive`.
    """

    def __init__(self, engine: Engine, *, max_queue: int) -> None:
        self._engine, self._max_queue = engine, max_queue
        self._changed = threading.Condition()  # guards what follows
        self._new: collections.deque[tuple[Group, int, Request]] = collections.deque()
        self._some_cancelled = False
        self._ready = self._closing = self._ended = False
        self._failures = self._waiting = 0
        self._owners: dict[sequences.Sequence, tuple[Group, int]] = {}  # the thread's own
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether every program has been compiled and requests are served."""
        return self._ready and not self._closing

    @property
    def ended(self) -> bool:
        """Whether its thread has ended, or was told to: nothing is served any more."""
        return self._ended

    def start(self) -> None:
        """Begins: compiles everything, then serves. Returns at once; requests may be submitted before it is ready.

        Raises:
            RunError: it was closed.
        """
        if self._ended:
            raise RunError("this service has been closed and cannot start; make another")
        self._thread.start()

    def submit(self, requests: Sequence[Request], receive: Receive) -> Group:
        """Queues requests as one group, which is never refused for its own size alone.

        Raises:
            UserError: one of them could never be served; none of them is queued.
            QueueFull: others wait, and with these they would be more than `max_queue`.
            RunError: the service is closing, or has ended.
        """
        for request in requests:
            self._engine.check(request)
        group = Group(receive, self)
        with self._changed:
            if self._closing:
                raise RunError("the server is shutting down and takes no more requests")
            if self._ended:
                raise RunError("the engine has ended and takes no more requests; the log says why")
            if self._waiting and self._waiting + len(requests) > self._max_queue:
                raise QueueFull(f"{self._waiting} requests wait already, of at most {self._max_queue}")
            self._new += ((group, i, request) for i, request in enumerate(requests))
            self._waiting += len(requests)
            self._changed.notify()
        return group

    def load(self) -> Load:
        """A snapshot, from any thread."""
        engine = self._engine
        return Load(
            waiting=self._waiting,
            running=len(engine.running),
            slots=engine.max_batch,
            failures=self._failures,
            compiled=engine.programs.n_compiled,
            **dataclasses.asdict(engine.counts),
        )

    def close(self, timeout: float) -> bool:
        """Takes nothing more, finishes what was accepted, for at most `timeout` seconds; whether all of it was.

        What is not finished then ends with an error, told by this thread if the engine has not seen it yet.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        started = self._thread.ident is not None
        if started:
            self._thread.join(timeout)
        finished = not self._thread.is_alive()
        with self._changed:
            self._ended = True
            self._changed.notify()
        left = self._fail_new(RunError("the server has shut down"))  # the engine may still be compiling
        if started:
            self._thread.join(timeout=10)  # the step under way
        return finished and not left

    # ------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            started = time.monotonic()
            warm(self._engine)
            _log.info("%d programs compiled in %.1f s", self._engine.programs.n_compiled, time.monotonic() - started)
            self._ready = True
            while self._take_wishes():
                self._step()
        except Exception as error:
            _log.exception("the engine has ended")
            self._fail_all(RunError(f"the engine has ended: {error}"), also_waiting=True)
        finally:
            with self._changed:
                self._ready, self._ended = False, True
            self._fail_all(RunError("the server has shut down"), also_waiting=True)

    def _take_wishes(self) -> bool:
        """Waits until there is something to do, does what callers wished; False when all is done and closing."""
        with self._changed:
            while not (self._new or self._some_cancelled or self._engine.busy or self._closing or self._ended):
                self._changed.wait()
            if self._ended:
                return False
            new, self._new = self._new, collections.deque()
            some_cancelled, self._some_cancelled = self._some_cancelled, False
        for group, place, request in new:
            if not group.cancelled:
                self._owners[self._engine.submit(request)] = group, place
        for sequence, (group, _) in list(self._owners.items()) if some_cancelled else ():
            if group.cancelled:
                self._engine.cancel(sequence)
                del self._owners[sequence]
        with self._changed:
            self._count_waiting()
            return self._engine.busy or bool(self._new) or not self._closing

    def _step(self) -> None:
        if not self._engine.busy:
            return
        said, failure = [], None
        try:
            said = self._engine.step()
        except Exception as error:
            _log.exception("a step has failed")
            failure = error
        with self._changed:  # before anybody is told, who may ask for more
            self._count_waiting()
        if failure is not None:
            # Whatever was under way is lost with the cache; what waits has a chance of its own.
            self._failures += 1
            self._fail_all(failure, also_waiting=False)
            self._engine.reset()
        for sequence, output in said:
            group, place = self._owners[sequence]
            if output.last:
                del self._owners[sequence]
            self._tell(group, place, output)

    def _fail_all(self, error: Exception, *, also_waiting: bool) -> None:
        for sequence, (group, place) in list(self._owners.items()):
            # One that had nothing to do may have ended without a slot in the very step that failed.
            if also_waiting or sequence.slot is not None or sequence.done:
                del self._owners[sequence]
                self._tell(group, place, sequence.fail(error))
        if also_waiting:
            self._fail_new(error)

    # ------------------------------------------------------------------------------------------ any thread

    def _fail_new(self, error: Exception) -> int:
        """Ends requests that the engine has not seen; how many."""
        with self._changed:
            new, self._new = self._new, collections.deque()
        for group, place, _ in new:
            self._tell(group, place, Output(error=error))
        return len(new)

    def _tell(self, group: Group, place: int, output: Output) -> None:
        if group.cancelled:
            return
        try:
            group.receive(place, output)
        except Exception:
            _log.exception("a receiver has failed; its requests are cancelled")
            self._cancel(group)

    def _cancel(self, group: Group) -> None:
        with self._changed:
            group.cancelled = self._some_cancelled = True
            self._changed.notify()

    def _count_waiting(self) -> None:
        """Exact only where no request is between the two queues: on the engine's thread."""
        self._waiting = len(self._new) + len(self._engine.waiting)
