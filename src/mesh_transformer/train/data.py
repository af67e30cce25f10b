"""The data of a run: opened, checked against the configuration, and as batches that its programs take."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any

from mesh_transformer.config.run import RunConfig
from mesh_transformer.data.choice import tokenizer_for_data
from mesh_transformer.data.loader import TrainLoader, validation_batches
from mesh_transformer.data.source import RecordSource, open_source
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.sharding.layout import Layout
from mesh_transformer.train.loop import micro_batch_size, train_batches, validation_batches_of


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads: opened, and checked against the configuration."""

    train: RecordSource
    validation: dict[str, RecordSource]
    tokenizer: Tokenizer | None

    @property
    def record(self) -> dict[str, Any]:
        """What must stay the same for a run to go on."""
        return {"fingerprint": self.train.fingerprint, "sequence_length": self.train.sequence_length}


def open_data(run: RunConfig) -> Data:
    """Opens every data set of the run and checks it against model and batch.

    Raises:
        DataError: one is missing, damaged, does not fit the model, or holds less than a batch.
    """
    open_one = functools.partial(open_source, sequence_length=run.data.sequence_length, n_vocab=run.model.n_vocab)
    data = Data(
        train=open_one(run.data.train),
        validation={name: open_one(where) for name, where in run.data.validation.items()},
        tokenizer=tokenizer_for_data(run.data.tokenizer, run.data.train, run.model.n_vocab),
    )
    TrainLoader(data.train, seed=run.seed, batch_size=run.train.batch_size)
    for source in data.validation.values():
        validation_batches(source, micro_batch_size(run))
    return data


def training_stream(run: RunConfig, data: Data, layout: Layout, position: int) -> Generator[Any]:
    """Batches for the training program from `position` on, endless; this process reads its own rows alone."""
    batches = train_batches(run, layout)
    loader = TrainLoader(data.train, seed=run.seed, batch_size=run.train.batch_size, rows=batches.rows)
    with contextlib.closing(loader.batches(position)) as stream:
        for rows in stream:
            yield batches.place(rows)


def validation_streams(run: RunConfig, data: Data, layout: Layout) -> dict[str, Callable[[], Iterator[Any]]]:
    """For each validation set, one ordered pass in batches for the validation program."""
    batches = validation_batches_of(run, layout)

    def one_pass(source: RecordSource) -> Iterator[Any]:
        limit = run.train.validation_batches
        with contextlib.closing(validation_batches(source, batches.batch_size, limit, rows=batches.rows)) as stream:
            for rows in stream:
                yield batches.place(rows)

    return {name: functools.partial(one_pass, source) for name, source in data.validation.items()}
