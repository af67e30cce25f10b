"""Who reads and writes when, on fake programs that know every text by heart."""

from __future__ import annotations

import numpy as np
import pytest
from engine_cases import Heard, ask, complete, finish, prompt_of
from fake_programs import assert_idle, config, expected, fake_engine

from mesh_transformer.config.errors import UserError
from mesh_transformer.config.run import MeshConfig
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.sequence import Sequence as Text
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, inference_layout

PAGE = 64


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    engine, programs = fake_engine(cfg=config(n_ctx=1024))
    running = [engine.submit(ask(prompt_of(n), 40)) for n in (5, 9)]
    for _ in running:
        engine.step()
    long = engine.submit(ask(prompt_of(1000), 3))
    for _ in range(15):
        said = engine.step()
        assert [text for text, _ in said] == running and all(output.tokens for _, output in said)
    assert [n for _, n in programs.chunks[2:]] == [PAGE] * 15 and long.n_new == 0
    assert {text for text, _ in engine.step()} == {*running, long}


def test_together_nothing_is_written_before_all_is_read() -> None:
    """Then all write at every step, until one of those that wait takes the place of one that has ended."""
    engine, programs = fake_engine(max_batch=3, together=True)
    order: list[str] = []
    programs.before = order.append
    requests = [ask(prompt_of(n), 5, sample=i) for i, n in enumerate([150, 3, 70, 2])]
    for request, found in zip(requests, complete(engine, *requests), strict=True):
        assert found.tokens == expected(request.prompt, 5, engine.programs.cfg)
    # Six chunks, the four tokens that follow the first, then the fourth text.
    assert [name for name in order if name in ("prefill", "decode")] == ["prefill"] * 6 + ["decode"] * 4 + [
        "prefill"
    ] + ["decode"] * 4
    assert programs.batches == [3] * 4 + [1] * 4 and engine.n_rows(1) == engine.n_rows(3)
    assert_idle(engine)


def test_first_come_first_served() -> None:
    engine, _ = fake_engine(max_batch=2)
    lengths = [150, 3, 70, 1, 1, 140, 2]
    texts = [engine.submit(ask(prompt_of(n), 4, sample=i)) for i, n in enumerate(lengths)]
    began, ended = list[Text](), list[Text]()
    while engine.busy:
        for text, output in engine.step():
            if text not in began:
                began.append(text)
            if output.last:
                ended.append(text)
        assert len(engine.running) <= 2
    assert began == texts
    assert len(ended) == len(texts) and set(ended) == set(texts)


def test_a_text_that_leaves_makes_room_at_the_next_step() -> None:
    engine, programs = fake_engine(max_batch=3)
    complete(engine, *[ask(prompt_of(2, i), 6) for i in range(9)])
    # One prompt is read at each step, so that three join one after another; from then on all places are taken.
    assert programs.batches[2:-2] and min(programs.batches[2:-2]) >= 2
    assert engine.counts.generated_tokens == 9 * 6 and engine.counts.prompt_tokens == 9 * 2


def test_groups_of_a_mesh_are_filled_evenly() -> None:
    """And each reads a chunk of its own at every step."""
    engine, programs = fake_engine(max_batch=4, cfg=config(), layout=inference_layout(MeshConfig(data=2), config()))
    texts = [engine.submit(ask(prompt_of(150, i), 9)) for i in range(4)]
    engine.step()
    assert sorted(text.group for text in texts) == [0, 0, 1, 1]
    assert programs.chunks == [(0, 64), (0, 64)]
    assert [found.tokens for found in finish(engine, texts)] == [
        expected(prompt_of(150, i), 9, config()) for i in range(4)
    ]
    assert_idle(engine)


def _random_history(seed: int) -> None:
    """A random engine, random requests with common beginnings, random arrivals and cancellations."""
    random = np.random.default_rng(seed)
    cfg = config(int(random.choice([16, 100, 160, 256])), str(random.choice(["rotary", "fixed", "t5"])))
    slide = bool(random.random() < 0.7)
    layout = inference_layout(MeshConfig(data=2), cfg) if seed % 4 == 0 else ONE_DEVICE_LAYOUT
    probe, _ = fake_engine(1, cfg)
    n_pages = probe.width + int(random.integers(0, 2 * probe.width))
    how = {"n_pages": n_pages, "slide": slide, "layout": layout, "together": bool(random.random() < 0.2)}
    engine, _ = fake_engine(int(random.integers(1, 7)), cfg, **how)
    page, beginnings = engine.page_size, [prompt_of(cfg.n_ctx, i) for i in range(3)]
    heard: dict[Text, Heard] = {}
    left = int(random.integers(4, 16))
    while left or engine.busy:
        if left and random.random() < 0.3:
            left -= 1
            n = int(np.clip(random.choice([1, page - 1, page, page + 1, 2 * page, cfg.n_ctx]), 1, cfg.n_ctx))
            common = int(random.integers(0, n + 1))
            prompt = (beginnings[random.integers(3)][:common] + prompt_of(n, int(random.integers(100))))[:n]
            scored = {"logprobs": 1, "prompt_logprobs": True} if random.random() < 0.2 else {}
            length = int(random.choice([0, 1, 5, 40, 3 * cfg.n_ctx]))
            heard[engine.submit(ask(prompt, length, **scored))] = Heard()
        for text, output in engine.step():
            heard[text].hear(output)
        if heard and random.random() < 0.1:
            engine.cancel(list(heard)[random.integers(len(heard))])
        for group, pool in enumerate(engine._pools):
            used = {int(p) for text in engine.running if text.group == group for p in text.pages if p}
            assert pool.n_in_use == len(used) <= engine._promised[group] <= pool.capacity
    assert_idle(engine)
    for text, said in heard.items():
        _check(text, said, engine)


def _check(text: Text, said: Heard, engine: Engine) -> None:
    """What was said of a text is what follows from its prompt, up to where it ended or was cancelled."""
    cfg, wanted = engine.programs.cfg, text.options.max_tokens
    most = wanted if engine.slide else min(wanted, max(1, cfg.n_ctx - text.n_prompt))
    assert said.tokens == text.tokens[text.n_prompt :] == expected(text.request.prompt, len(said.tokens), cfg)
    if said.finish_reason is None:
        assert text.done, "not finished, so it was cancelled"
        return
    assert (len(said.tokens), said.finish_reason) == (most, "length")
    if text.request.prompt_logprobs:
        assert said.prompt_logprobs is not None
        assert tuple(each.token for each in said.prompt_logprobs) == text.request.prompt


@pytest.mark.parametrize("seed", range(24))
def test_slots_and_pages_come_back_after_any_history(seed: int) -> None:
    _random_history(seed)


@pytest.mark.long
def test_slots_and_pages_come_back_after_many_histories() -> None:
    for seed in range(1000, 3000):
        _random_history(seed)


def test_too_small_a_pool_makes_requests_wait() -> None:
    engine, _ = fake_engine(max_batch=4, n_pages=5)  # a text may need four, or one
    texts = [engine.submit(ask(prompt_of(n), 70, sample=i)) for i, n in enumerate([100, 100, 3, 3])]
    most = 0
    heard = {text: Heard() for text in texts}
    while engine.busy:
        for text, output in engine.step():
            heard[text].hear(output)
        most = max(most, len(engine.running))
    assert most == 2 and all(len(h.tokens) == 70 and h.finish_reason == "length" for h in heard.values())
    assert_idle(engine)


@pytest.mark.parametrize("slide", [True, False])
def test_a_text_that_fills_the_context(slide: bool) -> None:
    cfg = config(n_ctx=160)
    engine, _ = fake_engine(max_batch=4, cfg=cfg, slide=slide)
    lengths = (1, 150, 159, 160)
    for n, found in zip(lengths, complete(engine, *[ask(prompt_of(n), 500) for n in lengths]), strict=True):
        # Even after a prompt that fills the context one token can be said.
        assert len(found.tokens) == (500 if slide else max(1, 160 - n))
        assert found.finish_reason == "length"
        assert found.tokens == expected(prompt_of(n), len(found.tokens), cfg)


def test_fixed_positions_begin_again_with_the_newest_half() -> None:
    cfg = config(n_ctx=160, position="fixed")
    engine, programs = fake_engine(cfg=cfg)
    (found,) = complete(engine, ask(prompt_of(150), 200))
    assert found.tokens == expected(prompt_of(150), 200, cfg)
    # 150 are read in three chunks; at 160 the newest 80 are read again, and once more 80 tokens later each time.
    assert programs.chunks == [(0, 64), (64, 64), (128, 22)] + [(0, 64), (64, 16)] * 3
    assert_idle(engine)


def test_others_go_on_while_a_text_begins_again() -> None:
    engine, _ = fake_engine(cfg=config(n_ctx=160, position="fixed"))
    first, other = engine.submit(ask(prompt_of(158), 20)), engine.submit(ask(prompt_of(3), 60))
    gaps, since = list[int](), 0
    while not other.done:
        said = {text for text, _ in engine.step()}
        since = 0 if other in said else since + 1
        gaps.append(since if other.n_new else 0)
    assert first.start > 0 and max(gaps) == 0


@pytest.mark.parametrize("state", ["waiting", "admitted", "between chunks", "read", "writing", "done"])
def test_cancelled_in_every_state(state: str) -> None:
    engine, programs = fake_engine(max_batch=1)
    text = engine.submit(ask(prompt_of(150), 5))
    waiting = engine.submit(ask(prompt_of(2), 3))
    victim, other = (waiting, text) if state == "waiting" else (text, waiting)
    for _ in range({"waiting": 1, "admitted": 0, "between chunks": 1, "read": 3, "writing": 5, "done": 7}[state]):
        engine.step()
    assert victim.done == (state == "done")
    engine.cancel(victim)
    engine.cancel(victim)
    assert victim.done
    n_chunks, heard = len(programs.chunks), finish(engine, [other])
    assert heard[0].tokens[-1:] == expected(other.request.prompt, other.options.max_tokens, engine.programs.cfg)[-1:]
    if state == "between chunks":
        assert programs.chunks[n_chunks:] == [(0, 2)], "nothing more of the cancelled prompt is read"
    assert_idle(engine)


def test_an_engine_that_is_reset_serves_what_waits() -> None:
    engine, _ = fake_engine(max_batch=1)
    engine.submit(ask(prompt_of(100), 5))
    waiting = engine.submit(ask(prompt_of(100), 5))
    for _ in range(3):
        engine.step()
    engine.reset()
    (found,) = finish(engine, [waiting])
    assert found.tokens == expected(prompt_of(100), 5, engine.programs.cfg)
    assert found.n_cached == 0, "what the cache held is forgotten"
    assert_idle(engine)


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda: ask(()), "the prompt is empty and this model has no end-of-text token"),
        (lambda: ask(prompt_of(161)), "has 161 tokens but the model's context holds 160; shorten it by 1"),
        (lambda: ask((1, 258)), "token id 258 is outside the model's vocabulary of 258 ids"),
        (lambda: ask((-1,)), "token id -1 is outside"),
        (lambda: ask((1,), logit_bias=((3, 1.0), (300, 1.0))), "token id 300 is outside"),
        (lambda: ask((1,), stop=("x",)), "this model has no tokenizer"),
        (lambda: ask((1,) * 60, 2501), "2501 after a prompt of 60 .* 2560 tokens .* at most 2500"),
        (lambda: ask((1,), logprobs=21), "logprobs = 21 is out of range: at least 0 and at most 20"),
        (lambda: ask((1,), logprobs=-1), "logprobs = -1 is out of range"),
        (lambda: ask((1,), prompt_logprobs=True), "prompt_logprobs needs logprobs"),
        (lambda: ask((1,) * 100, 93), "needs 4 pages of the cache, which has 3; ask for less"),
    ],
)
def test_what_can_never_be_served_is_refused(request_of: object, message: str) -> None:
    assert callable(request_of)
    engine, _ = fake_engine(n_pages=3)
    request = request_of()
    for refuse in (engine.check, engine.submit):
        with pytest.raises(UserError, match=message):
            refuse(request)
    assert not engine.waiting
    engine.check(ask((1,) * 100, 92))  # three pages


def test_an_empty_prompt_is_the_end_of_text() -> None:
    engine, _ = fake_engine(tokenizer=load_tokenizer("bytes"))
    assert engine.check(ask(())) == [256]
    (found,) = complete(engine, ask((), 4))
    assert found.tokens == expected([256], 4, engine.programs.cfg)
