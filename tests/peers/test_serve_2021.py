"""Clients of the original's two servers, as they were: what they sent in 2021, byte for byte, to the real server."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

import pytest
from client_cases import CONTEXT, PATIENCE, Running, compiled_quickly, save_model, serving

import mesh_transformer as mt

pytestmark = pytest.mark.peers

# The example in the simple server's own source, as curl 7.68 sent it.
CURL_COMPLETE = (
    b"POST /complete HTTP/1.1\r\n"
    b"Host: localhost:5000\r\n"
    b"User-Agent: curl/7.68.0\r\n"
    b"Accept: */*\r\n"
    b"Content-Type: application/json\r\n"
    b"Content-Length: 52\r\n"
    b"\r\n"
    b'{"context":"eleutherai", "top_p": 0.9, "temp": 0.75}'
)
# `requests.post(url, json={...})`, requests 2.25.1. Its JSON is ASCII. Under the original's sampler, which
# takes the nucleus before the temperature, so small a top_p leaves one token; in the usual order it leaves several.
REQUESTS_COMPLETE = (
    b"POST /complete HTTP/1.1\r\n"
    b"Host: localhost:5000\r\n"
    b"User-Agent: python-requests/2.25.1\r\n"
    b"Accept-Encoding: gzip, deflate\r\n"
    b"Accept: */*\r\n"
    b"Connection: keep-alive\r\n"
    b"Content-Length: 79\r\n"
    b"Content-Type: application/json\r\n"
    b"\r\n"
    b'{"context": "The geese waited for the caf\\u00e9", "top_p": 0.01, "temp": 100.0}'
)
# A page of another origin: Chrome 90 asks whether it may, and then sends.
BROWSER_PREFLIGHT = (
    b"OPTIONS /complete HTTP/1.1\r\n"
    b"Host: localhost:5000\r\n"
    b"Connection: keep-alive\r\n"
    b"Accept: */*\r\n"
    b"Access-Control-Request-Method: POST\r\n"
    b"Access-Control-Request-Headers: content-type\r\n"
    b"Origin: https://demo.example\r\n"
    b"Sec-Fetch-Mode: cors\r\n"
    b"Sec-Fetch-Site: cross-site\r\n"
    b"Sec-Fetch-Dest: empty\r\n"
    b"Referer: https://demo.example/\r\n"
    b"Accept-Encoding: gzip, deflate, br\r\n"
    b"Accept-Language: en-US,en;q=0.9\r\n"
    b"\r\n"
)
BROWSER_COMPLETE = (
    b"POST /complete HTTP/1.1\r\n"
    b"Host: localhost:5000\r\n"
    b"Connection: keep-alive\r\n"
    b"Content-Length: 68\r\n"
    b"Content-Type: application/json\r\n"
    b"Accept: */*\r\n"
    b"Origin: https://demo.example\r\n"
    b"Sec-Fetch-Site: cross-site\r\n"
    b"Sec-Fetch-Mode: cors\r\n"
    b"Sec-Fetch-Dest: empty\r\n"
    b"Referer: https://demo.example/\r\n"
    b"Accept-Encoding: gzip, deflate, br\r\n"
    b"Accept-Language: en-US,en;q=0.9\r\n"
    b"\r\n"
    b'{"context":"The geese waited for the caf\xc3\xa9","top_p":0.01,"temp":100}'
)
# `requests.post(url, json={...})` to the container; top_k 1 leaves one token to choose.
REQUESTS_PREDICT = (
    b"POST /model/predict HTTP/1.1\r\n"
    b"Host: gptj.api.example\r\n"
    b"User-Agent: python-requests/2.25.1\r\n"
    b"Accept-Encoding: gzip, deflate\r\n"
    b"Accept: */*\r\n"
    b"Connection: keep-alive\r\n"
    b"Content-Length: 82\r\n"
    b"Content-Type: application/json\r\n"
    b"\r\n"
    b'{"context": "Nobody counted", "temp": 0.8, "top_p": 0.9, "top_k": 1, "length": 40}'
)
# `requests.post(url, data=json.dumps({...}))`: no Content-Type.
DATA_PREDICT = (
    b"POST /model/predict HTTP/1.1\r\n"
    b"Host: gptj.api.example\r\n"
    b"User-Agent: python-requests/2.25.1\r\n"
    b"Accept-Encoding: gzip, deflate\r\n"
    b"Accept: */*\r\n"
    b"Connection: keep-alive\r\n"
    b"Content-Length: 29\r\n"
    b"\r\n"
    b'{"context": "Nobody counted"}'
)
# As the first of them, with another path and body.
REQUESTS = (
    b"POST %s HTTP/1.1\r\n"
    b"Host: localhost:5000\r\n"
    b"User-Agent: python-requests/2.25.1\r\n"
    b"Accept-Encoding: gzip, deflate\r\n"
    b"Accept: */*\r\n"
    b"Connection: keep-alive\r\n"
    b"Content-Length: %d\r\n"
    b"Content-Type: application/json\r\n"
    b"\r\n"
    b"%s"
)


class Wire:
    """A connection that is kept, as `requests.Session` and browsers keep theirs."""

    def __init__(self, running: Running) -> None:
        host, port = running.url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), PATIENCE)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, request: bytes) -> tuple[HTTPResponse, Any]:
        """The answer to a request, and its body: JSON, or None where there is none."""
        self._socket.sendall(request)
        method = request.split(b" ", 1)[0].decode()
        with HTTPResponse(self._socket, method=method) as answer:
            answer.begin()
            body = answer.read()
        if body:
            assert answer.getheader("Content-Type") == "application/json"
        return answer, json.loads(body) if body else None

    def post(self, path: str, value: Any) -> tuple[HTTPResponse, Any]:
        body = json.dumps(value).encode()
        return self.send(REQUESTS % (path.encode(), len(body), body))

    def get_prediction(self, qid: Any) -> tuple[HTTPResponse, Any]:
        return self.post("/model/get_prediction", {"qid": qid})


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(save_model(tmp_path_factory.mktemp("y2021") / "goose"), "--max-batch", "2") as running:
        yield running


@pytest.fixture(scope="module")
def model(running: Running) -> Iterator[mt.Model]:
    with compiled_quickly():
        yield mt.load(running.model)


@pytest.fixture
def wire(running: Running) -> Iterator[Wire]:
    with Wire(running) as wire:
        yield wire


def legacy(model: mt.Model, prompt: Any, length: int, **options: Any) -> str:
    """What the original's sampler writes."""
    return model.generate(prompt, max_tokens=length, sampler="legacy", ignore_eos=True, **options)[0].text


def test_the_simple_servers_own_example(wire: Wire) -> None:
    answer, body = wire.send(CURL_COMPLETE)
    assert answer.status == 200 and answer.getheader("Access-Control-Allow-Origin") == "*"
    assert list(body) == ["completion"] and isinstance(body["completion"], str)
    assert not body["completion"].startswith("eleutherai") and len(body["completion"]) > 256


def test_a_completion_has_256_tokens_of_the_originals_sampler(wire: Wire, model: mt.Model) -> None:
    # The prompt and they are more than the context: the text slides.
    assert len(model.encode("The geese waited for the café")) + 256 > CONTEXT
    how = {"top_p": 0.01, "temperature": 100.0}
    expected = legacy(model, "The geese waited for the café", 256, **how)
    assert expected == legacy(model, "The geese waited for the café", 256, seed=1, **how)
    for request in (REQUESTS_COMPLETE, REQUESTS_COMPLETE, BROWSER_COMPLETE):  # one connection
        answer, body = wire.send(request)
        assert answer.status == 200 and body == {"completion": expected}
        assert answer.getheader("Access-Control-Allow-Origin") == "*"


def test_a_long_context_is_cut_at_its_beginning(wire: Wire, model: mt.Model) -> None:
    context = " ".join(["The geese waited for the sea slowly."] * 60)
    ids = model.encode(context)
    assert len(ids) > CONTEXT
    _, found = wire.post("/complete", {"context": context, "top_p": 0.01, "temp": 100.0})
    assert found == {"completion": legacy(model, ids[-CONTEXT:], 256, top_p=0.01, temperature=100.0)}


def test_the_preflight_of_a_browser(wire: Wire) -> None:
    answer, body = wire.send(BROWSER_PREFLIGHT)
    assert answer.status == 200 and body is None
    for what in ("Origin", "Headers", "Methods"):
        assert answer.getheader(f"Access-Control-Allow-{what}") == "*"
    answer, body = wire.send(BROWSER_COMPLETE)  # on the same connection
    assert answer.status == 200 and list(body) == ["completion"]
    assert answer.getheader("Access-Control-Allow-Origin") == "*"


def test_the_containers_pair(wire: Wire, model: mt.Model) -> None:
    answer, body = wire.send(REQUESTS_PREDICT)
    assert answer.status == 200 and list(body) == ["qid"]
    first = body["qid"]
    assert type(first) is int and first >= 1
    _, body = wire.send(DATA_PREDICT)
    assert body == {"qid": first + 1}
    answer, short = wire.get_prediction(first)
    assert answer.status == 200 and list(short) == ["context", "completion", "time"]
    expected = legacy(model, "Nobody counted", 40, top_k=1, top_p=0.9, temperature=0.8)
    assert (short["context"], short["completion"]) == ("Nobody counted", expected)
    assert isinstance(short["time"], float) and short["time"] > 0
    _, long = wire.get_prediction(first + 1)
    # 256 tokens, though the other that ran beside it had 40.
    assert long["context"] == "Nobody counted" and len(long["completion"]) > 256 > len(short["completion"])
    # Asked twice answers twice, also on another connection.
    assert wire.get_prediction(first)[1] == short


@pytest.mark.parametrize(("qid", "status"), [(10**6, 404), ("1", 400)])
def test_what_the_original_could_not_answer(wire: Wire, qid: Any, status: int) -> None:
    """It waited for ever, or failed with 500."""
    answer, body = wire.get_prediction(qid)
    assert answer.status == status and list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["param"] == "qid"
    assert answer.getheader("Access-Control-Allow-Origin") == "*"
