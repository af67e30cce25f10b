from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_transformer.config.errors import ConfigError, DataError
from mesh_transformer.data.loader import TrainLoader, stream_fingerprint
from mesh_transformer.data.mixture import MAX_PERIOD, Mixture, _pattern, open_training, shares
from mesh_transformer.data.source import RecordSource
from mesh_transformer.data.tfrecord import write_records

T = 3
SIZES = {"pile": 11, "code": 7, "notes": 5}
WEIGHTS = {"pile": 0.6, "code": 0.3, "notes": 0.1}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Three sets; a sequence of set s holds the id 100 s + its number."""
    for s, (name, size) in enumerate(SIZES.items()):
        write_records(tmp_path / f"{name}.tfrecords", 100 * s + np.repeat(np.arange(size)[:, None], T + 1, axis=1))
    return {name: str(tmp_path / f"{name}.tfrecords") for name in SIZES}


@pytest.fixture
def mixture(places: dict[str, str]) -> Mixture:
    opened = open_training(places, WEIGHTS, sequence_length=T, n_vocab=400)
    assert isinstance(opened, Mixture)
    return opened


def stream(
    source: Mixture | RecordSource, count: int, position: int = 0, batch: int = 1, **options: object
) -> list[int]:
    loader = TrainLoader(source, seed=5, batch_size=batch, **options)  # type: ignore[arg-type]
    batches = loader.batches(position)
    taken = np.concatenate(list(itertools.islice(batches, -(-count // batch))))
    batches.close()
    return taken[:count, 0].tolist()


def test_proportions_are_exact_within_one_at_every_moment(mixture: Mixture) -> None:
    taken = np.array(stream(mixture, 400)) // 100
    for s, weight in enumerate(WEIGHTS.values()):
        had = np.cumsum(taken == s)
        assert np.abs(had - weight * np.arange(1, 401)).max() < 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=12))
def test_the_pattern_is_within_one_for_any_shares(turns_of: list[int]) -> None:
    turns, earlier = _pattern(turns_of)
    period = sum(turns_of)
    for i, share in enumerate(turns_of):
        had = np.cumsum(turns == i)
        # In whole numbers: |had - n share / period| < 1.
        assert np.abs(had * period - np.arange(1, period + 1) * share).max() < period
        assert had[-1] == share
        assert earlier[turns == i].tolist() == list(range(share))


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_set_goes_through_epochs_of_its_own(mixture: Mixture, shuffle: bool) -> None:
    taken = stream(mixture, 500, shuffle=shuffle)
    for s, size in enumerate(SIZES.values()):
        mine = [n % 100 for n in taken if n // 100 == s]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert len(epochs) >= 3
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert all(epoch == list(range(size)) for epoch in epochs) != shuffle
        assert (len({tuple(epoch) for epoch in epochs}) > 1) == shuffle


@pytest.mark.parametrize("shuffle", [True, False])
def test_resuming_anywhere_and_any_split_of_rows(mixture: Mixture, shuffle: bool) -> None:
    whole = stream(mixture, 200, shuffle=shuffle)
    for position in range(0, 90, 7):
        assert stream(mixture, 60, position, batch=4, shuffle=shuffle) == whole[position : position + 60]
    for rows in ((0, 3), (1, 2, 4)):
        loader = TrainLoader(mixture, seed=5, batch_size=5, rows=rows, shuffle=shuffle)
        batches = loader.batches(10)
        taken = np.concatenate([next(batches)[:, 0] for _ in range(8)]).tolist()
        batches.close()
        assert taken == [whole[10 + 5 * batch + row] for batch in range(8) for row in rows]


def test_the_order_is_the_one_written_down(mixture: Mixture) -> None:
    # A change here breaks the resumption of every run with a mixture begun before it.
    assert stream(mixture, 20) == ORDER
    assert [mixture.turn(n) for n in (0, 2, 10**15 + 3)] == [(0, 0), (1, 0), (0, 600000000000002)]


ORDER = [5, 3, 101, 8, 105, 6, 1, 103, 0, 204, 10, 4, 102, 7, 106, 9, 2, 104, 9, 201]


def test_without_weights_the_sets_are_one(places: dict[str, str]) -> None:
    together = open_training(places, {}, sequence_length=T, n_vocab=400)
    assert isinstance(together, RecordSource)
    total = sum(SIZES.values())
    first = stream(together, total)
    assert Counter(n // 100 for n in first) == dict(enumerate(SIZES.values()))
    assert len(set(first)) == total
    assert stream(together, total, shuffle=False) == sorted(first)


def test_numbers_through_all_sets(mixture: Mixture) -> None:
    assert len(mixture) == sum(SIZES.values())
    expected = [100 * s + n for s, size in enumerate(SIZES.values()) for n in range(size)]
    assert [int(mixture[n][0]) for n in range(len(mixture))] == expected
    order = [22, 0, 11, 10, 18, 17, 0]
    assert [int(row[0]) for row in mixture.read_many(order)] == [expected[n] for n in order]
    with pytest.raises(IndexError):
        mixture[len(mixture)]


def test_the_fingerprint_is_of_all_that_the_order_depends_on(places: dict[str, str]) -> None:
    def fingerprint(where: dict[str, str], weights: dict[str, float], shuffle: bool = True) -> str:
        return stream_fingerprint(open_training(where, weights, sequence_length=T, n_vocab=400), shuffle)

    one = fingerprint(places, WEIGHTS)
    assert fingerprint(places, {name: 70 * weight for name, weight in WEIGHTS.items()}) == one
    others = [
        fingerprint(places, WEIGHTS, shuffle=False),
        fingerprint(places, WEIGHTS | {"notes": 0.2}),
        fingerprint(dict(reversed(places.items())), WEIGHTS),
        fingerprint(places | {"code": places["pile"]}, WEIGHTS),
        fingerprint({"a": places["pile"], "code": places["code"]}, {"a": 0.6, "code": 0.3}),
        fingerprint({"b": places["pile"], "code": places["code"]}, {"b": 0.6, "code": 0.3}),
        fingerprint(places, {}),
        fingerprint(places, {}, shuffle=False),
        fingerprint({"pile": places["pile"]}, {}),
    ]
    assert len({one, *others}) == 10
    # Told over again: a change of the recipe would make every run begun before it refuse to resume.
    digest = hashlib.sha256(b"mixture\n")
    for (name, where), share in zip(places.items(), (6, 3, 1), strict=True):
        alone = open_training(where, {}, sequence_length=T, n_vocab=400)
        digest.update(f"{name}\0{share}\0{alone.fingerprint}\n".encode())
    assert digest.hexdigest() == one
    # One set under a name and no weights is that set; a run begun before mixtures goes on.
    alone = open_training(places["pile"], {}, sequence_length=T, n_vocab=400)
    assert others[-1] == alone.fingerprint == stream_fingerprint(alone, True)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([0.1, 0.1, 0.1], [1, 1, 1]),
        ([2, 0.5], [4, 1]),
        ([1e-05, 0.99999], [1, 99999]),
        ([5], [1]),
    ],
)
def test_weights_are_the_decimals_that_they_are_written_as(weights: list[float], expected: list[int]) -> None:
    assert shares(weights, [str(i) for i in range(len(weights))]) == expected


def test_weights_of_many_places_are_rounded_to_a_period() -> None:
    weights = [0.123456789, 0.3, 0.576543211]
    found = shares(weights, "abc")
    assert sum(found) <= MAX_PERIOD
    for share, weight in zip(found, weights, strict=True):
        assert abs(Fraction(share, sum(found)) - Fraction(str(weight))) < Fraction(1, MAX_PERIOD)
    with pytest.raises(ConfigError, match=r"data\.weights\.b = 1e-07 is less than one part in 100000"):
        shares([1.0, 1e-07], "ab")


def test_an_error_names_the_file_of_its_set(places: dict[str, str], mixture: Mixture) -> None:
    path = Path(places["code"])
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"code\.tfrecords, record 6 at byte"):
        mixture[11 + 6]
    with pytest.raises(DataError, match=r"none\.tfrecords' does not exist"):
        open_training(places | {"code": "none.tfrecords"}, WEIGHTS, sequence_length=T, n_vocab=400)
