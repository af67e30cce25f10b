"""Streams of /v1/completions: the same answer in pieces, byte by byte."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import END, WRITTEN

from mesh_transformer.config.errors import RunError
from mesh_transformer.engine.request import Output


def test_a_stream_byte_by_byte(server: Any) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store" and "content-length" not in answer.headers
    first = answer.text.split('"', 4)
    created = answer.text.split('"created":', 1)[1].split(",", 1)[0]
    head = (
        f'{{"id":"{first[3]}","object":"text_completion","created":{created},"model":"tiny",'
        f'"system_fingerprint":"{server.served.fingerprint}","choices":[{{"text":"'
    )
    tail = '","index":0,"logprobs":null,"finish_reason":'
    events = [f"{head}H{tail}null}}]}}", f"{head}e{tail}null}}]}}", f'{head}{tail}"length"}}]}}', "[DONE]"]
    assert answer.text == "".join(f"data: {event}\n\n" for event in events)


ASKED: list[dict[str, Any]] = [
    {"prompt": "a"},
    {"prompt": "né", "echo": True, "max_tokens": 50},
    {"prompt": "né", "echo": True, "max_tokens": 50, "logprobs": 3},
    {"prompt": "a", "max_tokens": 50, "logprobs": 1, "stop": ["lo, w"]},
    {"prompt": ["a", "bc"], "n": 2, "logprobs": 0, "echo": True, "max_tokens": 9},
    {"prompt": "né", "echo": True, "max_tokens": 0, "logprobs": 1},
    {"prompt": "né", "echo": True, "max_tokens": 0},
]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("written", [None, [72, 260, 0xC3, 0xB6, 0xE2, 0x80, 105, 261, 0xF0, 0x9F, END]])
def test_the_pieces_are_the_whole(server: Any, asked: dict[str, Any], written: list[int] | None) -> None:
    if written:
        server.service.written = written
    whole = server.complete(**asked, seed=1)
    events = server.events(**asked, seed=1, stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == [] and events[-2]["usage"] == whole["usage"]
    assert len({event["id"] for event in events[:-1]}) == 1
    for choice in whole["choices"]:
        pieces = [e["choices"][0] for e in events[:-2] if e["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
        for key, values in (choice["logprobs"] or {}).items():
            assert [value for piece in pieces for value in piece["logprobs"][key]] == values
    assert all(event["usage"] is None for event in events[:-2])


def test_every_chunk_reports_its_tokens(server: Any) -> None:
    events = server.events(prompt="a", max_tokens=50, logprobs=0)
    pieces = [event["choices"][0] for event in events[:-1]]
    assert [piece["text"] for piece in pieces] == [*WRITTEN, ""]
    assert pieces[8]["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xb6"] and pieces[8]["text"] == "ö"
    assert [piece["logprobs"]["text_offset"] for piece in pieces][7:10] == [[7], [8, 8], [9]]
    assert "usage" not in events[0]


def test_text_that_may_be_a_stop_string_is_held_back(server: Any) -> None:
    events = server.events(prompt="a", max_tokens=50, logprobs=0, stop="lo!")
    pieces = [event["choices"][0] for event in events[:-1]]
    assert [piece["text"] for piece in pieces[:5]] == ["H", "e", "l", "lo,", " "]
    assert pieces[3]["logprobs"]["tokens"] == ["l", "o", ","]


def test_samples_are_interleaved_by_index(make_server: Any) -> None:
    server = make_server(held=True)

    def answer(group: Any) -> None:
        for output, index in [("x", 1), ("y", 0), ("z", 1)]:
            group.receive(index, Output(tokens=(1,), text=output))
        for index in (1, 0):
            group.receive(index, Output(finish_reason="length"))

    server.service.answer_with(answer)
    events = server.events(prompt="a", n=2)
    assert [(e["choices"][0]["index"], e["choices"][0]["text"]) for e in events[:-1]] == [
        (1, "x"), (0, "y"), (1, "z"), (1, ""), (0, ""),
    ]  # fmt: skip


def test_a_failure_in_mid_stream_is_an_event(make_server: Any) -> None:
    server = make_server(held=True)

    def fail(group: Any) -> None:
        group.receive(0, Output(tokens=(1,), text="a"))
        group.receive(0, Output(error=RunError("the device is gone\nsecond line")))

    server.service.answer_with(fail)
    events = server.events(prompt="a")
    assert [event["choices"][0]["text"] for event in events[:1]] == ["a"] and len(events) == 2
    assert events[1] == {
        "error": {
            "message": "the model failed on this request: the device is gone",
            "type": "server_error",
            "param": None,
            "code": "engine_error",
        }
    }


def test_a_failure_of_one_choice_ends_the_others(make_server: Any) -> None:
    server = make_server(held=True)
    server.service.answer_with(lambda group: group.receive(1, Output(error=ValueError())))
    status, error = server.error(prompt="a", n=2)
    assert (status, error["code"]) == (500, "engine_error") and error["message"].endswith("ValueError")
    assert server.service.groups[0].cancelled.is_set()


def test_what_is_refused_is_refused_before_the_stream(server: Any) -> None:
    assert server.error(prompt="a", stream=True, temperature=3)[0] == 400
    server.service.full = True
    assert server.error(prompt="a", stream=True)[0] == 429
    assert server.served.metrics.streams._value.get() == 0
