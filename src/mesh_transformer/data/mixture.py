"""Several data sets from which sequences are taken in fixed proportions."""

from __future__ import annotations

import bisect
import functools
import hashlib
import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.data.finding import resolve_data
from mesh_transformer.data.source import RecordSource, open_source

# Turns after which the pattern of a mixture repeats, at most; weights are multiples of one part in so many.
MAX_PERIOD = 100_000


class Mixture:
    """Data sets that take turns, in a pattern that repeats: whose turn a position is depends on the weights alone.

    After any number n of turns, a set with the share p of the weights has had n p of them, less than one more or less
    (Tijdeman, The chairman assignment problem, 1980). A position is found in constant time. Sequences are numbered
    through all sets, in the order of their names in the configuration.

    Args:
        sources: the sets by name.
        weights: of each, above 0. Their sum is of no importance. They are taken as the decimal numbers that they are
            written as; those that are no multiples of one part in 100000 of their sum are rounded to that.

    Raises:
        ConfigError: a weight is too small a part of the sum.
    """

    def __init__(self, sources: Mapping[str, RecordSource], weights: Mapping[str, float]) -> None:
        self.names = tuple(sources)
        self.sources = tuple(sources.values())
        self.shares = shares([weights[name] for name in self.names], self.names)
        self._starts = [0, *itertools.accumulate(map(len, self.sources))]
        self._turns, self._earlier = _pattern(self.shares)

    def __len__(self) -> int:
        """All sequences of all sets."""
        return self._starts[-1]

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {share}" for name, share in zip(self.names, self.shares, strict=True))
        return f"Mixture({parts}; {len(self)} sequences)"

    def turn(self, position: int) -> tuple[int, int]:
        """(which set has its turn at `position` of the stream, how many turns it has had before), both from 0."""
        period, turn = divmod(position, self._turns.size)
        which = int(self._turns[turn])
        return which, period * self.shares[which] + int(self._earlier[turn])

    def number(self, which: int, index: int) -> int:
        """The number, through all sets, of sequence `index` of set `which`."""
        return self._starts[which] + index

    def read_many(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The sequences of these numbers, int32 [T + 1] each. Raises DataError as `RecordSource` does."""
        places = [bisect.bisect_right(self._starts, index) - 1 for index in indices]
        rows: dict[int, np.ndarray] = {}
        for which in sorted(set(places)):
            mine = [n for n, place in enumerate(places) if place == which]
            read = self.sources[which].read_many([indices[n] - self._starts[which] for n in mine])
            rows.update(zip(mine, read, strict=True))
        return [rows[n] for n in range(len(indices))]

    def __getitem__(self, index: int) -> np.ndarray:
        """Sequence `index`, counted through all sets: int32 [T + 1]. Raises as `RecordSource` does."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return self.read_many([index])[0]

    @property
    def files(self) -> tuple[str, ...]:
        """The record files of all sets."""
        return tuple(path for source in self.sources for path in source.files)

    @property
    def sequence_length(self) -> int:
        """T; every row has T + 1 ids."""
        return self.sources[0].sequence_length

    @property
    def remote(self) -> bool:
        """Whether some of it is read over a network."""
        return any(source.remote for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over each set's name, share and fingerprint, in order."""
        digest = hashlib.sha256(b"mixture\n")
        for name, share, source in zip(self.names, self.shares, self.sources, strict=True):
            digest.update(f"{name}\0{share}\0{source.fingerprint}\n".encode())
        return digest.hexdigest()


Sequences = RecordSource | Mixture


def open_training(
    train: str | Mapping[str, str],
    weights: Mapping[str, float],
    *,
    sequence_length: int,
    n_vocab: int,
    note: Callable[[str], None] | None = None,
) -> Sequences:
    """What `data.train` and `data.weights` name.

    Several sets without weights are one data set, their files in the order of the names: all sequences are shuffled
    together and each is read once in an epoch.

    Raises:
        DataError: as `open_source`; the message of a set begins with its name.
        ConfigError: as `Mixture`.
    """
    open_one = functools.partial(open_source, sequence_length=sequence_length, n_vocab=n_vocab, note=note)
    if isinstance(train, str):
        return open_one(train)
    if weights:
        shares([weights[name] for name in train], tuple(train))  # before anything is read
        return Mixture({name: open_one(where) for name, where in train.items()}, weights)
    files = [path for where in train.values() for path in resolve_data(where)]
    source = RecordSource(files, sequence_length=sequence_length, n_vocab=n_vocab)
    if note:
        for line in source.notes:
            note(line)
    return source


def shares(weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """The turns of each set in a period of at most `MAX_PERIOD`, in proportion to the weights.

    Raises:
        ConfigError: a weight is too small a part of their sum to have a turn.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    scale = math.lcm(*(each.denominator for each in exact))
    turns = [int(each * scale) for each in exact]
    common = math.gcd(*turns)
    turns = [each // common for each in turns]
    if sum(turns) <= MAX_PERIOD:
        return turns
    # The largest remainders are rounded up, so that the sum stays.
    ideal = [each * MAX_PERIOD / total for each in exact]
    turns = [math.floor(each) for each in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda i: (turns[i] - ideal[i], i))
    for i in by_remainder[: MAX_PERIOD - sum(turns)]:
        turns[i] += 1
    for name, weight, each in zip(names, weights, turns, strict=True):
        if not each:
            raise ConfigError(
                f"data.weights.{name} = {weight} is less than one part in {MAX_PERIOD} of all weights, "
                f"{float(total):g}; give it a greater weight, or leave {name} out"
            )
    common = math.gcd(*turns)
    return [each // common for each in turns]


def _pattern(turns_of: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each turn of a period: (the set that has it, how many that set has had before in this period).

    The j-th turn of a set with the share p must come after (j - 1) / p turns and before j / p are over. Among those
    that may come the one that must come soonest is taken; then none is ever late.
    """
    period = sum(turns_of)
    may_come = [(1, i) for i in range(len(turns_of))]  # (first turn, set)
    must_come: list[tuple[int, int]] = []  # (last turn, set), of those that may come by now
    had = [0] * len(turns_of)
    turns = np.zeros(period, np.int32)
    earlier = np.zeros(period, np.int32)
    for turn in range(1, period + 1):
        while may_come and may_come[0][0] <= turn:
            _, i = heapq.heappop(may_come)
            heapq.heappush(must_come, (-(-(had[i] + 1) * period // turns_of[i]), i))
        _, i = heapq.heappop(must_come)
        turns[turn - 1], earlier[turn - 1] = i, had[i]
        had[i] += 1
        heapq.heappush(may_come, (had[i] * period // turns_of[i] + 1, i))
    return turns, earlier
