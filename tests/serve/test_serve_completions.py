"""POST /v1/completions, whole: every field, and what the answer holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import fake_engine
import pytest
from fake_engine import END, TOKENIZER, WRITTEN
from serve_cases import CONFIG

from mesh_transformer.data.tokenizer import train_bpe
from mesh_transformer.serve.schema import CompletionRequest


def test_the_answer_is_openais(server: Any) -> None:
    server.service.n_cached = 2
    answer = server.complete(model="tiny", prompt="abc", max_tokens=5)
    assert answer.pop("id").startswith("cmpl-") and answer.pop("created") > 1_700_000_000
    assert answer.pop("system_fingerprint").startswith("mt_")
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"text": "Hello", "index": 0, "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("abc", [(97, 98, 99)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([97, 300 - 44], [(97, 256)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
        (None, [(END,)]),
        ("", [(END,)]),
        ([], [(END,)]),
        ([[]], [(END,)]),
        (["", "a"], [(END,), (97,)]),
        ("<|endoftext|>", [tuple(b"<|endoftext|>")]),  # text is text
    ],
)
def test_prompts(server: Any, prompt: Any, tokens: list[tuple[int, ...]]) -> None:
    answer = server.complete(prompt=prompt)
    assert [request.prompt for request in server.requests] == tokens
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(tokens)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))


def test_the_body_may_be_an_empty_object(server: Any) -> None:
    assert server.complete()["choices"][0]["text"] == WRITTEN[:15]  # 16 bytes
    assert server.requests[0].options.max_tokens == 16


FIELDS: list[tuple[str, Any, Any]] = [
    ("max_tokens", 3, 3),
    ("temperature", 0, 0.0),
    ("temperature", 1.5, 1.5),
    ("top_p", 0.5, 0.5),
    ("top_k", 7, 7),
    ("min_p", 0.25, 0.25),
    ("min_tokens", 2, 2),
    ("ignore_eos", True, True),
    ("presence_penalty", -2, -2.0),
    ("frequency_penalty", 2, 2.0),
    ("logit_bias", {"97": -100, "0": 1.5}, ((97, -100.0), (0, 1.5))),
    ("seed", 7, 7),
    ("seed", -1, 2**32 - 1),
    ("seed", 2**40 + 5, 5),
    ("stop", "x", ("x",)),
    ("stop", ["x", "yz"], ("x", "yz")),
    ("stop", [], ()),
]


@pytest.mark.parametrize(("field", "value", "option"), FIELDS)
def test_fields_reach_the_engine(server: Any, field: str, value: Any, option: Any) -> None:
    server.complete(prompt="a", **{field: value})
    assert getattr(server.requests[0].options, field) == option


def test_null_is_the_default(server: Any) -> None:
    server.complete(seed=1)
    by_default = server.requests[0]
    server.complete(**{**dict.fromkeys(CompletionRequest.model_fields), "seed": 1})
    assert server.requests[0] == by_default


def test_fields_without_effect(server: Any) -> None:
    server.complete(prompt="a", seed=1)
    plain = server.requests[0]
    server.complete(prompt="a", seed=1, user="someone", n=1, best_of=1, suffix=None)
    assert server.requests[0] == plain


def test_choices_are_samples_of_one_seed(server: Any) -> None:
    answer = server.complete(prompt=["a", "b"], n=3, best_of=3)
    seeds = {request.options.seed for request in server.requests}
    assert [request.options.sample for request in server.requests] == [0, 1, 2, 0, 1, 2]
    assert [request.prompt for request in server.requests] == [(97,)] * 3 + [(98,)] * 3
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert answer["usage"]["prompt_tokens"] == 2  # each prompt once
    assert answer["usage"]["completion_tokens"] == 6 * 16
    server.complete(prompt="a")
    assert len(seeds) == 1 and server.requests[0].options.seed not in seeds


def test_it_ends_at_end_of_text_and_at_stop_strings(server: Any) -> None:
    choice = server.complete(prompt="a", max_tokens=50)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (WRITTEN, "stop")
    choice = server.complete(prompt="a", max_tokens=50, stop=["zzz", "wörld"])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hello, ", "stop")


def test_echo(server: Any) -> None:
    choices = server.complete(prompt=["né: ", "b"], max_tokens=2, echo=True)["choices"]
    assert [choice["text"] for choice in choices] == ["né: He", "bHe"]
    assert server.complete(prompt=[97, 98], max_tokens=2, echo=True)["choices"][0]["text"] == "abHe"
    assert not server.requests[0].prompt_logprobs
    answer = server.complete(prompt="ab", max_tokens=0, echo=True)
    assert answer["choices"] == [{"text": "ab", "index": 0, "logprobs": None, "finish_reason": "length"}]
    assert server.complete(prompt="", max_tokens=1, echo=True)["choices"][0]["text"] == "H"


# ------------------------------------------------------------------------------------------------- log-probabilities


def test_logprobs_hold_the_likeliest_and_the_token(server: Any) -> None:
    logprobs = server.complete(prompt="ab", max_tokens=2, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["H", "e"],
        "token_logprobs": [-0.25, -0.5],
        "top_logprobs": [{"A": -1.0, "B": -2.0, "H": -0.25}, {"A": -1.125, "B": -2.125, "e": -0.5}],
        "text_offset": [0, 1],
    }
    assert list(logprobs["top_logprobs"][0]) == ["A", "B", "H"]


def test_logprobs_zero_reports_the_token_alone(server: Any) -> None:
    logprobs = server.complete(prompt="ab", max_tokens=1, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"H": -0.25}]


def test_logprobs_of_the_prompt(server: Any) -> None:
    choice = server.complete(prompt="né", max_tokens=1, logprobs=1, echo=True)["choices"][0]
    assert server.requests[0].prompt_logprobs and choice["text"] == "néH"
    assert choice["logprobs"] == {
        "tokens": ["n", "bytes:\\xc3", "bytes:\\xa9", "H"],
        "token_logprobs": [None, -0.5, -0.75, -0.25],
        "top_logprobs": [
            None,
            {"A": -1.125, "bytes:\\xc3": -0.5},
            {"A": -1.25, "bytes:\\xa9": -0.75},
            {"A": -1.0, "H": -0.25},
        ],
        "text_offset": [0, 1, 1, 2],
    }


def test_logprobs_of_an_empty_prompt_are_none(server: Any) -> None:
    logprobs = server.complete(prompt="", max_tokens=1, logprobs=0, echo=True)["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["text_offset"]) == (["H"], [0])


def test_a_score_as_lm_eval_computes_it(server: Any) -> None:
    """Token ids, echo, logprobs 1 and one token that is thrown away: the slice must hold the continuation exactly."""
    server.service.written = [END]  # even if that one is end-of-text
    answer = server.complete(
        model="tiny", prompt=[[1, 2, 3, 4, 5]], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][2:-1] == [-0.75, -1.0, -1.25]
    assert all(max(top.values()) >= own for own, top in zip(
        logprobs["token_logprobs"][2:-1], logprobs["top_logprobs"][2:-1], strict=True))  # fmt: skip
    assert logprobs["tokens"][-1] == "<|endoftext|>" and answer["choices"][0]["text"] == "\x01\x02\x03\x04\x05"


def test_tokens_of_pieces_of_characters(server: Any) -> None:
    choice = server.complete(prompt="a", max_tokens=12, logprobs=0)["choices"][0]
    assert choice["text"] == "Hello, wörl"
    assert choice["logprobs"]["tokens"][8:11] == ["bytes:\\xc3", "bytes:\\xb6", "r"]
    assert choice["logprobs"]["text_offset"][7:12] == [7, 8, 8, 9, 10]


def test_a_text_may_end_within_a_character(server: Any) -> None:
    choice = server.complete(prompt="a", max_tokens=9, logprobs=0)["choices"][0]
    assert choice["text"] == "Hello, w\ufffd"
    assert choice["logprobs"]["tokens"][-1] == "bytes:\\xc3" and choice["logprobs"]["text_offset"][-1] == 8


def test_the_tokens_of_a_stop_string_are_not_told(server: Any) -> None:
    choice = server.complete(prompt="a", max_tokens=50, logprobs=0, stop="lo, w")["choices"][0]
    assert choice["text"] == "Hel" and choice["logprobs"]["tokens"] == ["H", "e", "l"]
    assert server.complete(prompt="a", max_tokens=50, stop="lo, w")["usage"]["completion_tokens"] == 8


def test_tokens_without_a_text(server: Any) -> None:
    server.service.written = [72, 260, 105, 261, 260]
    choice = server.complete(prompt="a", logprobs=0, max_tokens=5)["choices"][0]
    assert choice["text"] == "Hi"
    assert choice["logprobs"]["tokens"] == ["H", "token_id:260", "i", "token_id:261", "token_id:260"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 2]


def test_tokens_of_many_bytes(make_server: Any) -> None:
    """A real BPE, whose tokens hold several characters or parts of them."""
    bpe = train_bpe(["déjà vu " * 30], 263)
    server = make_server(model={"tokenizer": bpe})
    ids = bpe.encode("déjà vu déjà")
    answer = server.complete(prompt=ids, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert answer["text"] == "déjà vu déjà" and len(ids) < 12
    offsets, pieces = answer["logprobs"]["text_offset"], answer["logprobs"]["tokens"]
    for begins, piece in zip(offsets, pieces, strict=True):
        assert piece.startswith("bytes:") or answer["text"][begins:].startswith(piece)


def test_a_model_without_tokenizer_takes_ids(make_server: Any) -> None:
    server = make_server(model={"tokenizer": None})
    status, error = server.error(prompt="text")
    assert (status, error["param"]) == (400, "prompt")
    assert error["message"] == "prompt is text, and this model has no tokenizer; give token ids to /v1/completions"
    assert "no tokenizer" in server.error(prompt=[1], stop="x")[1]["message"]
    logprobs = server.complete(prompt=[1, 2], max_tokens=2, logprobs=1, echo=True)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:1", "token_id:2", "token_id:72", "token_id:101"]
    assert list(logprobs["top_logprobs"][1]) == ["token_id:65", "token_id:2"]


def test_impossible_tokens_have_a_finite_logprob(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_engine, "_logprob", lambda k: float("-inf"))
    logprobs = server.complete(prompt="a", max_tokens=1, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0] and logprobs["top_logprobs"] == [{"H": -9999.0}]


def test_long_prompts_are_answered_alike(make_server: Any) -> None:
    """Work on them is done on other threads."""
    server = make_server(model={"config": dataclasses.replace(CONFIG, n_ctx=20_000)})
    text = "wörd " * 3_000
    answer = server.complete(prompt=text, max_tokens=1, echo=True, logprobs=1)
    assert answer["choices"][0]["text"] == text + "H"
    assert answer["usage"]["prompt_tokens"] == len(TOKENIZER.encode(text)) == len(server.requests[0].prompt)
    assert answer["choices"][0]["logprobs"]["text_offset"][-1] == len(text)
