"""Continuous batching: requests join and leave between any two tokens.

Every step reads at most one chunk of one prompt (of each group) and adds one token to every text that has been read,
so that a long prompt does not hold up the others. Chunks begin at the same positions whatever the prompt, and what
one row computes does not depend on its neighbours: docs/serving.md, "The same answer".
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mesh_transformer.config.errors import UserError
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.engine.checks import checked_prompt
from mesh_transformer.engine.pages import SCRATCH, PagePool, chunk_width, page_size, table_width
from mesh_transformer.engine.programs import Alternatives, Programs, Uses
from mesh_transformer.engine.request import Output, Request, TokenLogprob
from mesh_transformer.engine.sequence import Sequence
from mesh_transformer.engine.slots import empty_slots, slot_values
from mesh_transformer.model.cache import empty_cache
from mesh_transformer.shapes import Params

# A text and what a step adds to it.
Said = tuple[Sequence, Output]


@dataclasses.dataclass
class Counts:
    """What an engine has done since it was made; tokens, but for steps."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0


@dataclasses.dataclass(frozen=True)
class _Work:
    """Results that are still on the device, and what to do with them on the host."""

    results: Any
    deliver: Callable[[Any], list[Said]]


class Engine:
    """Completes many requests at once with one model. Not for several threads: see `EngineService`."""

    def __init__(
        self,
        programs: Programs,
        params: Params,
        tokenizer: Tokenizer | None,
        *,
        max_batch: int,
        n_positions: int = 0,
        n_pages: int | None = None,
        slide: bool = True,
        uses: Uses | None = None,
        together: bool = False,
        ahead: int = 1,
    ) -> None:
        """
        Args:
            max_batch: texts under way at one time.
            n_positions: tokens that a text may have, prompt included; by default 16 times the context if it slides.
            n_pages: pages of the cache, of each group; by default enough for `max_batch` texts of any length.
            slide: a text that outgrows the context forgets its oldest tokens (with absolute positions, its older
                half); otherwise it ends there, with finish_reason "length".
            uses: what requests may ask for; by default everything.
            together: nothing is written until every prompt that has a slot has been read, and batches always have the
                same size: fewer programs and steps, where somebody waits for all of the texts.
            ahead: tokens that texts are given at a time, where they can be: less work for the host, text in larger
                pieces, and up to so many less one computed in vain after a text has ended. On one device.
        """
        cfg, layout = programs.cfg, programs.layout
        self.programs, self.params, self.tokenizer, self.slide = programs, params, tokenizer, slide
        self.uses, self.together, self.ahead = uses or Uses(), together, ahead
        self.page_size = page_size(cfg.n_ctx)
        self.width = table_width(cfg.n_ctx)
        self.n_positions = max(n_positions or (16 if slide else 1) * cfg.n_ctx, cfg.n_ctx)
        self.n_groups = layout.sizes.batch_ways
        self.slots_per_group = -(-max_batch // self.n_groups)
        self._n_pages = 1 + (n_pages or self.slots_per_group * self.width)
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.counts = Counts()
        self.reset()

    def reset(self) -> None:
        """Forgets every text under way (not those that wait) and what the cache holds."""
        cfg, layout = self.programs.cfg, self.programs.layout
        device = jax.local_devices()[0] if layout.mesh is None else layout.mesh.local_devices[0]
        self.cache: Any = None  # so that the new one does not stand beside the old
        # Padding of the last chunk may lie beyond the last position.
        tables = 1 << (self.n_positions + self.page_size - 1).bit_length()
        dtype = self.programs.policy.jax_dtype
        self.cache = empty_cache(cfg, self._n_pages, self.page_size, tables, dtype, layout)
        # The last slot is that of rows which compute unheard.
        self.slots = empty_slots(self.max_batch + 1, cfg.n_vocab, device)
        self._pools = [PagePool(self._n_pages) for _ in range(self.n_groups)]
        slots = range(self.max_batch)  # every group has its own
        n = self.slots_per_group
        self._free = [collections.deque(slots[at : at + n]) for at in range(0, self.max_batch, n)]
        self._promised = [0] * self.n_groups  # the most pages that the texts of a group can come to hold
        self.running: list[Sequence] = []

    @property
    def max_batch(self) -> int:
        """Texts that can be under way at one time."""
        return self.slots_per_group * self.n_groups

    def n_rows(self, n: int) -> int:
        """The rows that `n` texts of a group are padded to: a power of two, so that few shapes are compiled."""
        wanted = self.slots_per_group if self.together else n
        return max(self.programs.fewest_rows, 1 << (wanted - 1).bit_length())

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text, if there are any."""
        return self.tokenizer.ends if self.tokenizer else ()

    # ------------------------------------------------------------------------------------------ requests

    def check(self, request: Request) -> list[int]:
        """The prompt that stands for a request's, which is not empty.

        Raises:
            UserError: a prompt is empty without an end-of-text token to start from, longer than the context, or holds
                ids outside the vocabulary; more tokens are asked for than a text may have or the cache can hold; there
                are stop strings but no tokenizer; an option has another value than it may.
        """
        longest = self.n_positions if self.slide else None
        prompt = checked_prompt(request, self.programs.cfg, self.tokenizer, longest=longest)
        if (needed := self._pages_of(len(prompt), request.options.max_tokens)) >= self._n_pages:
            raise UserError(f"the text needs {needed} pages of the cache, which has {self._n_pages - 1}; ask for less")
        return prompt

    def submit(self, request: Request) -> Sequence:
        """Queues a request. Raises UserError as `check`."""
        wanted = Uses.of([request])
        assert all(has or not wants for has, wants in zip(self.uses, wanted, strict=True)), (
            "beyond what the engine uses"
        )
        sequence = Sequence(request, self.check(request), self.tokenizer, self.width)
        sequence.n_pages = self._pages_of(sequence.n_prompt, request.options.max_tokens)
        self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a request unheard; what it holds is free for the next step."""
        if not sequence.done:
            sequence.done = True
            if sequence.slot is None:
                self.waiting.remove(sequence)
            else:
                self._leave(sequence)

    def _pages_of(self, n_prompt: int, max_tokens: int) -> int:
        return min(-(-(n_prompt + max_tokens) // self.page_size), self.width)

    # ------------------------------------------------------------------------------------------ a step

    def step(self) -> list[Said]:
        """Reads a chunk, adds a token to every text that was read before, and says what came of it."""
        self.counts.steps += 1
        said = self._admit()
        writers = [s for s in self.running if not s.reading]
        if self.together and len(writers) < len(self.running):
            writers = []
        work = [*self._prefill(), *self._decode(writers)]
        # The step's one transfer from the device.
        for each, found in zip(work, jax.device_get([each.results for each in work]), strict=True):
            said += each.deliver(found)
        return said

    def _admit(self) -> list[Said]:
        """Gives slots to those that wait, in their order; a text of which nothing is wanted ends at once."""
        said = []
        while self.waiting:
            sequence = self.waiting[0]
            if sequence.options.max_tokens == 0 and not sequence.request.prompt_logprobs:
                said.append((self.waiting.popleft(), sequence.finish("length")))
                continue
            # Of the groups that have room, the one with most.
            group = max(range(self.n_groups), key=lambda g: (self._has_room(g, sequence), len(self._free[g])))
            if not self._has_room(group, sequence):
                break
            self.waiting.popleft()
            sequence.group, sequence.slot = group, self._free[group].popleft()
            self._promised[group] += sequence.n_pages
            self.running.append(sequence)
            seed = np.uint32(sequence.options.seed)
            values = slot_values(sequence.request, self.programs.cfg.n_vocab)
            self.slots = self.programs.fill(self.slots, np.int32(sequence.slot), seed, *values)
            self.counts.prompt_tokens += sequence.n_prompt
        return said

    def _has_room(self, group: int, sequence: Sequence) -> bool:
        promised = self._promised[group] + sequence.n_pages
        return bool(self._free[group]) and promised <= self._pools[group].capacity

    def _leave(self, sequence: Sequence) -> None:
        self._release_pages(sequence)
        self._promised[sequence.group] -= sequence.n_pages
        assert sequence.slot is not None
        self._free[sequence.group].append(sequence.slot)
        self.running.remove(sequence)

    def _release_pages(self, sequence: Sequence) -> None:
        # The last first, since pages are given away in the order in which they were left, and a prefix without its
        # first page cannot be found.
        for page in sequence.pages[::-1]:
            if page != SCRATCH:
                self._pools[sequence.group].release(int(page))
        sequence.pages[:] = SCRATCH

    def _take_page(self, sequence: Sequence) -> None:
        """A page for the position that comes next, where a new page begins; one that slid out of sight is given up."""
        if sequence.n_read % self.page_size:
            return
        pool, place = self._pools[sequence.group], sequence.n_read // self.page_size % self.width
        if sequence.pages[place] != SCRATCH:
            pool.release(int(sequence.pages[place]))
        sequence.pages[place] = pool.take()

    def _take_over(self, sequence: Sequence) -> None:
        """Pages that other texts with the same prefix have left; the last token is always read, for its logits."""
        pool = self._pools[sequence.group]
        while sequence.shareable and len(sequence.to_read) > self.page_size:
            found = pool.find(sequence.prefix, sequence.to_read[: self.page_size])
            if found is None:
                return
            sequence.pages[sequence.n_read // self.page_size], sequence.prefix = found
            sequence.n_read += self.page_size
            sequence.n_cached += self.page_size
            self.counts.cached_tokens += self.page_size

    def _prefill(self) -> list[_Work]:
        """The next chunk of the text of each group that waits longest for it."""
        readers: dict[int, Sequence] = {}
        for sequence in self.running:
            if sequence.reading:
                readers.setdefault(sequence.group, sequence)
        if not readers:
            return []
        chunks = {}
        for group, sequence in readers.items():
            self._take_over(sequence)
            self._take_page(sequence)
            chunks[group] = sequence.to_read[: self.page_size]
        width = max(chunk_width(len(chunk), self.programs.cfg.n_ctx) for chunk in chunks.values())
        tokens, targets = np.zeros((2, self.n_groups, width), np.int32)
        rows = np.zeros((self.n_groups, 2 + self.width), np.int32)
        rows[:, 1] = 1
        for group, sequence in readers.items():
            chunk, following = chunks[group], sequence.to_read[1 : len(chunks[group]) + 1]
            tokens[group, : len(chunk)], targets[group, : len(following)] = chunk, following
            rows[group] = sequence.n_read, len(chunk), *sequence.pages
        scored = any(s.request.prompt_logprobs for s in readers.values())
        logits, self.cache, scores = self.programs.prefill(
            self.params, self.cache, tokens, rows, targets if scored else None
        )
        work = []
        if scores is not None:
            parts = [(s, g, s.n_read, len(chunks[g])) for g, s in readers.items() if s.request.prompt_logprobs]
            work.append(_Work(scores, lambda scores: self._note_prompts(parts, scores)))
        for group, sequence in readers.items():
            self._has_read(sequence, chunks[group])
        finished: list[Sequence | None] = [None] * (self.n_groups * self.programs.fewest_rows)
        for group, each in readers.items():
            if not each.reading and each.options.max_tokens:
                finished[group * self.programs.fewest_rows] = each
        if any(finished):
            work.append(self._choose(logits, finished))
        return work

    def _has_read(self, sequence: Sequence, chunk: list[int]) -> None:
        """Counts a chunk as read, and offers a page that it filled to others."""
        n_held = sequence.n_read // self.page_size
        sequence.n_read += len(chunk)
        sequence.reading = bool(sequence.to_read)
        if sequence.shareable and len(chunk) == self.page_size:
            page = int(sequence.pages[n_held])
            sequence.prefix = self._pools[sequence.group].publish(page, sequence.prefix, chunk)

    def _decode(self, writers: list[Sequence]) -> list[_Work]:
        """Reads the newest token of every text, which gives the next."""
        n_ctx = self.programs.cfg.n_ctx
        for sequence in writers if self.programs.cfg.position == "fixed" else ():
            if sequence.n_read >= n_ctx:  # absolute positions cannot slide
                sequence.begin_again(max(1, n_ctx // 2))
                self._release_pages(sequence)
        groups: list[list[Sequence]] = [[] for _ in range(self.n_groups)]
        for sequence in writers:
            if not sequence.reading:
                groups[sequence.group].append(sequence)
        if not any(groups):
            return []
        of_group = self.n_rows(max(len(group) for group in groups))
        order: list[Sequence | None] = []
        for group in groups:
            order += [*group, *[None] * (of_group - len(group))]
        n = self._n_ahead([each for each in order if each is not None])
        rows = np.zeros((len(order), 2 + self.width), np.int32)
        for row, each in zip(rows, order, strict=True):
            if each is not None:
                row[:2] = each.tokens[-1], each.n_read
                for _ in range(n):
                    self._take_page(each)
                    each.n_read += 1
                row[2:] = each.pages
        if n > 1:
            return [self._write_several(rows, order, n)]
        logits, self.cache = self.programs.decode(self.params, self.cache, rows)
        return [self._choose(logits, order)]

    def _n_ahead(self, heard: list[Sequence]) -> int:
        """Tokens that every one of these texts gets before the host looks at them: `ahead`, or one where that would be
        more than a text can still have or its pages can hold without one being given up.
        """
        longest = min(self.n_positions if self.slide else self.programs.cfg.n_ctx, self.width * self.page_size)
        if self.programs.cfg.position == "fixed":
            longest = min(longest, self.programs.cfg.n_ctx)
        room = min(min(s.options.max_tokens - s.n_new, longest - len(s.tokens)) for s in heard)
        return self.ahead if room >= self.ahead else 1

    def _write_several(self, rows: np.ndarray, order: list[Sequence | None], n: int) -> _Work:
        chosen, end, uses = self._choice(order)
        tokens, scores, self.cache, self.slots = self.programs.write_several(
            self.params, self.cache, self.slots, rows, chosen, end, n, uses
        )

        def deliver(found: tuple[np.ndarray, Alternatives | None]) -> list[Said]:
            said = []
            for i in range(n):
                going_on = [None if s is None or s.done else s for s in order]
                said += self._deliver(going_on, *jax.tree.map(lambda a: a[i], found))  # noqa: B023
            return said

        return _Work((tokens, scores), deliver)

    # ------------------------------------------------------------------------------------------ what came of it

    def _choose(self, logits: Any, order: list[Sequence | None]) -> _Work:
        """Next tokens for the rows that belong to a text."""
        tokens, scores, self.slots = self.programs.choose(logits, self.slots, *self._choice(order))
        scored = any(s.request.logprobs is not None for s in order if s is not None)
        return _Work((tokens, scores if scored else None), lambda found: self._deliver(order, *found))

    def _choice(self, order: list[Sequence | None]) -> tuple[np.ndarray, tuple[int, ...], Uses]:
        """What `Programs.choose` is told of the rows that belong to a text."""
        rows = np.full((len(order), 3), (self.max_batch, 0, 0), np.int32)
        for row, sequence in zip(rows, order, strict=True):
            if sequence is not None:
                assert sequence.slot is not None
                row[:] = sequence.slot, len(sequence.tokens), max(0, sequence.options.min_tokens - sequence.n_new)
        shaping = any(s.options.shapes for s in order if s is not None)
        return rows, self.ends or (-1,), self.uses._replace(shaping=shaping)

    def _deliver(self, order: list[Sequence | None], tokens: np.ndarray, scores: Alternatives | None) -> list[Said]:
        said = []
        longest = self.n_positions if self.slide else self.programs.cfg.n_ctx
        for i, sequence in enumerate(order):
            if sequence is None:
                continue
            token, wanted = int(tokens[i]), sequence.request.logprobs
            logprob = None if scores is None or wanted is None else _logprob(scores, (i,), token, wanted)
            output = sequence.take(token, self.ends, logprob, longest)
            self.counts.generated_tokens += 1
            if sequence.done:
                self._leave(sequence)
            said.append((sequence, output))
        return said

    def _note_prompts(self, parts: list[tuple[Sequence, int, int, int]], scores: Alternatives) -> list[Said]:
        """Likelihoods of the tokens after those of a chunk: (text, row, position of the chunk, its length)."""
        said = []
        for sequence, row, at, n in parts:
            wanted = sequence.request.logprobs or 0
            if at == 0:
                sequence.prompt_logprobs.append(TokenLogprob(sequence.tokens[0], None))
            for i in range(min(n, sequence.n_prompt - at - 1)):
                token = sequence.tokens[at + i + 1]
                sequence.prompt_logprobs.append(_logprob(scores, (row, i), token, wanted))
            if sequence.options.max_tokens == 0 and not sequence.reading:
                said.append((sequence, sequence.finish("length")))
                self._leave(sequence)
        return said


def _logprob(scores: Alternatives, at: tuple[int, ...], token: int, n: int) -> TokenLogprob:
    pairs = zip(scores.ids[at][:n].tolist(), scores.values[at][:n].tolist(), strict=True)
    return TokenLogprob(token, float(scores.of_token[at]), tuple(pairs))
