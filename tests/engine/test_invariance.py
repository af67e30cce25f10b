"""The logits of a request, bit by bit: alone, and in any company."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_cases import N_CTX, PAGE, Model, ask, model, prompt_of, record

from mesh_transformer.compat import alike_rows
from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.pages import PagePool
from mesh_transformer.engine.request import Request
from mesh_transformer.engine.sequence import Sequence as Text

LARGEST = 40
# Around the places where chunks and pages begin and end.
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 80, 81, 127, 128, 129, N_CTX)
Logits = list[np.ndarray]


@functools.cache
def alone(one: Model, max_batch: int, request: Request) -> tuple[list[int], Logits]:
    """Tokens of a request, and the logits of each, where nothing was before it and nothing is beside it."""
    engine = one.engine(max_batch)  # of the same size as its company's, so that its programs are compiled already
    seen = record(engine)
    text = engine.submit(request)
    while engine.busy:
        engine.step()
    return text.tokens[text.n_prompt :], seen[text]


def assert_as_alone(one: Model, engine: Engine, text: Text, seen: dict[Text, Logits]) -> int:
    """What was computed of a text, though it may have been cancelled, is as if it were alone; tokens compared."""
    tokens, logits = alone(one, engine.max_batch, text.request)
    found = seen.get(text, [])
    for i, (a, b) in enumerate(zip(found, logits, strict=False)):
        assert np.array_equal(a, b), f"token {i} after {text.n_prompt}: logits differ by {np.abs(a - b).max()}"
    assert text.tokens[text.n_prompt :] == tokens[: text.n_new]
    return len(found)


def grow_and_shrink(one: Model, request: Request) -> tuple[set[int], set[int]]:
    """A text with a prompt of one chunk among up to 39 others that come and go one by one.

    Returns how many wrote at a time, and the rows that it was in.
    """
    engine = one.engine(LARGEST)
    seen = record(engine)
    sizes, rows = set[int](), set[int]()
    # One leaves at every step from the 62nd on, first one that came before the text, which moves it to another row,
    # then one that came after it, and so on; at last it is alone again.
    lengths = [62 + i if i < 20 else 22 + i for i in range(LARGEST - 1)]
    others = [ask(prompt_of(3 + i, i), n, seed=i, temperature=1.0) for i, n in enumerate(lengths)]
    text = [engine.submit(each) for each in [*others[:20], request, *others[20:]]][20]
    while not text.done:
        engine.step()
        writers = [each for each in engine.running if not each.reading]
        if text in writers:
            sizes.add(len(writers))
            rows.add(writers.index(text))
    assert assert_as_alone(one, engine, text, seen) == request.options.max_tokens
    return sizes, rows


def test_alone_and_among_any_number() -> None:
    sizes, rows = grow_and_shrink(model(), ask(prompt_of(60), 150, temperature=1.0, seed=5))
    assert sizes >= set(range(1, LARGEST + 1)) and rows >= set(range(21))


# Shapes of small real models: XLA chooses its kernels by shape.
@pytest.mark.long
@pytest.mark.parametrize("sizes", [{"d_model": 768, "n_heads": 12, "d_rotary": 64, "n_vocab": 5000}])
def test_alone_and_among_any_number_with_real_widths(sizes: dict[str, int]) -> None:
    found, rows = grow_and_shrink(model(n_layers=1, **sizes), ask(prompt_of(20), 150, temperature=1.0, seed=5))
    assert found >= set(range(1, LARGEST + 1)) and rows >= set(range(21))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"d_model": 128, "n_heads": 2, "n_vocab": 50400},
        {"d_model": 512, "n_heads": 8, "n_vocab": 1000},
        {"d_model": 1024, "n_heads": 16, "d_rotary": 64, "n_vocab": 2048},
        {"d_model": 2048, "n_heads": 8, "d_rotary": 64, "n_vocab": 512},
    ],
)
def test_alone_and_among_any_number_with_more_widths(sizes: dict[str, int], dtype: str) -> None:
    one = model(dtype=dtype, n_layers=1, **sizes)
    found, rows = grow_and_shrink(one, ask(prompt_of(20), 150, temperature=1.0, seed=5))
    assert found >= set(range(1, LARGEST + 1)) and rows >= set(range(21))


# ----------------------------------------------------------------------------------------------- any company


def random_company(one: Model, seed: int, max_batch: int, n_requests: int = 20) -> tuple[int, int]:
    """Texts of many lengths with common beginnings, which come, slide and are cancelled at random.

    Returns tokens compared, and tokens of prompts that were not computed but taken over.
    """
    random = np.random.default_rng(seed)
    engine = one.engine(max_batch)
    seen = record(engine)
    common = prompt_of(N_CTX, seed)
    texts, compared = list[Text](), 0
    while len(texts) < n_requests or engine.busy:
        if len(texts) < n_requests and random.random() < 0.3:
            n = int(random.choice(LENGTHS))
            shared = n if random.random() < 0.3 else int(random.integers(0, n + 1))
            prompt = common[:shared] + prompt_of(n - shared, int(random.integers(50)))
            length = int(random.choice([1, 5, 30, 110]))
            texts.append(engine.submit(ask(prompt, length, seed=int(random.integers(3)), temperature=1.0)))
        engine.step()
        if random.random() < 0.02 and engine.running:
            engine.cancel(engine.running[random.integers(len(engine.running))])
    for text in texts:
        compared += assert_as_alone(one, engine, text, seen)
    return compared, engine.counts.cached_tokens


def common_beginnings(one: Model) -> list[int]:
    """Prompts with pages in common, and with equal pages after unequal ones; tokens taken over by each."""
    engine = one.engine(LARGEST)
    seen = record(engine)
    base = prompt_of(N_CTX)
    prompts = [base, base, base[:129], base[:128], base[:100], (7, *base[1:150]), (*base[:70], 7, *base[71:])]
    texts = [engine.submit(ask(prompt, 4)) for prompt in prompts]
    while engine.busy:
        engine.step()
    assert sum(assert_as_alone(one, engine, text, seen) for text in texts) == 4 * len(prompts)
    return [text.n_cached for text in texts]


def test_with_a_common_beginning() -> None:
    assert common_beginnings(model()) == [0, 128, 128, 64, 64, 0, 64]


@pytest.mark.parametrize("seed", range(3))
def test_random_company(seed: int) -> None:
    compared, cached = random_company(model(), seed, LARGEST)
    assert compared > 100 and cached >= PAGE


KINDS = {
    "t5": {"position": "t5"},
    "fixed": {"position": "fixed"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantized": True},
    "float16": {"dtype": "float16"},
    "v2": {"architecture": "v2", "n_shards": 2},
}


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.long) for k in ("t5", "fixed")), "bfloat16", "int8"]
)
def test_random_company_of_every_kind(kind: str) -> None:
    one = model(n_layers=1, **KINDS[kind])
    compared, cached = random_company(one, 4, 8)
    assert compared > 100 and cached >= PAGE


@pytest.mark.long
@pytest.mark.parametrize("kind", ["rotary", *KINDS])
def test_much_random_company(kind: str) -> None:
    for seed in range(100, 140):
        random_company(model(n_layers=1, **KINDS.get(kind, {})), seed, 8)


# ----------------------------------------------------------------------------------------------- it would be seen


def share_whatever_stands_there(patch: pytest.MonkeyPatch) -> None:
    """A page is found by its own tokens, whatever stood before them."""
    publish, find = PagePool.publish, PagePool.find
    patch.setattr(PagePool, "publish", lambda self, page, beginning, tokens: publish(self, page, 0, tokens))
    patch.setattr(PagePool, "find", lambda self, beginning, tokens: find(self, 0, tokens))


def give_away_what_is_used(patch: pytest.MonkeyPatch) -> None:
    """A page that was found belongs to one text only."""
    find = PagePool.find

    def forget_a_user(self: PagePool, beginning: int, tokens: Any) -> Any:
        found = find(self, beginning, tokens)
        if found is not None:
            self._pages[found[0]].users = 1
        return found

    patch.setattr(PagePool, "find", forget_a_user)
    patch.setattr(PagePool, "release", _release_if_used)


def _release_if_used(self: PagePool, page: int) -> None:
    held = self._pages[page]
    if held.users:
        held.users = 0
        self._free.append(page)
        if held.key is not None:
            del self._known[held.key]
            held.key = None


@pytest.mark.parametrize("mistake", [share_whatever_stands_there, give_away_what_is_used])
def test_a_mistake_would_be_seen(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match="differ"):
        common_beginnings(model())
        random_company(model(), 0, LARGEST)


@pytest.mark.long
@pytest.mark.parametrize(("fewest", "exactly"), [(1, 0), (2, 0)])
def test_rows_rounded_by_their_number_would_be_seen(fewest: int, exactly: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured with jaxlib 0.10.2 on x86; another one may round alike by itself."""
    how = lambda dtype: (alike_rows(dtype)[0], fewest, exactly)  # noqa: E731
    monkeypatch.setattr("mesh_transformer.engine.programs.alike_rows", how)
    model.cache_clear()
    with pytest.raises(AssertionError, match="logits differ"):
        grow_and_shrink(model(), ask(prompt_of(60), 150, temperature=1.0, seed=5))
    model.cache_clear()
