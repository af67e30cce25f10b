"""Several tokens at a time: the same completions as one by one, whatever ends a text or shapes its choices."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from engine_cases import END, Heard, ask, complete, model, prompt_of

from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.engine.engine import Engine

AHEAD = 8


@functools.cache
def engine(ahead: int, position: str = "rotary") -> Engine:
    return model(position).engine(max_batch=4, tokenizer=load_tokenizer("bytes"), together=True, ahead=ahead)


def both(*requests: Any, position: str = "rotary") -> tuple[list[Heard], list[Heard]]:
    return complete(engine(1, position), *requests), complete(engine(AHEAD, position), *requests)


def same(found: Heard, expected: Heard) -> None:
    assert (found.tokens, found.text, found.finish_reason) == (expected.tokens, expected.text, expected.finish_reason)
    assert [p.token for p in found.logprobs] == [p.token for p in expected.logprobs]
    for a, b in zip(found.logprobs, expected.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "seed": 1},
        {"frequency_penalty": 0.7, "presence_penalty": 0.3},
        {"logprobs": 3},
    ],
    ids=["greedy", "drawn", "filtered", "penalties", "logprobs"],
)
def test_equal_to_one_at_a_time(options: dict[str, Any]) -> None:
    lengths, tokens = (5, 40, 3), (29, 8, 50)
    requests = [ask(prompt_of(n), m, **options) for n, m in zip(lengths, tokens, strict=True)]
    for one, several in zip(*both(*requests), strict=True):
        same(several, one)


def test_end_of_text_ends_a_text_between_two_looks() -> None:
    """And is held off for as many tokens as were asked for, no more."""
    likely = {"ignore_eos": False, "logit_bias": ((END, 100.0),)}
    requests = [ask(prompt_of(4), 40, **likely, min_tokens=n) for n in (0, 3, 11)]
    one, several = both(*requests)
    for expected, found, n in zip(one, several, (0, 3, 11), strict=True):
        same(found, expected)
        assert found.finish_reason == "stop" and len(found.tokens) == n


def test_stop_strings() -> None:
    (whole,), _ = both(ask(prompt_of(7), 40))
    stop = whole.text[13:16]
    (one,), (several,) = both(ask(prompt_of(7), 40, stop=(stop,)))
    same(several, one)
    assert several.finish_reason == "stop" and stop not in several.text


@pytest.mark.parametrize("position", ["rotary", "fixed", "t5"])
def test_past_the_context(position: str) -> None:
    """Where pages are given up, or a text begins again, tokens come one by one."""
    (one,), (several,) = both(ask(prompt_of(9), 400), position=position)
    same(several, one)
    assert len(several.tokens) == 400


def test_fewer_steps_and_nothing_compiled_again() -> None:
    made = engine(AHEAD)
    before = made.counts.steps
    complete(made, ask(prompt_of(5), 1 + 4 * AHEAD))
    assert made.counts.steps - before == 1 + 4
    compiled = made.programs.n_compiled
    complete(made, ask(prompt_of(6), 1 + 3 * AHEAD))
    assert made.programs.n_compiled == compiled
