"""The original's two protocols, with requests as clients of 2021 sent them."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import pytest
from fake_engine import END, WRITTEN, FakeService
from serve_cases import CONFIG, error_of

from mesh_transformer.engine.request import Output
from mesh_transformer.serve import predictions

# As a browser sent it to the web demo's server, but for the host's name.
RECORDED_COMPLETE = (
    b'{"context":"In a shocking finding, scientists discovered a herd of unicorns","top_p":0.9,"temp":0.75}',
    {"Content-Type": "application/json", "Origin": "https://demo.example", "Referer": "https://demo.example/"},
)
# As `requests.post(url, json=...)` sent it to the container.
RECORDED_PREDICT = (
    b'{"context": "EleutherAI is", "temp": 0.8, "top_p": 0.9, "top_k": 40, "length": 64}',
    {"Content-Type": "application/json", "User-Agent": "python-requests/2.25.1", "Accept": "*/*"},
)


def test_a_recorded_completion(server: Any) -> None:
    body, headers = RECORDED_COMPLETE
    server.service.written = [72, END, 105] * 100
    answer = server.http.post("/complete", content=body, headers=headers)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"
    assert answer.json() == {"completion": ("H<|endoftext|>i" * 100)[: 86 * 15 - 14]}  # 256 tokens, past end-of-text
    request = server.requests[0]
    assert request.prompt == tuple(json.loads(body)["context"].encode()[-64:])  # the newest that the context holds
    options = request.options
    assert (options.sampler, options.max_tokens, options.ignore_eos) == ("legacy", 256, True)
    assert (options.temperature, options.top_p, options.top_k) == (0.75, 0.9, 0)


def test_where_texts_end_room_is_left_for_the_completion(make_server: Any) -> None:
    config = dataclasses.replace(CONFIG, n_ctx=300)
    server = make_server(model={"config": config, "when_full": "stop"})
    server.http.post("/complete", json={"context": "a" * 400, "top_p": 1, "temp": 1})
    assert len(server.requests[0].prompt) == 44
    server.http.post("/model/predict", json={"context": "a" * 400, "length": 10})
    assert len(server.requests[0].prompt) == 290


def test_the_preflight_of_complete(server: Any) -> None:
    answer = server.http.options("/complete")
    assert (answer.status_code, answer.content) == (200, b"")
    for what in ("Origin", "Headers", "Methods"):
        assert answer.headers[f"access-control-allow-{what.lower()}"] == "*"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "context", "context is missing; expected a string, the text to go on from"),
        ({"context": "a", "temp": 1}, "top_p", "top_p is missing; expected a number from 0 to 1"),
        ({"context": "a", "top_p": 1}, "temp", "temp is missing; expected a number from 0 to 100; 0 always takes"),
        ({"context": None, "top_p": 1, "temp": 1}, "context", "context = null; expected a string"),
        ({"context": "a", "top_p": "1", "temp": 1}, "top_p", 'top_p = "1"; expected a number from 0 to 1'),
        ({"context": "a", "top_p": 2, "temp": 1}, "top_p", "top_p = 2; expected a number from 0 to 1"),
        ({"context": "a", "top_p": 1, "temp": -1}, "temp", "temp = -1; expected a number from 0 to 100"),
        ({"context": "a", "top_p": 1, "temp": 1, "top_k": 5}, "top_k", 'the field "top_k" is not known; '),
    ],
)
def test_wrong_requests_to_complete(server: Any, body: dict[str, Any], param: str, message: str) -> None:
    answer = server.http.post("/complete", json=body)
    status, error = error_of(answer)
    assert (status, error["param"]) == (400, param) and error["message"].startswith(message)
    assert answer.headers["access-control-allow-origin"] == "*"


def test_a_full_queue_is_an_error_now(server: Any) -> None:
    server.service.full = True
    answer = server.http.post("/complete", json={"context": "a", "top_p": 1, "temp": 1})
    status, error = error_of(answer)
    assert (status, error["code"]) == (429, "queue_full")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["access-control-allow-origin"] == "*"
    assert server.error("/model/predict", context="a")[0] == 429


# -------------------------------------------------------------------------------------------------------- the pair


def test_a_recorded_prediction(server: Any) -> None:
    body, headers = RECORDED_PREDICT
    answer = server.http.post("/model/predict", content=body, headers=headers)
    assert answer.json() == {"qid": 1}
    options = server.requests[0].options
    assert (options.temperature, options.top_p, options.top_k, options.max_tokens) == (0.8, 0.9, 40, 64)
    assert (options.sampler, options.ignore_eos) == ("legacy", True)
    got = server.http.post("/model/get_prediction", json={"qid": 1}).json()
    assert list(got) == ["context", "completion", "time"]
    assert got["context"] == "EleutherAI is" and got["completion"] == WRITTEN + "<|endoftext|>"
    assert isinstance(got["time"], float) and got["time"] >= 0
    assert server.http.post("/model/get_prediction", json={"qid": 1}).json() == got  # asked twice


def test_defaults_and_null(server: Any) -> None:
    server.http.post("/model/predict", json={"context": "a"})
    options = server.requests[0].options
    assert (options.temperature, options.top_p, options.top_k, options.max_tokens) == (1.0, 0.9, 50, 256)
    server.http.post("/model/predict", json={"context": "a", **dict.fromkeys(("temp", "top_p", "top_k", "length"))})
    assert dataclasses.replace(server.requests[0].options, seed=options.seed) == options


def test_each_gets_its_own_length(server: Any) -> None:
    numbers = [server.http.post("/model/predict", json={"context": "a", "length": n}).json()["qid"] for n in (3, 7, 0)]
    assert numbers == [1, 2, 3]
    texts = [server.http.post("/model/get_prediction", json={"qid": n}).json()["completion"] for n in numbers]
    assert texts == [WRITTEN[:3], WRITTEN[:7], ""]


def test_get_prediction_waits(make_server: Any) -> None:
    server = make_server(held=True)
    assert server.http.post("/model/predict", json={"context": "a", "length": 2}).json() == {"qid": 1}
    found: list[Any] = []
    waiting = [
        threading.Thread(target=lambda: found.append(server.http.post("/model/get_prediction", json={"qid": 1}).json()))
        for _ in range(2)
    ]
    for thread in waiting:
        thread.start()
    server.service.answer(server.service.groups[0])
    for thread in waiting:
        thread.join(30)
    assert [prediction["completion"] for prediction in found] == ["He", "He"]


def test_unknown_numbers(server: Any) -> None:
    for qid in (1, 99):
        status, error = server.error("/model/get_prediction", qid=qid)
        assert (status, error["param"], error["code"]) == (404, "qid", "prediction_not_found")
        assert error["message"].startswith(f"qid = {qid} is not known; predictions are kept for 3600 seconds after")
    for qid in ("1", 1.5, True, None, 0):
        status, error = server.error("/model/get_prediction", qid=qid)
        assert (status, error["param"]) == (400, "qid") and "expected a whole number of at least 1" in error["message"]


def ask(server: Any, context: str = "a") -> int:
    """A prediction that is done."""
    qid: int = server.http.post("/model/predict", json={"context": context, "length": 1}).json()["qid"]
    assert server.http.post("/model/get_prediction", json={"qid": qid}).status_code == 200
    return qid


def kept(server: Any, qid: int) -> bool:
    return bool(server.http.post("/model/get_prediction", json={"qid": qid}).status_code == 200)


def test_results_are_kept_for_a_bounded_number(make_server: Any) -> None:
    server = make_server(max_results=2)
    numbers = [ask(server) for _ in range(4)]
    assert [kept(server, qid) for qid in numbers] == [False, False, True, True]


def test_results_are_kept_for_a_bounded_time(make_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make_server(results_seconds=100.0)
    first = ask(server)
    now = predictions.time.monotonic()

    class Later:
        @staticmethod
        def monotonic() -> float:
            return now + 90

    monkeypatch.setattr(predictions, "time", Later)
    second = ask(server)
    now += 20
    assert [kept(server, first), kept(server, second)] == [False, True]


def test_results_are_kept_within_a_bounded_size(make_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "_MOST_KEPT", 100)
    server = make_server()
    numbers = [ask(server, "a" * n) for n in (60, 60, 200)]
    assert [kept(server, qid) for qid in numbers] == [False, False, True]


def test_a_prediction_that_failed_says_so_each_time(make_server: Any) -> None:
    server = make_server(held=True)
    server.service.answer_with(lambda group: group.receive(0, Output(error=RuntimeError("out of memory"))))
    assert server.http.post("/model/predict", json={"context": "a"}).json() == {"qid": 1}
    for _ in range(2):
        status, error = server.error("/model/get_prediction", qid=1)
        assert (status, error["code"]) == (500, "engine_error") and "out of memory" in error["message"]


def test_any_origin_without_credentials(server: Any) -> None:
    answer = server.http.post("/model/predict", json={"context": "a"}, headers={"Origin": "https://other.example"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    answer = server.http.options("/model/get_prediction", headers={"Origin": "https://other.example"})
    assert (answer.status_code, answer.headers["access-control-allow-methods"]) == (200, "*")


def test_lengths_are_limited(server: Any) -> None:
    status, error = server.error("/model/predict", context="a", length=5000)
    assert (status, error["param"]) == (400, "length")
    assert error["message"] == "length = 5000; this server writes at most 4096 tokens in one completion"


def test_an_empty_context_is_left_to_the_engine(make_server: Any) -> None:
    server = make_server(held=True)
    server.service.answer_with(lambda group: group.receive(0, Output(text="x", finish_reason="length")))
    assert server.http.post("/complete", json={"context": "", "top_p": 1, "temp": 1}).json() == {"completion": "x"}
    assert server.requests[0].prompt == ()


def test_contexts_need_a_tokenizer(make_server: Any) -> None:
    server = make_server(model={"tokenizer": None})
    assert "no tokenizer" in server.error("/complete", context="a", top_p=1, temp=1)[1]["message"]
    assert isinstance(server.service, FakeService)
