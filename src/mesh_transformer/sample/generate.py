"""Generation: prefill in length buckets, then one compiled step a token, for prompts of unequal lengths."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.model.cache import KVCache, empty_cache
from mesh_transformer.model.decoder import hidden, unembed
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sample.methods import RowOptions, next_tokens
from mesh_transformer.sample.options import Completion, Piece, SamplingOptions
from mesh_transformer.sample.text import TextStream
from mesh_transformer.shapes import Array, Float, Int, Params
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout
from mesh_transformer.sharding.rules import ONE_DEVICE, Rules

_SMALLEST_BUCKET = 16


class Generator:
    """Completes prompts with one model. Programs are compiled once for each bucket of shapes."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        policy: ComputePolicy,
        tokenizer: Tokenizer | None,
        layout: Layout = ONE_DEVICE_LAYOUT,
    ) -> None:
        self.cfg, self.params, self.policy, self.tokenizer, self.layout = cfg, params, policy, tokenizer, layout
        how: dict[str, Any] = {"cfg": cfg, "policy": policy, "rules": layout.rules}
        self._prefill = jax.jit(functools.partial(prefill, **how), donate_argnames="cache")
        self._step = jax.jit(functools.partial(decode_step, **how), donate_argnames="cache")
        self._pick = jax.jit(next_tokens, static_argnames=("sampler", "filtered"))

    def generate(self, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions]) -> list[Completion]:
        """The completion of every prompt (token ids), each under its own options."""
        done: dict[int, Completion] = {}
        for piece in self.stream(prompts, options):
            if piece.completion is not None:
                done[piece.row] = piece.completion
        return [done[row] for row in range(len(prompts))]

    def stream(self, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions]) -> Iterator[Piece]:
        """Pieces of text as they come, rows interleaved.

        A text that outgrows the context slides: the oldest token is forgotten with every new one. With fixed
        positions, which cannot slide, the newest half of the context is read again from position 0.

        Raises:
            UserError: a prompt is empty without an end-of-text token to start from, longer than the context, or holds
                ids outside the vocabulary; or there are stop strings but no tokenizer.
        """
        prompts = [self._checked(prompt) for prompt in prompts]
        if not prompts:
            return
        # The samplers differ in the order of their filters, so that a batch has one of them.
        sampler = options[0].sampler
        if any(o.sampler != sampler for o in options):
            raise UserError("the completions of one batch must share a sampler: either 'default' or 'legacy'")
        if self.tokenizer is None and any(o.stop for o in options):
            raise UserError(
                "stop strings are found in text, and this model has no tokenizer; give one, or leave them out"
            )
        filtered = any(o.filters for o in options)
        rows = [_Row(list(p), o, TextStream(self.tokenizer, o.stop)) for p, o in zip(prompts, options, strict=True)]
        row_options = _row_options(options)
        reach = max(len(r.tokens) + r.options.max_tokens for r in rows)
        yield from (row.finish(i, "length") for i, row in enumerate(rows) if row.options.max_tokens == 0)
        if all(row.done for row in rows):
            return
        logits, cache, starts = self._read(rows, reach)
        while True:
            positions = jnp.asarray([len(r.tokens) for r in rows], jnp.int32)
            picked = self._pick(
                self._without_end(logits, rows), positions, row_options, sampler=sampler, filtered=filtered
            )
            chosen = np.asarray(picked)
            for i, row in enumerate(rows):
                if not row.done:
                    yield from row.take(i, int(chosen[i]), self._end_of_text)
            if all(row.done for row in rows):
                return
            logits, cache, starts = self._advance(rows, picked, cache, starts, reach)

    @property
    def _end_of_text(self) -> int | None:
        return self.tokenizer.end_of_text if self.tokenizer else None

    def _checked(self, prompt: Sequence[int]) -> Sequence[int]:
        if not prompt:
            if self._end_of_text is None:
                raise UserError("the prompt is empty and this model has no end-of-text token to start from")
            prompt = [self._end_of_text]
        if len(prompt) > self.cfg.n_ctx:
            raise UserError(
                f"the prompt has {len(prompt)} tokens but the model's context holds {self.cfg.n_ctx}; "
                f"shorten it by {len(prompt) - self.cfg.n_ctx}"
            )
        outside = [t for t in prompt if not 0 <= t < self.cfg.n_vocab]
        if outside:
            raise UserError(f"token id {outside[0]} is outside the model's vocabulary of {self.cfg.n_vocab} ids")
        return prompt

    def _without_end(self, logits: Array, rows: Sequence[_Row]) -> Array:
        held_off = [len(r.new) < r.options.min_tokens for r in rows]
        if self._end_of_text is None or not any(held_off):
            return logits
        return logits.at[:, self._end_of_text].add(jnp.where(jnp.asarray(held_off), -jnp.inf, 0.0))

    def _read(self, rows: Sequence[_Row], reach: int, newest: int | None = None) -> tuple[Array, KVCache, np.ndarray]:
        """Prefills the (newest) tokens of every row from position 0; returns where each row's window starts."""
        texts = [r.tokens if newest is None else r.tokens[-newest:] for r in rows]
        lengths = self._padded([len(t) for t in texts], with_=1)
        width = _bucket(int(lengths.max()), self.cfg.n_ctx)
        padded = np.zeros((len(lengths), width), np.int32)
        for i, text in enumerate(texts):
            padded[i, : len(text)] = text
        # A text that will outgrow the context needs the whole ring; others only as much as they can fill.
        cache = empty_cache(
            self.cfg,
            batch=len(lengths),
            n_slots=_bucket(min(reach, self.cfg.n_ctx), self.cfg.n_ctx),
            n_positions=_bucket(reach),
            dtype=self.policy.jax_dtype,
            layout=self.layout,
        )
        with self.layout.using():
            placed = self.layout.place_rows(padded), self.layout.place_rows(lengths)
            logits, cache = self._prefill(self.params, *placed, cache=cache)
        return self._of_rows(logits, rows), cache, np.asarray([len(r.tokens) for r in rows]) - lengths[: len(rows)]

    def _padded(self, values: Sequence[int], with_: int) -> np.ndarray:
        """int32 values of the rows, and of rows that make the batch one that the devices can share."""
        padded = np.full(self.layout.padded_rows(len(values)), with_, np.int32)
        padded[: len(values)] = values
        return padded

    def _of_rows(self, logits: Array, rows: Sequence[_Row]) -> Array:
        """The logits of the texts, on one device: picking the next tokens is little work."""
        if self.layout.mesh is None:
            return logits
        return jnp.asarray(logits.addressable_data(0))[: len(rows)]

    def _advance(
        self, rows: Sequence[_Row], picked: Array, cache: KVCache, starts: np.ndarray, reach: int
    ) -> tuple[Array, KVCache, np.ndarray]:
        """Logits after the token that every row has just taken (finished rows go on unheard)."""
        for row in rows:
            if row.done and len(row.tokens) < reach:
                row.tokens.append(0)  # unheard; keeps the batch in step
        positions = np.asarray([len(r.tokens) - 1 for r in rows], np.int32) - starts
        with self.layout.using():
            tokens = self._padded(np.asarray(picked).tolist(), with_=0)[:, None]
            placed = self.layout.place_rows(tokens), self.layout.place_rows(self._padded(positions.tolist(), with_=0))
            logits, cache = self._step(self.params, *placed, cache=cache)
        logits = self._of_rows(logits, rows)
        full = positions >= self.cfg.n_ctx
        if self.cfg.position != "fixed" or not full.any():
            return logits, cache, starts
        # Absolute positions cannot slide: rows past the last one begin again with the newest half of their text.
        read_logits, read_cache, read_starts = self._read(rows, reach, newest=max(1, self.cfg.n_ctx // 2))
        with self.layout.using():
            again = self.layout.place_rows(self._padded(full.tolist(), with_=0) > 0)
            cache = dataclasses.replace(
                cache,
                k=jnp.where(again[None, :, None, None, None], read_cache.k, cache.k),
                v=jnp.where(again[None, :, None, None, None], read_cache.v, cache.v),
            )
        return jnp.where(full[:, None], read_logits, logits), cache, np.where(full, read_starts, starts)


@dataclasses.dataclass
class _Row:
    """One text under way: the prompt and what came after it."""

    tokens: list[int]
    options: SamplingOptions
    stream: TextStream
    new: list[int] = dataclasses.field(default_factory=list)
    done: bool = False

    def take(self, row: int, token: int, end_of_text: int | None) -> Iterator[Piece]:
        """Adds a token; yields the text that it completes, and the completion if it was the last."""
        self.tokens.append(token)
        if token == end_of_text and not self.options.ignore_eos:
            yield self.finish(row, "stop")
            return
        self.new.append(token)
        text = self.stream.push(token)
        if self.stream.stopped:
            yield self.finish(row, "stop", text)
        elif len(self.new) >= self.options.max_tokens:
            yield self.finish(row, "length", text)
        elif text:
            yield Piece(row, text)

    def finish(self, row: int, reason: str, text: str = "") -> Piece:
        """The last piece, with whatever text was held back."""
        self.done = True
        text += self.stream.flush()
        return Piece(row, text, Completion(self.stream.text, self.new, reason))


def _row_options(options: Sequence[SamplingOptions]) -> RowOptions:
    streams = [jax.random.fold_in(jax.random.key(o.seed), o.sample) for o in options]
    return RowOptions(
        temperature=jnp.asarray([o.temperature for o in options], jnp.float32),
        top_k=jnp.asarray([min(o.top_k, 2**31 - 1) for o in options], jnp.int32),
        top_p=jnp.asarray([o.top_p for o in options], jnp.float32),
        min_p=jnp.asarray([o.min_p for o in options], jnp.float32),
        keys=jnp.stack([jax.random.key_data(key) for key in streams]),
    )


def _bucket(n: int, limit: int | None = None) -> int:
    """The next power of two (so that few shapes are ever compiled), within the limit."""
    size = max(_SMALLEST_BUCKET, 1 << (n - 1).bit_length())
    return size if limit is None else min(size, limit)


def prefill(
    params: Params,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    *,
    cache: KVCache,
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Reads right-padded prompts from position 0: logits after each row's last token, and the filled cache."""
    x, filled = hidden(params, tokens, cfg, policy, rules, start=jnp.zeros_like(lengths), cache=cache)
    assert filled is not None
    last = jax.vmap(lambda row, length: row[length - 1])(x, lengths)
    return rules.place(unembed(params, last[:, None], cfg, policy, rules)[:, 0], (None, None)), filled


def decode_step(
    params: Params,
    tokens: Int[Array, "batch 1"],
    positions: Int[Array, " batch"],
    *,
    cache: KVCache,
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Adds one token to every row at its position: logits of the next, and the cache."""
    x, longer = hidden(params, tokens, cfg, policy, rules, start=positions, cache=cache)
    assert longer is not None
    return rules.place(unembed(params, x, cfg, policy, rules)[:, 0], (None, None)), longer
