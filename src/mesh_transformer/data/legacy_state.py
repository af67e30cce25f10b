"""Where the original's loader stood, as a position in ours (docs/formats.md, section 9.4)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mesh_transformer.config.errors import DataError
from mesh_transformer.data.source import RecordSource


def position_of_loader_state(state: Mapping[str, Any], source: RecordSource, batch_size: int) -> int:
    """The number of the sequence, in file order, with which the original's next batch begins.

    The original read files in the order of its index, made whole batches of each and dropped the rest of it. What it
    loses when it is restored after the last batch of a file, the first batch of the next one, is not lost here. The
    position is that of a loader with `data.shuffle = false`; it may be the end of the data, where the next epoch
    begins. From there on our loader drops nothing, so that the batches of both agree up to the end of that file.

    Args:
        state: `train_loader` of meta.json: {"used": paths finished, "file_idx": number of the last batch in the next}.
        source: the same files in the same order; their directories may differ.
        batch_size: sequences of a batch of the original, gradient accumulation included.

    Raises:
        DataError: it is no such state, or not one of these files and this batch size.
    """
    used, last = _checked(state)
    counts = source.file_counts
    for n, path in enumerate(used):
        if n >= len(source.files) or os.path.basename(source.files[n]) != os.path.basename(path):
            here = f"here it is {source.files[n]!r}" if n < len(source.files) else f"here are {len(source.files)} files"
            raise DataError(
                f"the original's loader had read {path!r} as file {n + 1}, and {here}; give data.train the index of "
                "that run, in its order"
            )
    current = len(used)
    if current == len(counts):
        return len(source)
    n_batches = counts[current] // batch_size
    # Before anything is read the state says batch 0 of the first file, which may be too small to have one.
    if last >= n_batches and not (last == 0 and n_batches == 0):
        raise DataError(
            f"the original's loader had read batch {last} of {source.files[current]!r}, which has {n_batches} batches "
            f"of {batch_size}; give train.batch_size the value of that run (with its gradient accumulation), and "
            "data.train its index"
        )
    if last + 1 >= n_batches:  # that was the last whole batch: the rest of the file is dropped
        return sum(counts[: current + 1])
    return sum(counts[:current]) + (last + 1) * batch_size


def _checked(state: Mapping[str, Any]) -> tuple[list[str], int]:
    used, last = state.get("used", []), state.get("file_idx")
    right = isinstance(used, list) and all(isinstance(path, str) for path in used)
    if not right or not isinstance(last, int) or isinstance(last, bool) or last < 0:
        raise DataError(
            f"the original's loader state is {str(dict(state))[:200]}; "
            'expected {"used": [paths], "file_idx": number}'
        )
    return used, last
