"""Completing a few prompts at once, from one thread: what `Model.generate` and the command do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.pages import page_size, table_width
from mesh_transformer.engine.programs import Programs, Uses
from mesh_transformer.engine.request import Request
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sample.options import Completion, Piece, SamplingOptions
from mesh_transformer.shapes import Params
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout

# Where a token takes a few milliseconds, the host's part of each counts; a person does not see that eight come at a
# time.
_AHEAD, _SMALL_BYTES = 8, 1 << 29
# Texts under way at one time; more wait for their turn.
_LARGEST_BATCH = 64


class Generator:
    """Completes prompts with one model, by an engine that is made for them and holds no more than they need."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        policy: ComputePolicy,
        tokenizer: Tokenizer | None,
        layout: Layout = ONE_DEVICE_LAYOUT,
    ) -> None:
        self.cfg, self.params, self.policy, self.tokenizer, self.layout = cfg, params, policy, tokenizer, layout
        # Speed before rounding: alone, a text has no neighbours that could change its last bits.
        self.programs = Programs(cfg, policy, layout, alike=False)
        # By size, not by a clock, so that the same prompt gives the same text.
        small = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) <= _SMALL_BYTES
        self._ahead = _AHEAD if small and layout.mesh is None else 1

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
            UserError: as `Engine.check`.
        """
        if not prompts:
            return
        requests = [Request(prompt=tuple(p), options=o) for p, o in zip(prompts, options, strict=True)]
        engine = self._engine_for(requests)
        rows = {engine.submit(request): row for row, request in enumerate(requests)}
        texts, tokens = [""] * len(rows), [list[int]() for _ in rows]
        while engine.busy:
            for sequence, output in engine.step():
                row = rows[sequence]
                texts[row] += output.text
                tokens[row] += output.tokens
                if output.finish_reason is not None:
                    yield Piece(row, output.text, Completion(texts[row], tokens[row], output.finish_reason))
                elif output.text:
                    yield Piece(row, output.text)

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        """Sizes are powers of two, so that few shapes are ever compiled."""
        longest = max(len(r.prompt) + r.options.max_tokens for r in requests)
        batch = _power(min(len(requests), _LARGEST_BATCH))
        per_text = min(-(-max(1, longest) // page_size(self.cfg.n_ctx)), table_width(self.cfg.n_ctx))
        of_group = -(-batch // self.layout.sizes.batch_ways)
        return Engine(
            self.programs,
            self.params,
            self.tokenizer,
            max_batch=batch,
            n_positions=_power(longest),
            n_pages=_power(per_text * of_group),
            uses=Uses.of(requests),
            together=True,
            ahead=self._ahead,
        )


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
