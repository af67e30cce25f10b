"""Compiling every program that an engine can come to need, before anybody waits for it."""

from __future__ import annotations

import jax
import numpy as np

from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.pages import chunk_width
from mesh_transformer.engine.request import Request
from mesh_transformer.engine.slots import slot_values
from mesh_transformer.sample.options import SamplingOptions


def warm(engine: Engine) -> None:
    """Runs every program once, unheard, on the scratch page and the last slot; the engine must be idle."""
    programs, n_groups = engine.programs, engine.n_groups
    n_ctx, n_vocab = programs.cfg.n_ctx, programs.cfg.n_vocab
    values = slot_values(Request(prompt=(), options=SamplingOptions(temperature=0.0)), n_vocab)
    engine.slots = programs.fill(engine.slots, np.int32(engine.max_batch), np.uint32(0), *values)
    for width in sorted({chunk_width(1, n_ctx), chunk_width(engine.page_size, n_ctx)}):
        tokens = np.zeros((n_groups, width), np.int32)
        rows = np.zeros((n_groups, 2 + engine.width), np.int32)
        rows[:, 1] = 1
        for targets in (None, tokens):
            _, engine.cache, _ = programs.prefill(engine.params, engine.cache, tokens, rows, targets)
    of_group = engine.n_rows(1)
    while True:
        rows = np.zeros((n_groups * of_group, 2 + engine.width), np.int32)
        logits, engine.cache = programs.decode(engine.params, engine.cache, rows)
        _choose(engine, logits)
        if of_group >= engine.n_rows(engine.slots_per_group):
            break
        of_group *= 2
    jax.block_until_ready(engine.cache)


def _choose(engine: Engine, logits: jax.Array) -> None:
    rows = np.full((len(logits), 3), (engine.max_batch, 0, 0), np.int32)
    for shaping in (False, True):
        uses = engine.uses._replace(shaping=shaping)
        # As many ends as texts have: another number would be another program.
        ends = [-1] * max(1, len(engine.ends))
        _, _, engine.slots = engine.programs.choose(logits, engine.slots, rows, ends, uses)
