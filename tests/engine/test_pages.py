"""Pages of the cache: the pool against a naive one, and prompts that begin the same."""

from __future__ import annotations

import numpy as np
import pytest
from engine_cases import ask, complete, prompt_of
from fake_programs import assert_idle, config, expected, fake_engine

from mesh_transformer.engine.pages import EMPTY_PREFIX, SCRATCH, PagePool, chunk_width, page_size, table_width
from mesh_transformer.engine.request import Request

PAGE = 64


class NaivePool:
    """Who uses each page, what it was last published as, and when it was left; nothing is looked up quickly."""

    def __init__(self, n_pages: int) -> None:
        self.users = dict.fromkeys(range(1, n_pages), 0)
        self.holds: dict[int, tuple[tuple[int, ...], ...]] = {}  # chunks from the beginning of the text on
        self.left: list[int] = []  # published pages without users, those left first at the beginning

    @property
    def n_in_use(self) -> int:
        return sum(n > 0 for n in self.users.values())

    def may_give(self) -> set[int]:
        """Pages that `take` may return: a free one if there is one, otherwise the one that was left first."""
        free = {page for page, n in self.users.items() if n == 0 and page not in self.holds}
        return free or set(self.left[:1])

    def take(self, page: int) -> None:
        self.users[page] = 1
        self.holds.pop(page, None)
        self.left = [p for p in self.left if p != page]

    def find(self, chunks: tuple[tuple[int, ...], ...]) -> int | None:
        """The page with these chunks, if every page before it can be found too."""
        for n in range(1, len(chunks) + 1):
            found = [page for page, held in self.holds.items() if held == chunks[:n]]
            if not found:
                return None
        return found[0]

    def use(self, page: int) -> None:
        self.users[page] += 1
        self.left = [p for p in self.left if p != page]

    def release(self, page: int) -> None:
        self.users[page] -= 1
        if not self.users[page] and page in self.holds:
            self.left.append(page)


@pytest.mark.parametrize("seed", range(30))
def test_the_pool_does_what_a_naive_one_does(seed: int) -> None:
    """Texts over two chunks, so that beginnings meet all the time, in a pool that is full half of the time."""
    random = np.random.default_rng(seed)
    n_pages = int(random.integers(3, 9))
    pool, naive = PagePool(n_pages), NaivePool(n_pages)
    texts: list[tuple[list[int], list[tuple[int, ...]], int]] = []  # pages, chunks, number of the beginning
    for _ in range(400):
        if random.random() < 0.25 and texts:
            for page in texts.pop(random.integers(len(texts)))[0]:
                pool.release(page)
                naive.release(page)
        else:
            text = texts.pop(random.integers(len(texts))) if texts and random.random() < 0.6 else ([], [], EMPTY_PREFIX)
            texts.append(_read_on(pool, naive, text, (int(random.integers(2)),)))
        assert pool.n_in_use == naive.n_in_use
        assert pool.capacity == n_pages - 1
    for pages, _, _ in texts:
        for page in pages:
            pool.release(page)
    assert pool.n_in_use == 0


def _read_on(
    pool: PagePool, naive: NaivePool, text: tuple[list[int], list[tuple[int, ...]], int], chunk: tuple[int, ...]
) -> tuple[list[int], list[tuple[int, ...]], int]:
    """A text with one chunk more, found or read, if there is a page for it."""
    pages, chunks, beginning = text
    longer, known = [*chunks, chunk], pool.find(beginning, chunk)
    # A text goes on from pages of its own, which may have been read a second time: these were never published.
    reachable = naive.find(tuple(longer)) if all(page in naive.holds for page in pages) else None
    if known is not None:
        page, after = known
        assert naive.holds[page] == tuple(longer)
        naive.use(page)
        return [*pages, page], longer, after
    assert reachable is None
    if naive.n_in_use == pool.capacity:
        return text
    allowed, page = naive.may_give(), pool.take()
    assert page in allowed and page != SCRATCH
    naive.take(page)
    naive.holds[page] = tuple(longer)
    return [*pages, page], longer, pool.publish(page, beginning, chunk)


def test_a_page_released_too_often_is_noticed() -> None:
    pool = PagePool(3)
    page = pool.take()
    pool.release(page)
    with pytest.raises(AssertionError, match="once too often"):
        pool.release(page)


@pytest.mark.parametrize("n_ctx", [1, 15, 16, 17, 63, 64, 65, 100, 128, 2048])
def test_sizes(n_ctx: int) -> None:
    """A ring holds the context although a whole page is forgotten at a time; chunks have one of two widths."""
    size, width = page_size(n_ctx), table_width(n_ctx)
    assert size in (16, 32, 64) and size * (width - 1) >= n_ctx
    assert {chunk_width(n, n_ctx) for n in range(1, size + 1)} == {16, size}
    assert all(chunk_width(n, n_ctx) >= n for n in range(1, size + 1))


# ---------------------------------------------------------------------------------------------- prompts that meet


def _sharing(*requests: Request, before: int = 0, **options: object) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens taken over by each request, which come one after another, and the chunks that were read after `before`."""
    engine, programs = fake_engine(**options)  # type: ignore[arg-type]
    cached, n_chunks = [], 0
    for i, request in enumerate(requests):
        if i == before:
            n_chunks = len(programs.chunks)
        (found,) = complete(engine, request)
        n, prompt = len(found.tokens), request.prompt
        assert found.tokens == expected(prompt, n, engine.programs.cfg)
        cached.append(found.n_cached)
    assert engine.counts.cached_tokens == sum(cached)
    assert_idle(engine)
    return cached, programs.chunks[n_chunks:]


def test_a_beginning_is_read_once() -> None:
    base = prompt_of(160)
    requests = [base, base, base[:130], (*base[:100], 1, 2, 3), (*base[:64], *prompt_of(64, 1)), (1, *base[1:])]
    cached, chunks = _sharing(*[ask(p, 3) for p in requests])
    assert cached == [0, 128, 128, 64, 64, 0]
    whole = [(0, 64), (64, 64), (128, 32)]
    assert chunks == [*whole, (128, 32), (128, 2), (64, 39), (64, 64), *whole]


@pytest.mark.parametrize(("length", "cached"), [(63, 0), (64, 0), (65, 64), (127, 64), (128, 64), (129, 128)])
def test_the_last_token_is_read_again(length: int, cached: int) -> None:
    """It gives the first logits."""
    request = ask(prompt_of(length), 2)
    found, chunks = _sharing(request, request, before=1)
    assert found == [0, cached]
    assert chunks == [(cached, length - cached)]


def test_the_same_prompt_many_times_at_once_is_read_once() -> None:
    engine, programs = fake_engine(max_batch=6)
    found = complete(engine, *[ask(prompt_of(150), 5, sample=i) for i in range(6)])
    assert [each.n_cached for each in found] == [0] + [128] * 5
    assert programs.chunks == [(0, 64), (64, 64), (128, 22)] + [(128, 22)] * 5
    assert_idle(engine)


def test_written_tokens_are_not_shared_but_a_prompt_that_slid_away_is() -> None:
    prompt = prompt_of(130)
    (first, *_), _ = _sharing(ask(prompt, 300))
    text = (*prompt, *expected(prompt, 300, config()))
    cached, _ = _sharing(ask(prompt, 300), ask(text[:150], 2), ask(text[:128] + (9,), 2))
    assert (first, cached) == (0, [0, 128, 128])


def test_what_the_likelihood_is_wanted_of_is_read_again() -> None:
    prompt = prompt_of(150)
    cached, _ = _sharing(ask(prompt, 1), ask(prompt, 1, logprobs=0, prompt_logprobs=True), ask(prompt, 1, logprobs=2))
    assert cached == [0, 0, 128]


def test_the_beginning_that_was_left_first_is_forgotten_first() -> None:
    """Two pages each are kept of A and B, and there is a fifth."""
    a, b, other, another = prompt_of(130, 1), prompt_of(130, 2), prompt_of(64, 3), prompt_of(64, 4)

    def taken_over(*prompts: tuple[int, ...]) -> list[int]:
        return _sharing(*[ask(p, 1) for p in prompts], n_pages=5)[0]

    assert taken_over(a, b, a, b) == [0, 0, 128, 128]
    assert taken_over(a, b, other, a) == [0, 0, 0, 128], "the fifth page was free"
    assert taken_over(a, b, other, another, a) == [0, 0, 0, 0, 64], "of A, left first, the last page went first"
    assert taken_over(a, b, other, another, b) == [0, 0, 0, 0, 128]
    assert taken_over(a, b, a, other, another, b) == [0, 0, 128, 0, 0, 64], "A was used again: B was left first"
    assert taken_over(a, b, a, other, another, a) == [0, 0, 128, 0, 0, 128]


def test_a_page_in_use_is_never_given_away() -> None:
    """While A writes, others fill the pool again and again; what A sees is checked at every token."""
    engine, _ = fake_engine(max_batch=2, n_pages=6)
    keeper = engine.submit(ask(prompt_of(130), 60))
    for i in range(12):
        engine.submit(ask(prompt_of(150, 1 + i % 5), 2))
    while engine.busy:
        engine.step()
    assert keeper.tokens[130:] == expected(prompt_of(130), 60, engine.programs.cfg)
    assert_idle(engine)
