"""Text to ids on all cores, in order.

The tokenizers library has threads of its own, which are as fast as processes and need neither start nor copies: of what
stands around them (lists to arrays) there is a twentieth. What Python does, ftfy, the detokenizer and the bytes
tokenizer, goes to worker processes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mesh_transformer.config.errors import RunError
from mesh_transformer.data.documents import Piece
from mesh_transformer.data.normalize import fix_text, wikitext_detokenize
from mesh_transformer.data.supervised import Segment
from mesh_transformer.data.tokenizer import BUILT_IN, END_OF_TEXT, Tokenizer, from_bytes, load_tokenizer

_PIECE = 1 << 17  # characters of a long document that are tokenized apart
_BATCH = 1 << 19  # characters that a worker takes at once
_INLINE = 4  # so few batches are done before a process would have started
# Of every pre-tokenizer that `may_cut` knows, a token ends before such a space and the next begins with it.
_CUT = re.compile(r"(?<=[A-Za-z0-9]) (?=[A-Za-z])")


_Item = TypeVar("_Item")


class Encoded(NamedTuple):
    """ids [n]; a part ends before each position in `ends` [m]; how many examples were left out, and why."""

    ids: np.ndarray
    ends: np.ndarray
    too_long: int = 0
    nothing_learned: int = 0


# ------------------------------------------------------------------------------------------------- documents to batches


class Divider:
    """Divides documents at `<|endoftext|>` and leaves empty parts out; `empty` counts those.

    Args:
        divide: False leaves `<|endoftext|>` in the text.
    """

    def __init__(self, divide: bool) -> None:
        self._divide = divide
        self.empty = 0

    def __call__(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces of the parts, none of them empty as a whole."""
        rest, begun = "", False
        for text, ends in pieces:
            text = rest + text
            rest = ""
            if self._divide:
                *closed, text = text.split(END_OF_TEXT)
                for part in closed:
                    if part or begun:
                        yield part, True
                    else:
                        self.empty += 1
                    begun = False
            if ends:
                if text or begun:
                    yield text, True
                else:
                    self.empty += 1
                begun = False
                continue
            if self._divide:  # the mark may go on in the next piece
                held = next((n for n in range(len(END_OF_TEXT) - 1, 0, -1) if text.endswith(END_OF_TEXT[:n])), 0)
                text, rest = text[: len(text) - held], text[len(text) - held :]
            if text:
                begun = True
                yield text, False


def may_cut(tokenizer: Tokenizer) -> bool:
    """Whether the ids of a long text are those of its pieces, cut where a space stands between a word and a letter.

    So it is with bytes, and where GPT-2's own pre-tokenizer is all that comes before the merges.
    """
    if tokenizer.name in BUILT_IN:
        return True
    description = json.loads(tokenizer.to_bytes())
    pre = description.get("pre_tokenizer") or {}
    added = description.get("added_tokens") or []
    return (
        description.get("normalizer") is None
        and (pre.get("type"), pre.get("use_regex", True), pre.get("add_prefix_space")) == ("ByteLevel", True, False)
        and all(token.get("special") for token in added)
    )


def cut_pieces(parts: Iterable[Piece], cut: bool) -> Iterator[Piece]:
    """The parts in pieces that can be tokenized apart: whole ones, or where `cut` allows it, those of long parts."""
    held: list[str] = []
    size, wanted = 0, 2 * _PIECE
    for text, ends in parts:
        held.append(text)
        size += len(text)
        if cut and size >= wanted:
            whole, begin = "".join(held), 0
            while len(whole) - begin >= 2 * _PIECE and (found := _CUT.search(whole, begin + _PIECE)):
                yield whole[begin : found.start()], False
                begin = found.start()
            held, size = [whole[begin:]], len(whole) - begin
            # Text without such a place is looked through again only after it has doubled.
            wanted = max(2 * size, 2 * _PIECE)
        if ends:
            yield "".join(held), True
            held, size, wanted = [], 0, 2 * _PIECE


def batched(items: Iterable[_Item], size_of: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """Lists of items with about as much text as a worker should take at once."""
    batch: list[_Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item) + 64  # many small ones have a cost of their own
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------------------ batches to ids


class _Work:
    """What is done to a batch, here or in a worker process: the tokenizer travels there as its name or its file."""

    tokenizer: Tokenizer

    @property
    def in_python(self) -> bool:
        """Whether Python does most of it, on one core."""
        return self.tokenizer.name == "bytes"

    def __getstate__(self) -> dict[str, Any]:
        name = self.tokenizer.name
        return vars(self) | {"tokenizer": (name, None if name in BUILT_IN else self.tokenizer.to_bytes())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        name, content = state["tokenizer"]
        tokenizer = load_tokenizer(name) if content is None else from_bytes(content, name=name)
        # Not setattr: these are frozen.
        self.__dict__.update(state | {"tokenizer": tokenizer})

    def __call__(self, batch: Any) -> Encoded:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class EncodeText(_Work):
    """Pieces of text to ids, with end-of-text after each part. `ftfy` and `detokenize` change whole parts before."""

    tokenizer: Tokenizer
    ftfy: bool = False
    detokenize: bool = False

    @property
    def in_python(self) -> bool:
        return self.ftfy or self.detokenize or super().in_python

    def __call__(self, batch: list[Piece]) -> Encoded:
        texts = [text for text, _ in batch]
        if self.ftfy:
            texts = [fix_text(text) for text in texts]
        if self.detokenize:
            texts = [wikitext_detokenize(text) for text in texts]
        arrays: list[np.ndarray] = []
        for ids, (_, ends) in zip(self.tokenizer.encode_batch(texts), batch, strict=True):
            arrays.append(np.array([*ids, self.tokenizer.end_of_text] if ends else ids, np.int32))
        positions = np.cumsum([ids.size for ids in arrays], dtype=np.int64)
        return Encoded(np.concatenate(arrays), positions[np.array([ends for _, ends in batch], bool)])


@dataclasses.dataclass(frozen=True)
class EncodeExamples(_Work):
    """Examples to ids; one that is not learned stands as its complement, `~id`.

    Those longer than `width` are left out, or cut there if `cut`; so are those without anything to learn.
    """

    tokenizer: Tokenizer
    width: int
    cut: bool = False

    def __call__(self, batch: list[list[Segment]]) -> Encoded:
        # Each segment by itself: a token never reaches from what is read into what is learned.
        texts = [text for example in batch for text, _ in example if text is not None]
        encoded = iter(self.tokenizer.encode_batch(texts))
        kept: list[np.ndarray] = []
        too_long = nothing = 0
        for example in batch:
            parts = [
                np.array([self.tokenizer.end_of_text] if text is None else next(encoded), np.int32) ^ -(not learned)
                for text, learned in example
            ]
            ids = np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
            if ids.size > self.width:
                if not self.cut:
                    too_long += 1
                    continue
                ids = ids[: self.width]
            if not (ids[1:] >= 0).any():  # the first id is never predicted
                nothing += 1
                continue
            kept.append(ids)
        ends = np.cumsum([ids.size for ids in kept], dtype=np.int64)
        return Encoded(np.concatenate([np.zeros(0, np.int32), *kept]), ends, too_long, nothing)


def encode_batches(work: _Work, batches: Iterable[Any], workers: int) -> Iterator[Encoded]:
    """`work` of every batch, in their order, whatever the number of `workers`; memory holds a few batches of each.

    Done in this process are little text, all of it with one worker, and what the tokenizers library does with threads.

    Raises:
        UserError: as `work` does.
        RunError: a worker process was killed.
    """
    source = iter(batches)
    alone = workers <= 1 or not work.in_python
    first = [] if alone else list(itertools.islice(source, _INLINE + 1))
    if len(first) <= _INLINE:
        yield from map(work, itertools.chain(first, source))
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        # Not fork: a process with threads (those of JAX, and the tokenizer's) must not be copied as it stands.
        workers, multiprocessing.get_context("spawn"), _start, (work,)
    )  # fmt: skip
    waiting: collections.deque[concurrent.futures.Future[Encoded]] = collections.deque()
    try:
        for batch in itertools.chain(first, source):
            waiting.append(pool.submit(_run, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process of prepare ended early, perhaps for lack of memory; give fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: _Work | None = None


def _start(work: _Work) -> None:
    """Readies a worker process."""
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what is parallel
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle, whose terminal it is
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    # A worker waits for work that a killed parent never sends.
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _run(batch: Any) -> Encoded:
    assert _work is not None
    return _work(batch)
