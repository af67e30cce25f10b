"""The texts that a report looks at: prompts, held-out rows and rows that the run was trained on."""

from __future__ import annotations

import contextlib

import numpy as np

from mesh_transformer.api import Model
from mesh_transformer.report.facts import Facts
from mesh_transformer.report.observing import Material, prompt_of
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT
from mesh_transformer.train.data import Data, open_data, training_stream

_SAMPLES = 3  # texts that are continued where no prompts are given


def gather_material(facts: Facts, model: Model, prompts: list[str], n_rows: int) -> Material:
    """Reads the run's own data: `n_rows` of each set, evenly spread over it.

    Raises:
        DataError: the data has gone or changed since, or a prompt cannot be read.
        UserError: a prompt is given, and the model has no tokenizer.
    """
    data = open_data(facts.run)
    held_out = {name: _spread(source, n_rows) for name, source in data.validation.items()}
    training = trained_rows(facts, data, n_rows)
    given: list[list[int]] = [model.encode(text) for text in prompts]
    if not given:
        rows = next(iter(held_out.values()), training)
        given = [prompt_of(row) for row in rows[:_SAMPLES]]
    return Material(prompts=given, held_out=held_out, training=training)


def _spread(source: object, n_rows: int) -> np.ndarray:
    n: int = len(source)  # type: ignore[arg-type]
    chosen = np.unique(np.linspace(0, n - 1, min(n, n_rows)).astype(np.int64))
    return np.stack([source[int(i)] for i in chosen])  # type: ignore[index]


def trained_rows(facts: Facts, data: Data, n_rows: int) -> np.ndarray:
    """Different rows of the batches that the newest checkpoint has seen, evenly spread over the run."""
    batch = facts.run.train.batch_size
    n_batches = max(1, facts.position // batch)
    rows = []
    for number in np.unique(np.linspace(0, n_batches - 1, min(n_batches, n_rows)).astype(np.int64)):
        stream = training_stream(facts.run, data, ONE_DEVICE_LAYOUT, int(number) * batch)
        with contextlib.closing(stream):
            found = np.asarray(next(stream))
        per_batch = -(-n_rows // n_batches)  # a short run gives several of each
        rows.append(found.reshape(-1, found.shape[-1])[:per_batch])
    # In later epochs the same row comes again.
    different = {row.tobytes(): row for row in np.concatenate(rows)}
    return np.stack(list(different.values()))[:n_rows]
