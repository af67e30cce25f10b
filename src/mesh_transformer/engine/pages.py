"""Which page of the key-value cache belongs to whom, and which hold a prefix that may come again."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

_LARGEST_PAGE = 64
_SMALLEST_PAGE = 16
# Where rows write that compute unheard.
SCRATCH = 0
# The prefix that every text has: nothing.
EMPTY_PREFIX = 0


def page_size(n_ctx: int) -> int:
    """Positions in a page, which is also the longest chunk of a prompt that is read at once."""
    return min(_LARGEST_PAGE, max(_SMALLEST_PAGE, 1 << (n_ctx - 1).bit_length()))


def table_width(n_ctx: int) -> int:
    """Pages of the longest window: the context, and one page so that a whole one can be forgotten at a time."""
    return -(-n_ctx // page_size(n_ctx)) + 1


def chunk_width(n: int, n_ctx: int) -> int:
    """What a chunk of `n` tokens is padded to: a page, or the smallest one for what is left of a prompt."""
    return _SMALLEST_PAGE if n <= _SMALLEST_PAGE else page_size(n_ctx)


@dataclasses.dataclass
class _Page:
    users: int = 0
    key: tuple[int, tuple[int, ...]] | None = None  # what it holds, if others may use it


class PagePool:
    """Pages of one group. A page is free, in use by one text or several, or kept for texts with the same prefix.

    Only whole pages of a prompt are shared. What a page holds depends on everything before it, so a prefix is
    named by a number that says all of it: `find` and `publish` take that of the pages before and return the next.
    Pages that nobody uses any more are kept, and given away when there is no other, those first that were left first.
    """

    def __init__(self, n_pages: int) -> None:
        self._pages = [_Page() for _ in range(n_pages)]
        self._free = list(range(n_pages - 1, SCRATCH, -1))
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._known: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # key -> page, number of the prefix
        self._n_prefixes = EMPTY_PREFIX

    @property
    def capacity(self) -> int:
        """Pages that texts can use."""
        return len(self._pages) - 1

    @property
    def n_in_use(self) -> int:
        """Pages that some text uses."""
        return self.capacity - len(self._free) - len(self._kept)

    def take(self) -> int:
        """A page for one text, whose content is not defined. The caller has made sure that there is one."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        self._pages[page].users = 1
        return page

    def release(self, page: int) -> None:
        """One text less uses the page."""
        held = self._pages[page]
        held.users -= 1
        assert held.users >= 0, f"page {page} was released once too often"
        if held.users == 0:
            if held.key is None:
                self._free.append(page)
            else:
                self._kept[page] = None

    def find(self, prefix: int, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The page that holds `tokens` after a prefix, now used by one text more, and the prefix with it."""
        found = self._known.get((prefix, tuple(tokens)))
        if found is None:
            return None
        page, _ = found
        self._kept.pop(page, None)
        self._pages[page].users += 1
        return found

    def publish(self, page: int, prefix: int, tokens: Sequence[int]) -> int:
        """Says that a page in use holds `tokens` after a prefix; returns the prefix with them."""
        key = (prefix, tuple(tokens))
        if key in self._known:
            return self._known[key][1]
        self._n_prefixes += 1
        self._known[key] = page, self._n_prefixes
        self._pages[page].key = key
        return self._n_prefixes

    def _forget(self, page: int) -> None:
        # Pages that follow it can no longer be found, since the number of a prefix is never used again; they are
        # given away in their turn.
        key, self._pages[page].key = self._pages[page].key, None
        assert key is not None
        del self._known[key]
