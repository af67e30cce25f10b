"""Generation against the plain forward pass, row by row against batches, and its ways to end."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import random_params

from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.companions import Companions
from mesh_transformer.data.tokenizer import Tokenizer, load_tokenizer
from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.generator import Generator
from mesh_transformer.engine.request import Request
from mesh_transformer.model import decoder
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sample.options import Completion, SamplingOptions

POLICY = ComputePolicy(dtype="float32")
END = 256


class OneSize(Generator):
    """Its engines all have the same size, so that each program is compiled once; `test_engines_are_large_enough`."""

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        return Engine(self.programs, self.params, self.tokenizer, max_batch=4, n_positions=64, n_pages=8, together=True)


@functools.cache
def generator(position: str = "rotary") -> Generator:
    cfg = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_vocab=260, n_ctx=16, position=position, d_rotary=4)
    return OneSize(cfg, random_params(cfg), POLICY, load_tokenizer("bytes"))


@functools.cache
def predictor(position: str = "rotary", width: int = 64) -> jax.stages.Wrapped:
    """Logits of every position of [1, width] tokens: the forward pass alone, without cache."""
    one = generator(position)
    return jax.jit(lambda tokens: decoder.forward(one.params, tokens, one.cfg, POLICY)[0])


def naive(prompt: Sequence[int], n: int, position: str = "rotary") -> list[int]:
    """Greedy decoding by one whole forward pass for every token; attention reaches n_ctx tokens back."""
    text, start = list(prompt), 0
    for _ in range(n):
        if position == "fixed" and len(text) - start > 16:
            start = len(text) - 8  # absolute positions cannot slide: half of the context is read anew
        window = text[start:]
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(window)] = window
        text.append(int(np.argmax(predictor(position)(jnp.asarray(padded))[len(window) - 1])))
    return text[len(prompt) :]


def complete(prompts: Sequence[Sequence[int]], position: str = "rotary", **options: object) -> list[Completion]:
    each = [SamplingOptions(**{"ignore_eos": True, **options}) for _ in prompts]
    return generator(position).generate(prompts, each)


def prompt_of(length: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(length).integers(0, 256, length)]


@pytest.mark.parametrize("position", ["rotary", "t5", "fixed"])
def test_greedy_is_the_forward_pass_repeated_far_past_the_context(position: str) -> None:
    """48 tokens with a context of 16: the ring of keys turns over twice."""
    found = complete([prompt_of(5)], position, max_tokens=43, temperature=0.0)[0]
    expected = naive(prompt_of(5), 43, position)
    assert found.tokens == expected
    assert len(set(expected)) > 5, "a constant text would prove nothing"


@pytest.mark.parametrize("position", ["rotary", "t5", "fixed"])
def test_a_prompt_that_fills_the_context(position: str) -> None:
    found = complete([prompt_of(16)], position, max_tokens=10, temperature=0.0)[0]
    assert found.tokens == naive(prompt_of(16), 10, position)


@pytest.mark.parametrize("position", ["rotary", "t5", "fixed"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_unequal_prompts_in_a_batch_are_as_each_alone(position: str, temperature: float) -> None:
    prompts = [prompt_of(n) for n in (1, 16, 3, 11)]
    # Rows of different lengths in tokens too: some are done while others go on, past the context.
    ask = functools.partial(SamplingOptions, temperature=temperature, ignore_eos=True)
    options = [ask(max_tokens=n, seed=n) for n in (25, 14, 30, 20)]
    together = generator(position).generate(prompts, options)
    alone = [generator(position).generate([p], [o])[0] for p, o in zip(prompts, options, strict=True)]
    assert together == alone
    assert [len(c.tokens) for c in together] == [25, 14, 30, 20]


def test_samples_of_rows_with_different_options_are_as_each_alone() -> None:
    prompts = [prompt_of(n) for n in (4, 9, 6, 2)]
    options = [
        SamplingOptions(max_tokens=12, seed=9, ignore_eos=True),
        SamplingOptions(max_tokens=10, temperature=0.0, ignore_eos=True),
        SamplingOptions(max_tokens=10, temperature=1.2, top_k=5, seed=3, ignore_eos=True),
        SamplingOptions(max_tokens=10, temperature=0.9, top_p=0.5, min_p=0.1, seed=4, ignore_eos=True),
    ]
    together = generator().generate(prompts, options)
    assert together == [generator().generate([p], [o])[0] for p, o in zip(prompts, options, strict=True)]
    assert together[1].tokens == naive(prompts[1], 10)


def test_seed_and_sample_make_the_text() -> None:
    texts = {
        (seed, sample): tuple(complete([prompt_of(3)], max_tokens=8, seed=seed, sample=sample)[0].tokens)
        for seed, sample in itertools.product((0, 1, 2**32 - 1), (0, 1))
    }
    again = {
        pair: tuple(complete([prompt_of(3)], max_tokens=8, seed=pair[0], sample=pair[1])[0].tokens) for pair in texts
    }
    assert texts == again
    assert len(set(texts.values())) == len(texts), "each seed and each sample is a stream of its own"


def test_first_tokens_follow_the_distribution() -> None:
    n, prompt = 512, prompt_of(6)
    padded = np.zeros((1, 64), np.int32)
    padded[0, :6] = prompt
    expected = np.asarray(jax.nn.softmax(predictor()(jnp.asarray(padded))[5]))
    options = [SamplingOptions(max_tokens=1, sample=i, ignore_eos=True) for i in range(n)]
    batches = (generator().generate([prompt] * 4, options[i : i + 4]) for i in range(0, n, 4))
    counts = Counter(c.tokens[0] for batch in batches for c in batch)
    for token in np.argsort(-expected)[:5]:
        p = float(expected[token])
        assert abs(counts[int(token)] / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_end_of_text_ends_unless_ignored_or_held_off() -> None:
    leaning = copy.copy(generator())
    head = leaning.params["head"]
    leaning.params = leaning.params | {"head": head | {"b": head["b"].at[END].set(100.0)}}  # end-of-text everywhere
    ask = functools.partial(SamplingOptions, max_tokens=6)
    for temperature in (0.0, 1.0):
        stopped, ignored, held, ended = leaning.generate(
            [[1, 2, 3]] * 4,
            [
                ask(temperature=temperature),
                ask(temperature=temperature, ignore_eos=True),
                ask(temperature=temperature, min_tokens=4),
                ask(temperature=temperature, min_tokens=9),
            ],
        )
        assert (stopped.tokens, stopped.text, stopped.finish_reason) == ([], "", "stop")
        assert (ignored.tokens, ignored.finish_reason) == ([END] * 6, "length")
        assert ignored.text == "<|endoftext|>" * 6
        assert len(ended.tokens) == 6 and END not in ended.tokens and ended.finish_reason == "length"
        assert len(held.tokens) == 4 and END not in held.tokens and held.finish_reason == "stop"


def test_every_id_that_ends_a_text_does() -> None:
    """A chat model names several, and end-of-text need not be among them."""
    leaning = copy.copy(generator())
    head, several = leaning.params["head"], Companions(ends=(7, 300, 65))
    leaning.params = leaning.params | {"head": head | {"b": head["b"].at[65].set(100.0).at[7].set(90.0)}}
    assert leaning.tokenizer is not None
    leaning.tokenizer = dataclasses.replace(leaning.tokenizer, companions=several)
    assert leaning.tokenizer.ends == (7, 65)  # it has no 300
    options = [SamplingOptions(max_tokens=6, temperature=0.0, min_tokens=n) for n in (0, 4)]
    ignored = SamplingOptions(max_tokens=6, temperature=0.0, ignore_eos=True)
    stopped, held, through, _ = leaning.generate([[1, 2, 3]] * 4, [*options, ignored, ignored])
    assert (stopped.tokens, stopped.text, stopped.finish_reason) == ([], "", "stop")
    assert (through.tokens, through.text, through.finish_reason) == ([65] * 6, "A" * 6, "length")
    assert len(held.tokens) == 4 and not {7, 65} & set(held.tokens) and held.finish_reason == "stop"


def test_stop_strings() -> None:
    whole = complete([prompt_of(4)], max_tokens=20, temperature=0.0)[0]
    assert whole.finish_reason == "length" and len(whole.tokens) == 20
    at = next(
        i for i in range(5, 18) if whole.text[i : i + 2].isascii() and whole.text.find(whole.text[i : i + 2]) == i
    )
    stop = whole.text[at : at + 2]
    cut = complete([prompt_of(4)], max_tokens=20, temperature=0.0, stop=("never", stop))[0]
    assert (cut.text, cut.finish_reason) == (whole.text[:at], "stop")
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and len(cut.tokens) < 20
    # The pieces add up, and none holds a part of the stop string.
    pieces = list(generator().stream([prompt_of(4)], [SamplingOptions(max_tokens=20, temperature=0.0, stop=(stop,))]))
    assert "".join(p.text for p in pieces) == cut.text
    assert [p.completion for p in pieces[:-1]] == [None] * (len(pieces) - 1) and pieces[-1].completion == cut


def test_no_tokens_asked_for() -> None:
    ask = functools.partial(SamplingOptions, temperature=0.0, ignore_eos=True)
    nothing, some, *_ = generator().generate([prompt_of(3)] * 4, [ask(max_tokens=n) for n in (0, 3, 1, 0)])
    assert nothing == Completion("", [], "length")
    assert some.tokens == naive(prompt_of(3), 3)
    assert complete([prompt_of(3)], max_tokens=0) == [Completion("", [], "length")]
    assert generator().generate([], []) == []


def test_an_empty_prompt_begins_at_end_of_text() -> None:
    assert complete([[]], max_tokens=5, temperature=0.0) == complete([[END]], max_tokens=5, temperature=0.0)


def test_wrong_prompts() -> None:
    for prompt, message in [
        (prompt_of(17), r"17 tokens .* holds 16.* shorten it by 1"),
        ([3, 260], "id 260 is outside .* 260 ids"),
        ([-1], "id -1 is outside"),
    ]:
        with pytest.raises(UserError, match=message):
            complete([prompt], max_tokens=1)
    without = copy.copy(generator())
    without.tokenizer = None
    with pytest.raises(UserError, match="empty and this model has no end-of-text"):
        without.generate([[]], [SamplingOptions()])
    with pytest.raises(UserError, match=r"stop strings .* no tokenizer"):
        without.generate([[1]], [SamplingOptions(stop=("x",))])
    ids = without.generate([[1, 2]], [SamplingOptions(max_tokens=4, temperature=0.0)])[0]
    assert (ids.text, ids.tokens) == ("", naive([1, 2], 4))


@pytest.mark.parametrize(
    "option",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 1.01}, {"top_k": -1}, {"min_p": 2.0}, {"seed": -1},
     {"seed": 2**32}, {"max_tokens": -1}, {"min_tokens": -1}, {"stop": ("",)}],
)  # fmt: skip
def test_options_out_of_range(option: dict[str, object]) -> None:
    (name,) = option
    with pytest.raises(UserError, match=name):
        SamplingOptions(**option)


def test_the_legacy_sampler() -> None:
    almost_greedy = complete([prompt_of(4)], max_tokens=6, sampler="legacy", top_k=1, temperature=0.5)[0]
    assert almost_greedy.tokens == naive(prompt_of(4), 6)

    def first_tokens(sampler: str) -> set[int]:
        options = [
            SamplingOptions(max_tokens=1, top_p=0.3, temperature=50.0, sample=i, sampler=sampler, ignore_eos=True)
            for i in range(32)
        ]
        batches = (options[i : i + 4] for i in range(0, 32, 4))
        done = (generator().generate([prompt_of(4)] * 4, batch) for batch in batches)
        return {completion.tokens[0] for batch in done for completion in batch}

    # Its top-p is of the raw distribution: a high temperature cannot widen the choice, as in the default order.
    padded = np.zeros((1, 64), np.int32)
    padded[0, :4] = prompt_of(4)
    likeliest = np.sort(np.asarray(jax.nn.softmax(predictor()(jnp.asarray(padded))[3])))[::-1]
    n_kept = int((np.cumsum(likeliest) - likeliest <= 0.3).sum())
    assert len(first_tokens("legacy")) <= n_kept < 10 < len(first_tokens("default"))


@pytest.mark.parametrize("n_prompts", [1, 3, 64, 100])
@pytest.mark.parametrize(("length", "max_tokens"), [(0, 1), (1, 0), (1, 15), (16, 1), (16, 100), (3, 1000)])
def test_engines_are_large_enough(n_prompts: int, length: int, max_tokens: int) -> None:
    """Each takes any of its prompts, all of them or 64 at a time; sizes are powers of two, so that they recur."""
    real = Generator(generator().cfg, generator().params, POLICY, load_tokenizer("bytes"))
    requests = [Request(prompt=tuple(prompt_of(length)), options=SamplingOptions(max_tokens=max_tokens))] * n_prompts
    engine = real._engine_for(requests)
    assert engine.max_batch >= min(n_prompts, 64)
    sequences = [engine.submit(request) for request in requests]
    assert sum(sequence.n_pages for sequence in sequences[:64]) <= engine._pools[0].capacity
    for size in (engine.max_batch, engine._pools[0].capacity):
        assert size & (size - 1) == 0


def test_a_generator_makes_its_own_engine() -> None:
    real = Generator(generator().cfg, generator().params, POLICY, load_tokenizer("bytes"))
    ask = SamplingOptions(max_tokens=20, temperature=0.0, ignore_eos=True)
    assert real.generate([prompt_of(5)], [ask])[0].tokens == naive(prompt_of(5), 20)


def test_the_tokenizer_of_the_tests_is_the_one_that_ends_at_256() -> None:
    tokenizer = generator().tokenizer
    assert isinstance(tokenizer, Tokenizer) and tokenizer.end_of_text == END
