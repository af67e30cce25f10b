"""What an evaluation computes, by one process or by several that share a mesh.

The first process decides what is computed next, since it alone runs the harness; the others are told and compute the
same, each for its own devices. They need neither the harness nor the tasks' data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.engine.generator import Generator
from mesh_transformer.engine.packing import Pair
from mesh_transformer.engine.scoring import Progress, Scorer
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.processes import ONE, Processes
from mesh_transformer.sample.options import Piece, SamplingOptions
from mesh_transformer.shapes import Params
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout

_NOTHING: Progress = lambda stage, done, total: None  # noqa: E731
_PIECE = 1 << 20  # characters of one value of the store, which takes about 4 MB
_SLICE = 1.0  # seconds of one call that cannot be interrupted
_SCORE, _WRITE, _END = "score", "write", "end"


class Channel:
    """One process tells all others what to do next. To be made by all of them, in the same order.

    Nobody answers: work is told that all must take part in, so a result says that all have heard. Who waits for
    a process that has ended is ended by the run's `Watchdog`, or by the store, which the first process serves.
    """

    def __init__(self, processes: Processes) -> None:
        self._store, self._key, self._told = processes.store, processes.fresh_key("work"), 0
        directory, _, number = self._key.rpartition("/")
        self._before = f"{directory}/{int(number) - 1}"  # a channel that all have left

    def tell(self, kind: str, content: Mapping[str, Any]) -> None:
        """To be called by the first process, after what it told before was done."""
        if self._store is None:
            return
        text = json.dumps([kind, content])
        pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]
        for number, piece in enumerate(pieces):
            self._store.set(f"{self._key}/{self._told}/{number}", piece)
        self._store.set(f"{self._key}/{self._told}/count", str(len(pieces)))  # last: now it can be read
        if not self._told:
            self._store.delete(self._before)
        elif kind != _END:  # after an error what was told last may not have been done
            self._store.delete(f"{self._key}/{self._told - 1}")
        self._told += 1

    def hear(self) -> tuple[str, dict[str, Any]]:
        """What the first process tells next, waited for as long as it takes.

        Raises:
            RunError: the first process has ended.
        """
        key, self._told = f"{self._key}/{self._told}", self._told + 1
        n_pieces = int(self._value(f"{key}/count"))
        kind, content = json.loads("".join(self._value(f"{key}/{number}") for number in range(n_pieces)))
        return kind, content

    def _value(self, key: str) -> str:
        assert self._store is not None
        while (value := self._store.get(key, _SLICE)) is None:
            pass
        return value


class Computing:
    """Scoring and writing with one model. What was computed: `scorer.counts`."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        policy: ComputePolicy,
        tokenizer: Tokenizer | None,
        layout: Layout = ONE_DEVICE_LAYOUT,
        *,
        processes: Processes = ONE,
        batch_size: int | None = None,
    ) -> None:
        """
        Args:
            layout: over the devices of all the processes.
            batch_size: texts that are scored at one time; by default as many as fit, by their lengths.

        Raises:
            UserError: the layout has a pipeline, or `batch_size` is out of range.
        """
        self.scorer = Scorer(cfg, policy, layout, most_rows=batch_size)
        self._generator = Generator(cfg, params, policy, tokenizer, layout)
        self.params, self._processes = params, processes
        self._channel: Channel | None = None

    def use(self, params: Params) -> None:
        """From now on it computes with these parameters of the same shapes; nothing is compiled again."""
        self.params = self._generator.params = params

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """In the first process, within it the others compute what this one does. They are here until it leaves, and
        have done everything before the block, which they leave at once.

        Raises:
            MeshTransformerError: in all processes, what one of them raised.
        """
        if self._processes.count == 1:
            yield
            return
        channel = Channel(self._processes)
        with self._processes.agree("evaluation"):
            if not self._processes.is_first:
                self._follow(channel)
                yield
                return
            self._channel = channel
            try:
                yield
            finally:
                self._channel = None
                channel.tell(_END, {})

    def score(
        self, pairs: Sequence[Pair], *, shared: bool = True, progress: Progress = _NOTHING
    ) -> list[tuple[float, bool]]:
        """As `Scorer.score`."""
        if self._channel is not None:
            told = [[list(map(int, part)) for part in pair] for pair in pairs]
            self._channel.tell(_SCORE, {"pairs": told, "shared": shared})
        return self.scorer.score(self.params, pairs, shared=shared, progress=progress)

    def stream(self, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions]) -> Iterator[Piece]:
        """As `Generator.stream`; of several processes, to be read to its end."""
        if self._channel is not None:
            given = [dataclasses.asdict(each) for each in options]
            self._channel.tell(_WRITE, {"prompts": [list(map(int, each)) for each in prompts], "options": given})
        yield from self._generator.stream(prompts, options)

    def _follow(self, channel: Channel) -> None:
        """Computes what the first process tells, until it says that there is no more."""
        while True:
            kind, content = channel.hear()
            if kind == _END:
                return
            if kind == _SCORE:
                pairs = [Pair(*pair) for pair in content["pairs"]]
                self.scorer.score(self.params, pairs, shared=content["shared"])
            else:
                options = [_options(each) for each in content["options"]]
                for _ in self._generator.stream(content["prompts"], options):
                    pass


def _options(values: Mapping[str, Any]) -> SamplingOptions:
    """From JSON, which has no tuples."""
    biases = tuple((token, bias) for token, bias in values["logit_bias"])
    return SamplingOptions(**{**values, "stop": tuple(values["stop"]), "logit_bias": biases})
