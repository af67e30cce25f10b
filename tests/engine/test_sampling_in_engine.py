"""What the engine writes against a slow reference: the whole text through the model for every token, and NumPy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import END, LARGE, N_CTX, Heard, ask, complete, model, prompt_of

from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.request import Request, TokenLogprob
from mesh_transformer.model import decoder
from mesh_transformer.sample.options import SamplingOptions

TOKENIZER = load_tokenizer("bytes")


@functools.cache
def engine() -> Engine:
    return model().engine(LARGE, tokenizer=TOKENIZER)


@functools.cache
def _forward() -> Any:
    one = model()
    return jax.jit(lambda tokens: decoder.forward(one.params, tokens, one.cfg, one.policy)[0])


def logits_of(text: Sequence[int]) -> np.ndarray:
    """Logits after every token of a text, [len(text), vocab], by the forward pass alone."""
    padded = np.zeros((1, N_CTX), np.int32)
    padded[0, : len(text)] = text
    return np.asarray(_forward()(jnp.asarray(padded)))[: len(text)]


# -------------------------------------------------------------------------------------------------- the reference


def pick(logits: np.ndarray, options: SamplingOptions, position: int) -> int:
    """The token at a position, as docs/sampling.md has it."""
    ids = np.arange(len(logits))
    if options.temperature == 0:
        return int(np.argmax(logits))
    legacy = options.sampler == "legacy"
    scaled = (logits - logits.max()) / (1.0 if legacy else options.temperature)
    order = np.lexsort((-ids if legacy else ids, -scaled))  # the likeliest first; of equal ones by id
    kept = list(order[: options.top_k or None])
    if options.top_p < 1:
        of_all = list(order) if legacy else kept
        share = dict(zip(of_all, softmax(scaled[of_all]), strict=True))
        before = np.cumsum([0.0, *(share[i] for i in kept)])
        kept = [i for i, mass in zip(kept, before, strict=False) if mass < options.top_p]
    share = softmax(scaled[kept])
    kept = [i for i, p in zip(kept, share, strict=True) if p >= options.min_p * share[0]]
    stream = jax.random.fold_in(jax.random.key(options.seed), options.sample)
    noise = np.asarray(jax.random.gumbel(jax.random.fold_in(stream, position), (len(logits),)))
    return max(kept, key=lambda i: scaled[i] / (options.temperature if legacy else 1.0) + noise[i])


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def reference(request: Request) -> tuple[list[int], str, str]:
    """Tokens, text and the reason of its end."""
    options, text = request.options, list(request.prompt)
    said: list[int] = []
    while len(said) < options.max_tokens:
        logits = logits_of(text)[-1].astype(np.float64)
        for token, bias in options.logit_bias:
            logits[token] += bias
        counts = np.bincount(said, minlength=len(logits))
        logits -= options.frequency_penalty * counts + options.presence_penalty * (counts > 0)
        if len(said) < options.min_tokens:
            logits[END] = -np.inf
        token = pick(logits, options, len(text))
        if token == END and not options.ignore_eos:
            return said, TOKENIZER.decode(said), "stop"
        said.append(token)
        text.append(token)
        decoded = TOKENIZER.decode(said)
        ends = [decoded.index(stop) for stop in options.stop if stop in decoded]
        if ends:
            return said, decoded[: min(ends)], "stop"
    return said, TOKENIZER.decode(said), "length"


# Shared by all: what differs is what the option does.
_SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 3}
_LEAN: dict[str, Any] = {"logit_bias": ((END, 100.0),)}  # end-of-text, if it may be
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": _SAMPLED,
    "another sample": _SAMPLED | {"sample": 1},
    "another seed": _SAMPLED | {"seed": 2**32 - 1},
    "presence": {"presence_penalty": 2.0},
    "frequency": _SAMPLED | {"frequency_penalty": 2.0, "logit_bias": ((5, 5.0), (66, 5.0))},
    "negative penalties": _SAMPLED | {"frequency_penalty": -1.5, "presence_penalty": -2.0},
    "biases": _SAMPLED | {"logit_bias": ((5, 6.0), (66, 6.0), (67, -100.0))},
    "ends at once": _LEAN,
    "held off": _LEAN | {"min_tokens": 5} | _SAMPLED,
    "ends but is ignored": _LEAN | {"ignore_eos": True},
    "top_k": _SAMPLED | {"temperature": 1.5, "top_k": 3},
    "top_p": _SAMPLED | {"temperature": 1.5, "top_p": 0.6},
    "min_p": _SAMPLED | {"temperature": 1.5, "min_p": 0.2},
    "legacy top_k": _SAMPLED | {"sampler": "legacy", "temperature": 3.0, "top_k": 4},
    "legacy top_p": _SAMPLED | {"sampler": "legacy", "temperature": 3.0, "top_p": 0.7},
    "legacy penalty": _SAMPLED | {"sampler": "legacy", "frequency_penalty": 2.0, "logit_bias": ((5, 5.0), (66, 5.0))},
    "everything": {
        "temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 8, "sample": 2, "min_tokens": 4,
        "presence_penalty": 0.7, "frequency_penalty": -0.3, "logit_bias": ((END, 3.0), (40, 2.0)),
    },
}  # fmt: skip


@functools.cache
def _together() -> dict[str, tuple[Request, Heard]]:
    """All of them in one engine at one time, each with a prompt of the same end but another length."""
    base = prompt_of(80)
    requests = {
        name: ask(base[-20 - 3 * i :], 24, **{"ignore_eos": False} | options)
        for i, (name, options) in enumerate(OPTIONS.items())
    }
    return dict(zip(OPTIONS, zip(requests.values(), complete(engine(), *requests.values()), strict=True), strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_side_by_side(name: str) -> None:
    request, found = _together()[name]
    tokens, text, reason = reference(request)
    assert (found.tokens, found.text, found.finish_reason) == (tokens, text, reason)


def test_the_options_matter() -> None:
    found = {name: heard for name, (_, heard) in _together().items()}
    assert found["ends at once"].tokens == [] and found["ends at once"].finish_reason == "stop"
    assert len(found["held off"].tokens) == 5 and found["held off"].finish_reason == "stop"
    assert found["ends but is ignored"].tokens == [END] * 24
    assert len(set(found["presence"].tokens)) > len(set(found["greedy"].tokens)) - 2
    assert 67 not in found["biases"].tokens and {5, 66} & set(found["biases"].tokens)


@pytest.mark.parametrize(
    ("name", "option"),
    [("presence", "presence_penalty"), ("frequency", "frequency_penalty"), ("frequency", "logit_bias"),
     ("negative penalties", "frequency_penalty"), ("negative penalties", "presence_penalty"), ("biases", "logit_bias"),
     ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p"), ("legacy top_k", "top_k"), ("legacy top_p", "top_p"),
     ("legacy top_p", "sampler"), ("legacy penalty", "frequency_penalty"), ("everything", "sample"),
     ("everything", "logit_bias")],
)  # fmt: skip
def test_without_the_option_it_would_be_another_text(name: str, option: str) -> None:
    """So that the comparison with the reference says something."""
    request, found = _together()[name]
    default = {field.name: field.default for field in dataclasses.fields(SamplingOptions)}[option]
    without = dataclasses.replace(request, options=dataclasses.replace(request.options, **{option: default}))
    assert complete(engine(), without)[0].tokens != found.tokens


def test_stop_strings_are_cut_off() -> None:
    """Wherever they end: in one token or over several, the first of two, and one that never comes."""
    prompt = prompt_of(40)
    tokens = reference(ask(prompt, 40))[0]
    text = TOKENIZER.decode(tokens)
    at = next(i for i in range(8, 30) if text[i : i + 3].isascii() and text.index(text[i : i + 3]) == i)
    stops = [(text[at],), (text[at : at + 3],), ("never", text[at + 2], text[at]), ("never",)]
    requests = [ask(prompt, 40, stop=stop) for stop in stops]
    for request, found in zip(requests, complete(engine(), *requests), strict=True):
        assert (found.tokens, found.text, found.finish_reason) == reference(request)
        assert not any(stop in found.text for stop in request.options.stop)


# ------------------------------------------------------------------------------------------------- likelihoods


def assert_likelihood(said: TokenLogprob, token: int, logits: np.ndarray, n: int) -> None:
    """A token's log-probability and its n alternatives are those of the model itself."""
    log_probs = logits.astype(np.float64)
    log_probs -= log_probs.max() + np.log(np.exp(log_probs - log_probs.max()).sum())
    assert said.token == token and said.logprob == pytest.approx(log_probs[token], abs=1e-4)
    ids = np.argsort(-log_probs, kind="stable")[:n]
    # Two that are as likely but for rounding may have changed places; each must be the one that it says it is.
    said_ids = [i for i, _ in said.top]
    assert len(set(said_ids)) == n and log_probs[said_ids] == pytest.approx(log_probs[ids], abs=1e-4)
    assert [value for _, value in said.top] == pytest.approx(log_probs[said_ids], abs=1e-4)


def check_likelihoods(request: Request, found: Heard) -> None:
    prompt, n = list(request.prompt), request.logprobs
    logits = logits_of([*prompt, *found.tokens])
    if n is None:
        assert found.logprobs == [] and found.prompt_logprobs is None
        return
    assert len(found.logprobs) == len(found.tokens)
    for i, (said, token) in enumerate(zip(found.logprobs, found.tokens, strict=True)):
        assert_likelihood(said, token, logits[len(prompt) + i - 1], n)
    if not request.prompt_logprobs:
        assert found.prompt_logprobs is None
        return
    assert found.prompt_logprobs is not None and found.n_cached == 0
    assert found.prompt_logprobs[0] == TokenLogprob(prompt[0], None) and len(found.prompt_logprobs) == len(prompt)
    for i, said in enumerate(found.prompt_logprobs[1:]):
        assert_likelihood(said, prompt[i + 1], logits[i], n)


def test_likelihoods_of_what_was_written() -> None:
    """The model's own, whatever the temperature, biases and filters do; beside rows that want none."""
    odd = {"temperature": 1.7, "top_k": 5, "logit_bias": ((9, 7.0),), "frequency_penalty": 1.0}
    wanted = [None, 0, 1, 20, None, 5]
    requests = [ask(prompt_of(20 + i), 6, logprobs=n, **(odd if i % 2 else {})) for i, n in enumerate(wanted)]
    for request, found in zip(requests, complete(engine(), *requests), strict=True):
        check_likelihoods(request, found)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 64, 65, 128, 129, 150])
def test_likelihoods_of_prompts(length: int) -> None:
    """In chunks of a page, where every chunk's last token foretells the first of the next."""
    prompt = prompt_of(length, 5)
    requests = [
        ask(prompt, n_tokens, logprobs=n, prompt_logprobs=True) for n_tokens, n in [(0, 0), (0, 20), (1, 1), (4, 3)]
    ]
    for request, found in zip(requests, complete(engine(), *requests), strict=True):
        assert len(found.tokens) == request.options.max_tokens and found.finish_reason == "length"
        check_likelihoods(request, found)


def test_nothing_is_wanted() -> None:
    (found,) = complete(engine(), ask(prompt_of(30), 0))
    assert (found.tokens, found.text, found.outputs, found.finish_reason) == ([], "", 1, "length")


def test_a_prompt_taken_over_changes_nothing() -> None:
    request = ask(prompt_of(150, 9), 6, logprobs=2)
    first, again = (complete(engine(), request)[0] for _ in range(2))
    assert (first.n_cached, again.n_cached) == (0, 128)
    assert (again.tokens, again.logprobs) == (first.tokens, first.logprobs)
    check_likelihoods(request, again)
