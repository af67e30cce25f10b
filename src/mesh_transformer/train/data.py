"""The data of a run: opened, checked against the configuration, and as batches that its programs take."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any

from mesh_transformer.config.errors import DataError
from mesh_transformer.config.run import RunConfig
from mesh_transformer.data.choice import tokenizer_for_data
from mesh_transformer.data.loader import TrainLoader, stream_fingerprint, validation_batches
from mesh_transformer.data.mixture import Sequences, open_training
from mesh_transformer.data.source import RecordSource, open_source
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.sharding.layout import Layout
from mesh_transformer.train.loop import micro_batch_size, train_batches, validation_batches_of


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads: opened, and checked against the configuration."""

    train: Sequences
    validation: dict[str, RecordSource]
    tokenizer: Tokenizer | None
    shuffle: bool = True

    @property
    def record(self) -> dict[str, Any]:
        """What must stay the same for a run to go on."""
        fingerprint = stream_fingerprint(self.train, self.shuffle)
        return {"fingerprint": fingerprint, "sequence_length": self.train.sequence_length}


def open_data(run: RunConfig, note: Callable[[str], None] | None = None, otherwise: Tokenizer | None = None) -> Data:
    """Opens every data set of the run and checks it against model and batch.

    Args:
        note: told what a user should know of the data, such as files that it names twice.
        otherwise: the tokenizer of data of which neither `data.tokenizer` nor a record says it.

    Raises:
        DataError: one is missing, damaged, does not fit the model, or holds less than a batch.
        ConfigError: a weight of a mixture is too small.
    """
    data = Data(
        train=open_training(run.data.train, run.data.weights, note=note, **_fitting(run)),
        validation={
            name: open_source(where, note=note, **_fitting(run)) for name, where in run.data.validation.items()
        },
        tokenizer=tokenizer_for_data(run.data.tokenizer, run.data.train, run.model.n_vocab, otherwise),
        shuffle=run.data.shuffle,
    )
    TrainLoader(data.train, seed=run.seed, batch_size=run.train.batch_size)
    for source in data.validation.values():
        validation_batches(source, micro_batch_size(run))
    return data


def training_stream(run: RunConfig, data: Data, layout: Layout, position: int) -> Generator[Any]:
    """Batches for the training program from `position` on, endless; this process reads its own rows alone."""
    batches = train_batches(run, layout)
    loader = TrainLoader(
        data.train, seed=run.seed, batch_size=run.train.batch_size, rows=batches.rows, shuffle=data.shuffle
    )
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


def count_steps(run: RunConfig) -> RunConfig:
    """The run with `train.epochs` turned into steps by counting the training data; itself where it has no epochs.

    Raises:
        DataError: as `open_data`, of the training data.
    """
    if run.train.epochs is None:
        return run
    training = open_training(run.data.train, run.data.weights, **_fitting(run))
    return dataclasses.replace(run, train=run.train.with_steps(len(training)))


def _fitting(run: RunConfig) -> dict[str, Any]:
    """What data must suit."""
    return {"sequence_length": run.data.sequence_length, "n_vocab": run.model.n_vocab}


def separator_of(run: RunConfig, data: Data) -> int | None:
    """The id that begins documents which see nothing before it; None where rows are read as one text.

    Raises:
        DataError: documents are to be kept apart, and there is no tokenizer with an end-of-text token.
    """
    if not run.data.separate_documents:
        return None
    if data.tokenizer is None or data.tokenizer.end_of_text is None:
        raise DataError(
            "data.separate_documents = true needs a tokenizer that has an end-of-text token, to know where documents "
            'end; set data.tokenizer, for example data.tokenizer = "gpt2"'
        )
    return data.tokenizer.end_of_text
