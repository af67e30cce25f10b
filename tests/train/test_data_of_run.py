"""The data of a run: what its configuration says of order, mixtures and places, and what must stay for it to go on."""

from __future__ import annotations

import contextlib
import itertools

import jax
import numpy as np
import pytest
from run_cases import Toy

from mesh_transformer.config.errors import ConfigError, DataError
from mesh_transformer.config.run import RunConfig
from mesh_transformer.data.mixture import Mixture
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT
from mesh_transformer.train.data import open_data, training_stream


def rows_of(run: RunConfig, position: int, n_batches: int) -> np.ndarray:
    """int [n, T + 1]: the rows of so many batches, in the order in which the stream gives them."""
    with contextlib.closing(training_stream(run, open_data(run), ONE_DEVICE_LAYOUT, position)) as stream:
        batches = [np.asarray(jax.device_get(batch)) for batch in itertools.islice(stream, n_batches)]
    return np.concatenate(batches, axis=0).reshape(-1, run.data.sequence_length + 1)


def test_without_shuffling_the_rows_come_in_the_order_of_the_files(toy: Toy) -> None:
    run = toy.run(toy.directory / "run", data={"shuffle": False}, batch_size=4)
    source = open_data(run).train
    np.testing.assert_array_equal(rows_of(run, 22, 3), np.stack([source[n] for n in range(22, 34)]))


def test_rows_of_a_mixture_and_ids_that_are_not_learned(toy: Toy) -> None:
    prompts = np.arange(17) + np.zeros((5, 1), int)
    prompts[:, :6] = ~prompts[:, :6]
    toy.write("tuned_5.tfrecords", prompts)
    where = {"base": str(toy.directory / "train.index"), "tuned": str(toy.directory / "tuned_5.tfrecords")}
    run = toy.run(toy.directory / "run", data={"train": where, "weights": {"base": 3, "tuned": 1}}, batch_size=4)
    assert isinstance(open_data(run).train, Mixture)
    rows = rows_of(run, 0, 6)
    marked = (rows < 0).any(axis=1)
    assert marked.sum() == 24 / 4
    np.testing.assert_array_equal(rows[marked], prompts[:1].repeat(6, axis=0))


def test_what_must_stay_for_a_run_to_go_on(toy: Toy) -> None:
    where = {"base": str(toy.directory / "train.index"), "other": str(toy.directory / "near.tfrecords")}
    changes = [{}, {"shuffle": False}, {"train": where}, {"train": where, "weights": {"base": 1, "other": 2}}]
    records = [open_data(toy.run(toy.directory / "run", data=change)).record for change in changes]
    assert len({record["fingerprint"] for record in records}) == 4
    assert records[0]["fingerprint"] == open_data(toy.run(toy.directory / "run")).train.fingerprint


def test_what_a_user_is_told_and_refused(toy: Toy) -> None:
    toy.text("twice.index", "train_1.tfrecords\ntrain_1.tfrecords\n")
    notes: list[str] = []
    open_data(toy.run(toy.directory / "run", data={"train": str(toy.directory / "twice.index")}), notes.append)
    assert [note for note in notes if "train_1.tfrecords (2 times)" in note] == notes != []
    with pytest.raises(DataError, match=r"40 sequences, less than one batch of 44"):
        open_data(toy.run(toy.directory / "run", batch_size=44))
    where = {"base": str(toy.directory / "none.index"), "far": str(toy.directory / "far.tfrecords")}
    with pytest.raises(ConfigError, match=r"data\.weights\.far = 1e-09 is less than one part"):
        open_data(toy.run(toy.directory / "run", data={"train": where, "weights": {"base": 1, "far": 1e-9}}))
