"""OpenAI's own client and the real server before a chat model, whose prompts are those of transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from client_cases import KEY, PATIENCE, Running, compiled_quickly, likelihoods, serving

import family_tokenizers
import mesh_transformer as mt
from mesh_transformer.data.chat import encode_chat
from mesh_transformer.data.tokenizer import load_tokenizer
from small_families import params_of, small

if importlib.util.find_spec("openai"):  # where it is missing these are only collected; run, they fail
    import openai

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
NAME = "duck"
TALK: list[Any] = [
    {"role": "system", "content": "You are a duck."},
    {"role": "user", "content": [{"type": "text", "text": "What did the geese eat?"}]},
]
ASKED: dict[str, Any] = {"model": NAME, "seed": 5, "max_tokens": 24, "temperature": 1.0, "top_p": 0.9}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A Llama of random weights, with Llama 3's template and two ids that end an answer, opened as it was exported."""
    place = tmp_path_factory.mktemp("chat")
    tokenizer = load_tokenizer(family_tokenizers.write(place / "tokenizer", "llama-3"))
    cfg = small("llama", n_vocab=tokenizer.n_vocab + 3, n_ctx=128)
    mt.Model(cfg, params_of(cfg), tokenizer).save(place / NAME, format="huggingface")
    with serving(place / NAME, "--max-batch", "4", key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def model(running: Running) -> Iterator[mt.Model]:
    with compiled_quickly():
        yield mt.load(running.model)


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def prompt(running: Running) -> list[int]:
    """As transformers makes it of the same directory."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(running.model)
    said = [
        {**message, "content": text}
        for message, text in zip(TALK, ("You are a duck.", "What did the geese eat?"), strict=True)
    ]
    return list(theirs.apply_chat_template(said, tokenize=True, return_dict=False, add_generation_prompt=True))


def ours(model: mt.Model, prompt: list[int], n: int, **more: Any) -> list[Any]:
    options = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.9, "seed": 5, **more}
    return model.generate([prompt], samples=n, **options)


def test_answers(client: openai.OpenAI, model: mt.Model, prompt: list[int]) -> None:
    answer = client.chat.completions.create(messages=TALK, n=8, **ASKED)
    expected = ours(model, prompt, 8)
    assert [c.message.content for c in answer.choices] == [each.text for each in expected]
    assert [c.finish_reason for c in answer.choices] == [each.finish_reason for each in expected]
    assert [c.index for c in answer.choices] == list(range(8))
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == NAME
    assert {c.message.role for c in answer.choices} == {"assistant"}
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == sum(len(each.tokens) for each in expected)
    assert model.chat([{**TALK[0]}, {"role": "user", "content": TALK[1]["content"][0]["text"]}], samples=8, seed=5,
                      max_tokens=24, temperature=1.0, top_p=0.9) == expected  # fmt: skip


def test_both_ends_end_an_answer(client: openai.OpenAI, model: mt.Model, prompt: list[int]) -> None:
    assert model.tokenizer is not None
    for end in model.tokenizer.ends:
        asked = {**ASKED, "logit_bias": {str(end): 100}}
        (choice,) = client.chat.completions.create(messages=TALK, **asked).choices
        assert (choice.message.content, choice.finish_reason) == ("", "stop")
        held = client.chat.completions.create(messages=TALK, **asked, extra_body={"min_tokens": 3})
        assert held.usage is not None and held.usage.completion_tokens == 3 and held.choices[0].finish_reason == "stop"


def test_a_stream(client: openai.OpenAI, model: mt.Model, prompt: list[int]) -> None:
    expected = ours(model, prompt, 3)
    texts, reasons, roles, usage = [""] * 3, [""] * 3, [""] * 3, None
    for chunk in client.chat.completions.create(
        messages=TALK, n=3, stream=True, stream_options={"include_usage": True}, **ASKED
    ):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            roles[choice.index] += choice.delta.role or ""
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [each.text for each in expected] and roles == ["assistant"] * 3
    assert reasons == [each.finish_reason for each in expected]
    assert usage is not None and usage.completion_tokens == sum(len(each.tokens) for each in expected)
    # OpenAI's helper puts the pieces together.
    with client.chat.completions.stream(messages=TALK, **ASKED) as stream:
        assert list(stream)
        assert stream.current_completion_snapshot.choices[0].message.content == expected[0].text


def test_stop_strings_and_log_probabilities(client: openai.OpenAI, model: mt.Model, prompt: list[int]) -> None:
    whole = ours(model, prompt, 1, ignore_eos=True)[0]
    more = {"ignore_eos": True}
    answer = client.chat.completions.create(
        messages=TALK, logprobs=True, top_logprobs=3, extra_body=more, **ASKED
    ).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    told = answer.logprobs.content
    assert (
        bytes(byte for entry in told for byte in entry.bytes or []).decode(errors="replace") == answer.message.content
    )
    rows = likelihoods(model, [*prompt, *whole.tokens])[len(prompt) - 1 :]
    for entry, row, token in zip(told, rows, whole.tokens, strict=False):
        assert entry.logprob == pytest.approx(row[token], abs=1e-4) and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(row.max(), abs=1e-4)
    stop = whole.text[6:8]
    cut = client.chat.completions.create(messages=TALK, stop=stop, extra_body=more, **ASKED).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")


def test_a_conversation_goes_on(client: openai.OpenAI, model: mt.Model) -> None:
    """The client's own objects are taken back as messages; what was read before is not read again."""
    first = client.chat.completions.create(messages=TALK, **ASKED)
    asked: list[Any] = [*TALK, first.choices[0].message, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(messages=asked, **ASKED)
    plain = [{"role": "system", "content": "You are a duck."}, {"role": "user", "content": "What did the geese eat?"}]
    plain += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And then?"},
    ]
    assert model.tokenizer is not None and second.usage is not None
    assert second.usage.prompt_tokens == len(encode_chat(model.tokenizer, plain))
    assert (
        second.choices[0].message.content == model.chat(plain, **{k: ASKED[k] for k in ASKED if k != "model"})[0].text
    )


def test_bad_requests(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="messages = ") as caught:
        client.chat.completions.create(messages=[{"role": "robot", "content": "a"}], **ASKED)  # type: ignore[list-item]
    assert (caught.value.param, caught.value.code) == ("messages", None)
    with pytest.raises(openai.BadRequestError, match=r"the prompt has \d+ tokens, .* 128") as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "goose " * 200}], **ASKED)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(messages=TALK, **{**ASKED, "model": "swan"})
