"""Programs that compile nothing: the cache holds token ids, and the next token is a checksum of all that is seen.

Every look checks that a row's table leads to its own text, so that a page that was shared wrongly, given away too
soon or overwritten is found at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.programs import Alternatives, Programs
from mesh_transformer.engine.request import MOST_ALTERNATIVES
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout

N_VOCAB = 258


def config(n_ctx: int = 160, position: str = "rotary") -> ModelConfig:
    """A model of which nothing but the context and the kind of positions matters."""
    return ModelConfig(n_layers=1, d_model=4, n_heads=1, n_vocab=N_VOCAB, n_ctx=n_ctx, position=position, d_rotary=4)


def next_token(seen: Sequence[int]) -> int:
    """The token that follows what is seen."""
    return zlib.crc32(np.asarray(seen, np.int32).tobytes()) % 256


def expected(prompt: Sequence[int], n: int, cfg: ModelConfig) -> list[int]:
    """The completion of a prompt by the rule alone."""
    text, start = list(prompt), 0
    for _ in range(n):
        if cfg.position == "fixed" and len(text) - start > cfg.n_ctx:
            start = len(text) - cfg.n_ctx // 2
        text.append(next_token(text[start:][-cfg.n_ctx :]))
    return text[len(prompt) :]


class _Cache:
    """Which token stands in every place of every page, and at which position of its text."""

    def __init__(self, n_groups: int, n_pages: int, page_size: int, n_ctx: int) -> None:
        self.held = np.full((n_groups, n_pages, page_size, 2), -1)
        self.page_size, self.n_ctx = page_size, n_ctx

    def write(self, group: int, table: np.ndarray, position: int, token: int) -> None:
        self._place(group, table, position)[:] = token, position

    def seen(self, group: int, table: np.ndarray, position: int) -> list[int]:
        """The tokens that a query at a position sees."""
        text = []
        for at in range(max(0, position - self.n_ctx + 1), position + 1):
            token, found = self._place(group, table, at)
            assert found == at, f"the page of position {at} holds {found}"
            text.append(int(token))
        return text

    def _place(self, group: int, table: np.ndarray, position: int) -> np.ndarray:
        page = table[position // self.page_size % len(table)]
        return self.held[group, page, position % self.page_size]


class FakePrograms(Programs):
    """As `Programs`.

    chunks: (position, tokens) of every chunk read for a text. batches: texts of every step's tokens. before: called
    before each program runs with its name; may raise.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout = ONE_DEVICE_LAYOUT) -> None:
        super().__init__(cfg, ComputePolicy(), layout)
        self.chunks: list[tuple[int, int]] = []
        self.batches: list[int] = []
        self.before: Callable[[str], None] = lambda name: None

    def prefill(self, params: Any, cache: Any, tokens: Any, rows: Any, targets: Any = None) -> Any:
        self.before("prefill")
        cache = self._cache(cache)
        logits = np.zeros((len(tokens), self.fewest_rows, N_VOCAB), np.float32)
        scores = np.zeros((*tokens.shape, N_VOCAB), np.float32)
        for group, (start, n, *table) in enumerate(rows):
            assert start % cache.page_size == 0 and n <= cache.page_size
            for i in range(tokens.shape[1]):  # what lies beyond n is padding, and spoils its place as the real one does
                cache.write(group, table, start + i, tokens[group, i] if i < n else -2)
            if any(table):
                self.chunks.append((int(start), int(n)))
                for i in range(n):
                    scores[group, i, next_token(cache.seen(group, table, start + i))] = 1
                logits[group] = scores[group, n - 1]
        logits = logits.reshape(-1, N_VOCAB)
        return logits, cache, None if targets is None else _alternatives(scores, targets)

    def decode(self, params: Any, cache: Any, rows: Any) -> Any:
        self.before("decode")
        cache = self._cache(cache)
        logits = np.zeros((len(rows), N_VOCAB), np.float32)
        of_group = len(rows) // len(cache.held)
        for i, (token, position, *table) in enumerate(rows):
            cache.write(i // of_group, table, position, token)
            if any(table):
                logits[i, next_token(cache.seen(i // of_group, table, position))] = 1
        self.batches.append(sum(any(row[2:]) for row in rows))
        return logits, cache

    def choose(self, logits: Any, slots: Any, rows: Any, end: int, uses: Any) -> Any:
        self.before("choose")
        tokens = np.argmax(logits, axis=-1).astype(np.int32)
        return tokens, _alternatives(logits, tokens), slots

    def fill(self, slots: Any, *values: Any) -> Any:
        self.before("fill")
        return slots

    def _cache(self, cache: Any) -> _Cache:
        """In place of the one that an engine makes when it begins again."""
        if isinstance(cache, _Cache):
            return cache
        return _Cache(cache.n_groups, cache.k.shape[2], cache.page_size, self.cfg.n_ctx)


def _alternatives(scores: np.ndarray, tokens: np.ndarray) -> Alternatives:
    ids = np.argsort(-scores, axis=-1, kind="stable")[..., :MOST_ALTERNATIVES]
    of_token = np.take_along_axis(scores, tokens[..., None].astype(int), axis=-1)[..., 0]
    return Alternatives(of_token, ids, np.take_along_axis(scores, ids, axis=-1))


def fake_engine(max_batch: int = 4, cfg: ModelConfig | None = None, **options: Any) -> tuple[Engine, FakePrograms]:
    """An engine without a model, and its programs."""
    layout = options.pop("layout", ONE_DEVICE_LAYOUT)
    programs = FakePrograms(cfg or config(), layout)
    return Engine(programs, {}, options.pop("tokenizer", None), max_batch=max_batch, **options), programs


def assert_idle(engine: Engine) -> None:
    """Every slot and page has come back, and nothing is promised."""
    assert not engine.running and not engine.waiting and not engine.busy
    n = engine.slots_per_group
    assert [sorted(free) for free in engine._free] == [list(range(g * n, (g + 1) * n)) for g in range(engine.n_groups)]
    assert [pool.n_in_use for pool in engine._pools] == [0] * engine.n_groups
    assert engine._promised == [0] * engine.n_groups
