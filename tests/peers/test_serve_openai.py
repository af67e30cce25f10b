"""OpenAI's own client against the real server, whose texts and figures must be the model's."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from client_cases import (
    CONTEXT,
    KEY,
    PATIENCE,
    Running,
    assert_told,
    compiled_quickly,
    likelihoods,
    save_model,
    serving,
    wait_for,
)

import mesh_transformer as mt
from mesh_transformer.sample.options import Completion

if importlib.util.find_spec("openai"):  # where it is missing these are only collected; run, they fail
    import openai
    from openai.types import Completion as Answer

pytestmark = pytest.mark.peers
NAME = "goose"
SEED = 2**33 + 20  # more than the 32 bits that sampling uses
# Long enough that a prompt and a completion have between 33 and 64 tokens: few shapes are compiled.
LENGTH = 33
PROMPTS = ["The geese waited for the café", "Nobody counted", "Seven proofs forgot its own tail"]
HOT = {"temperature": 0.9, "top_p": 0.95}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = save_model(tmp_path_factory.mktemp("openai") / NAME)
    limits = ["--max-batch", "4", "--max-queue", "4", "--max-tokens-limit", str(16 * CONTEXT - 100)]
    with serving(model, *limits, key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def model(running: Running) -> Iterator[mt.Model]:
    with compiled_quickly():
        yield mt.load(running.model)


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        yield client


def ours(model: mt.Model, prompts: Any, n: int = 1, **options: Any) -> list[Completion]:
    """What the model itself writes: `n` completions of each prompt (strings, or lists of ids)."""
    several = [prompts] if isinstance(prompts, str) else prompts
    # Always in batches of sixteen and in texts of the same lengths, so that few shapes are compiled.
    drawn = max(n, 16 // (len(several) + 1))
    options = {"seed": SEED % 2**32, "max_tokens": LENGTH, **options}
    found = model.generate([*several, model.encode(PROMPTS[0])], samples=drawn, **options)
    return [each for i in range(len(several)) for each in found[i * drawn : i * drawn + n]]


def assert_same(answer: Answer, expected: list[Completion]) -> None:
    found = [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices]
    assert found == [(i, each.text, each.finish_reason) for i, each in enumerate(expected)]


def assert_alike(pieces: list[Any], whole: list[Any]) -> None:
    """Log-probabilities in pieces, put together, are those of the whole."""

    def put_together(parts: list[Any], key: str) -> list[Any]:
        return [value for part in parts for value in getattr(part, key)]

    for key in ("tokens", "text_offset"):
        assert put_together(pieces, key) == put_together(whole, key)
    found, expected = (put_together(parts, "token_logprobs") for parts in (pieces, whole))
    assert [v is None for v in found] == [v is None for v in expected]
    np.testing.assert_allclose(np.array(found, float), np.array(expected, float), atol=1e-4)


def ask(client: openai.OpenAI, **asked: Any) -> Answer:
    return client.completions.create(**{"model": NAME, "seed": SEED, "max_tokens": LENGTH, **HOT, **asked})


# ------------------------------------------------------------------------------------------------------------ texts


def test_a_completion(client: openai.OpenAI, model: mt.Model) -> None:
    expected = ours(model, PROMPTS[0], **HOT)
    answer = ask(client, prompt=PROMPTS[0], user="somebody")
    assert_same(answer, expected)
    assert answer.model == NAME and answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.system_fingerprint and answer.created > 1.7e9 and answer.choices[0].logprobs is None
    assert answer.usage is not None
    n_prompt = len(model.encode(PROMPTS[0]))
    assert answer.usage.prompt_tokens == n_prompt and answer.usage.completion_tokens == len(expected[0].tokens)
    assert answer.usage.total_tokens == n_prompt + len(expected[0].tokens)


def test_lists_of_prompts_and_several_choices(client: openai.OpenAI, model: mt.Model) -> None:
    expected = ours(model, PROMPTS, n=3, **HOT)
    assert len({each.text for each in expected}) == 9
    ids = [model.encode(prompt) for prompt in PROMPTS]
    for prompt in (PROMPTS, ids):
        answer = ask(client, prompt=prompt, n=3)
        assert_same(answer, expected)
        assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, ids))
    assert_same(ask(client, prompt=ids[1], n=3, best_of=3), expected[3:6])


def test_texts_that_end_and_texts_that_do_not(client: openai.OpenAI, model: mt.Model) -> None:
    expected = ours(model, PROMPTS[1], n=8, **HOT)
    assert {each.finish_reason for each in expected} == {"stop", "length"}
    assert_same(ask(client, prompt=PROMPTS[1], n=8), expected)


def test_stop_strings(client: openai.OpenAI, model: mt.Model) -> None:
    # Two letters that stand in several of its texts, and one string in the middle of another.
    whole = [each.text for each in ours(model, PROMPTS, **HOT)]
    stop = [whole[0][20:24], whole[2][11:12], "never written"]
    expected = ours(model, PROMPTS, stop=stop, **HOT)
    assert [each.finish_reason for each in expected][::2] == ["stop", "stop"]
    answer = ask(client, prompt=PROMPTS, stop=stop)
    assert_same(answer, expected)
    assert all(full.startswith(choice.text) for full, choice in zip(whole, answer.choices, strict=True))
    alone = ours(model, PROMPTS, stop=stop[:1], **HOT)
    assert_same(ask(client, prompt=PROMPTS, stop=stop[0]), alone)


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        ({"temperature": 0.0}, {}),
        ({"temperature": 2.0}, {}),
        ({"top_p": 0.2}, {}),
        ({"presence_penalty": 2.0, "frequency_penalty": -0.5, "temperature": 0.5}, {}),
        ({"presence_penalty": -1.0, "frequency_penalty": 2.0, "temperature": 0.0}, {}),
        ({"logit_bias": {"300": 100.0}}, {}),
        ({"logit_bias": {"270": 9.0, "271": 9.0, "0": -100.0}, "temperature": 0.3}, {}),
        ({}, {"top_k": 3}),
        ({}, {"min_p": 0.2}),
        ({"n": 8}, {"min_tokens": 20}),
        ({"n": 8}, {"ignore_eos": True}),
    ],
)
def test_options_do_what_they_do_in_python(
    client: openai.OpenAI, model: mt.Model, asked: dict[str, Any], more: dict[str, Any]
) -> None:
    options = {**HOT, **asked, **more}
    if "logit_bias" in options:
        options["logit_bias"] = tuple((int(token), bias) for token, bias in options["logit_bias"].items())
    expected = ours(model, PROMPTS[1], **options)
    assert_same(ask(client, prompt=PROMPTS[1], **asked, extra_body=more), expected)
    assert expected != ours(model, PROMPTS[1], n=options.get("n", 1), **HOT)  # they do something


def test_seeds(client: openai.OpenAI, model: mt.Model) -> None:
    answers = [ask(client, prompt=PROMPTS[0], seed=seed) for seed in (7, 7, 8)]
    texts = [answer.choices[0].text for answer in answers]
    assert texts[0] == texts[1] != texts[2]
    assert len({answer.system_fingerprint for answer in answers}) == 1
    # Without a seed one is drawn for every request, and the choices of one request differ.
    asked: dict[str, Any] = {"model": NAME, "prompt": PROMPTS[0], "max_tokens": LENGTH, "n": 2}
    free = [client.completions.create(**asked, extra_body={"ignore_eos": True}) for _ in range(2)]
    assert len({choice.text for answer in free for choice in answer.choices}) == 4


def test_the_beginning_and_the_default_length(client: openai.OpenAI, model: mt.Model) -> None:
    assert model.tokenizer is not None and model.tokenizer.end_of_text is not None
    end = [model.tokenizer.end_of_text]
    expected = ours(model, [end], temperature=0.0, max_tokens=16)
    for prompt in ("", end, [""], None):
        answer = client.completions.create(model=NAME, prompt=prompt, temperature=0)
        assert_same(answer, expected)
        assert answer.usage is not None and answer.usage.prompt_tokens == 1


# ---------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"stop": [" the", "e"]}, {"echo": True, "logprobs": 2}])
def test_a_stream_is_the_same_answer(client: openai.OpenAI, more: dict[str, Any]) -> None:
    asked = {"prompt": PROMPTS[:2], **more}
    whole = ask(client, **asked)
    chunks = list(ask(client, **asked, stream=True, stream_options={"include_usage": True}))
    last = chunks.pop()
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None and chunk.id == last.id and len(chunk.choices) == 1 for chunk in chunks)
    for expected in whole.choices:
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == expected.index]
        assert "".join(piece.text for piece in pieces) == expected.text
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [expected.finish_reason]
        if "logprobs" in more:
            assert_alike([piece.logprobs for piece in pieces], [expected.logprobs])
    assert len(chunks) > 3 * len(whole.choices) or "stop" in more


def test_many_at_one_time(running: Running, model: mt.Model) -> None:
    """More than there are slots, streamed and whole beside each other; each has the text that it has alone."""
    expected = ours(model, PROMPTS, n=4, **HOT)

    async def one(client: openai.AsyncOpenAI, i: int) -> list[str]:
        asked: dict[str, Any] = {"model": NAME, "prompt": PROMPTS[i], "seed": SEED, "max_tokens": LENGTH, "n": 4, **HOT}
        if i % 2:
            return [choice.text for choice in (await client.completions.create(**asked)).choices]
        texts = [""] * 4
        async for chunk in await client.completions.create(**asked, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        return texts

    async def all_of_them() -> list[list[str]]:
        # A full queue is waited for by the client itself.
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=50) as client:
            return await asyncio.gather(*(one(client, i) for i in range(len(PROMPTS))))

    found = [text for texts in asyncio.run(all_of_them()) for text in texts]
    assert found == [each.text for each in expected]


def test_a_stream_that_is_closed_frees_its_slot(client: openai.OpenAI, running: Running) -> None:
    seconds = []
    most = 15 * CONTEXT
    for _ in range(3):  # the quickest of three: others may use this machine's cores
        before = running.figure("generated_tokens_total")
        stream = ask(client, prompt="The", max_tokens=most, n=4, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        assert running.figure("slots_used") == 4 and running.figure("streams") == 1
        stream.close()
        seconds.append(wait_for(lambda: running.figure("slots_used") == 0))
        assert running.figure("generated_tokens_total") - before < 4 * most  # freed, and not finished
    assert min(seconds) < 1, seconds


# -------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_log_probabilities_are_the_models(client: openai.OpenAI, model: mt.Model, top: int) -> None:
    expected = ours(model, PROMPTS, n=2, ignore_eos=True, **HOT)
    answer = ask(client, prompt=PROMPTS, n=2, logprobs=top, extra_body={"ignore_eos": True})
    assert_same(answer, expected)
    for choice, each in zip(answer.choices, expected, strict=True):
        prompt = model.encode(PROMPTS[choice.index // 2])
        assert_told(model, choice.logprobs, [*prompt, *each.tokens], len(prompt), top, choice.text)


def test_scoring_a_prompt(client: openai.OpenAI, model: mt.Model) -> None:
    """Nothing is written, and everything is told of what was given: as text, and as ids."""
    ids = [model.encode(prompt) for prompt in PROMPTS]
    for prompt in (PROMPTS, ids):
        answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=0, echo=True, logprobs=3)
        for choice, tokens, text in zip(answer.choices, ids, PROMPTS, strict=True):
            assert choice.text == text and choice.finish_reason == "length"
            assert_told(model, choice.logprobs, tokens, 0, 3, text)
        assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_echo(client: openai.OpenAI, model: mt.Model) -> None:
    plain = ours(model, PROMPTS[0], **HOT)[0]
    answer = ask(client, prompt=PROMPTS[0], echo=True)
    assert answer.choices[0].text == PROMPTS[0] + plain.text and answer.choices[0].logprobs is None
    told = ask(client, prompt=PROMPTS[0], echo=True, logprobs=2, extra_body={"ignore_eos": True}).choices[0]
    tokens = model.encode(PROMPTS[0]) + ours(model, PROMPTS[0], ignore_eos=True, **HOT)[0].tokens
    assert_told(model, told.logprobs, tokens, 0, 2, told.text)


def test_an_end_that_the_model_writes_is_told(client: openai.OpenAI, model: mt.Model) -> None:
    ended = [each for each in ours(model, PROMPTS[1], n=8, **HOT) if each.finish_reason == "stop"]
    answer = ask(client, prompt=PROMPTS[1], n=8, logprobs=1)
    choices = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    for each, choice in zip(ended, choices, strict=True):
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert choice.text == each.text and choice.logprobs.tokens[-1] == "<|endoftext|>"
        assert len(choice.logprobs.tokens) == len(each.tokens) + 1
        row = likelihoods(model, [*model.encode(PROMPTS[1]), *each.tokens])[-1]
        assert choice.logprobs.token_logprobs is not None and model.tokenizer is not None
        assert choice.logprobs.token_logprobs[-1] == pytest.approx(row[model.tokenizer.end_of_text], abs=1e-4)


# ------------------------------------------------------------------------------------------------------- exceptions


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"max_tokens": -1}, "max_tokens", "max_tokens = -1; expected a whole number of at least 0"),
        ({"temperature": 3}, "temperature", "temperature = 3; expected a number from 0 to 2"),
        ({"top_p": "0.5"}, "top_p", 'top_p = "0.5"; expected a number from 0 to 1'),
        ({"logprobs": 21}, "logprobs", "logprobs = 21; expected a whole number from 0 to 20"),
        ({"n": 2, "best_of": 3}, "best_of", "best_of = 3; expected null or the value of n"),
        ({"suffix": "end"}, "suffix", 'suffix = "end"; expected null'),
        ({"logit_bias": {"432": 1}}, "logit_bias", "logit_bias names token id 432; expected ids from 0 to 431"),
        ({"prompt": [1, 432]}, "prompt", "prompt holds token id 432; expected ids from 0 to 431"),
        ({"extra_body": {"functions": []}}, "functions", 'the field "functions" is not known; '),
        ({"max_tokens": 0}, "max_tokens", "max_tokens = 0 writes nothing; expected at least 1, or echo = true"),
    ],
)
def test_bad_requests(client: openai.OpenAI, asked: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **{"prompt": "a", **asked})
    assert (caught.value.status_code, caught.value.param, caught.value.code) == (400, param, None)
    assert caught.value.type == "invalid_request_error"
    assert isinstance(caught.value.body, dict) and str(caught.value.body["message"]).startswith(said)


def test_a_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    assert ask(client, prompt=[300] * CONTEXT, max_tokens=1).usage
    with pytest.raises(openai.BadRequestError, match=rf"the prompt has {CONTEXT + 1} tokens, .* {CONTEXT}") as caught:
        ask(client, prompt=[300] * (CONTEXT + 1))
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_a_bad_request_for_a_stream(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(client, prompt="a", top_p=2, stream=True)


def test_a_body_that_is_too_large(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="the body is larger than 1,048,576 bytes") as caught:
        ask(client, prompt="a" * (1 << 20))
    assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")


def test_keys(running: Running) -> None:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="another", max_retries=0) as client:
        for call in (lambda: client.completions.create(model=NAME, prompt="a"), client.models.list):
            with pytest.raises(openai.AuthenticationError, match="the API key is wrong") as caught:
                call()
            assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")


def test_models(client: openai.OpenAI) -> None:
    (listed,) = client.models.list()
    assert (listed.id, listed.object, listed.owned_by) == (NAME, "model", "mesh-transformer")
    assert client.models.retrieve(NAME) == listed
    said = 'the model "davinci" is not served here; expected "goose"'
    for call in (
        lambda: client.models.retrieve("davinci"),
        lambda: client.completions.create(model="davinci", prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError, match=said) as caught:
            call()
        assert (caught.value.status_code, caught.value.param, caught.value.code) == (404, "model", "model_not_found")


def test_a_full_queue(client: openai.OpenAI, running: Running, model: mt.Model) -> None:
    """It is refused with the time to wait; a client that may try again waits so long, and is served."""
    # So many short completions that the server knows its rate.
    ask(client, prompt="a", max_tokens=1, n=64)
    stream = ask(client, prompt="The", max_tokens=15 * CONTEXT, n=8, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))  # four of them are under way and four wait
    with pytest.raises(openai.RateLimitError, match="the queue is full; try again in") as refused:
        ask(client, prompt=PROMPTS[0])
    assert (refused.value.status_code, refused.value.code) == (429, "queue_full")
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60

    tried: list[float] = []
    asked_to_wait: list[int] = []

    def on_answer(answer: Any) -> None:
        tried.append(time.monotonic())
        if answer.status_code == 429:
            asked_to_wait.append(int(answer.headers["retry-after"]))
            stream.close()

    http = openai.DefaultHttpxClient(event_hooks={"response": [on_answer]})
    with client.with_options(max_retries=20, http_client=http) as patient:
        assert_same(ask(patient, prompt=PROMPTS[0]), ours(model, PROMPTS[0], **HOT))
    waited = [after - before for before, after in itertools.pairwise(tried)]
    assert waited and all(each >= wanted for each, wanted in zip(waited, asked_to_wait, strict=True))


def test_a_server_that_is_gone(client: openai.OpenAI, running: Running) -> None:
    """The last test: what runs is finished, and then there is nothing to connect to."""
    stream = ask(client, prompt="The", max_tokens=10 * LENGTH, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert running.stop() == 0
    assert list(stream)[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.APIConnectionError):
        ask(client, prompt="a")
