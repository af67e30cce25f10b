"""A server in this process, before an engine that writes what it is told to."""

from __future__ import annotations

import json
from typing import Any

from fake_engine import TOKENIZER, FakeService
from starlette.testclient import TestClient

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.serve.app import make_app
from mesh_transformer.serve.options import ServeOptions
from mesh_transformer.serve.served import ModelFacts, Served

CONFIG = ModelConfig(n_layers=1, d_model=8, n_heads=1, n_vocab=264, n_ctx=64, d_rotary=8)


class Server:
    """The application, the fake engine behind it, and a client before it."""

    def __init__(self, service: FakeService, model: dict[str, Any], **options: Any) -> None:
        facts = ModelFacts(**{"config": CONFIG, "tokenizer": TOKENIZER, **model})
        self.service = service
        self.served = Served(facts, service, ServeOptions(**{"name": "tiny", **options}))
        self.app = make_app(self.served)
        self.http = TestClient(self.app, raise_server_exceptions=False)

    def complete(self, **body: Any) -> Any:
        """The answer of /v1/completions, which must be one."""
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def error(self, path: str = "/v1/completions", **body: Any) -> tuple[int, dict[str, Any]]:
        """The status and the error object of an answer that must be one."""
        return error_of(self.http.post(path, json=body))

    def events(self, **body: Any) -> list[Any]:
        """The events of a stream: JSON, and at the end "[DONE]"."""
        answer = self.http.post("/v1/completions", json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.text.split("\n\n")
        assert lines.pop() == ""
        assert all(line.startswith("data: ") for line in lines)
        found = [line.removeprefix("data: ") for line in lines]
        return [text if text == "[DONE]" else json.loads(text) for text in found]

    @property
    def requests(self) -> list[Any]:
        """What the engine was asked last."""
        return self.service.groups[-1].requests


def error_of(answer: Any) -> tuple[int, dict[str, Any]]:
    """The status and the error object of an answer, whose shape is checked."""
    assert answer.headers["content-type"] == "application/json", answer.text
    body = answer.json()
    assert list(body) == ["error"] and list(body["error"]) == ["message", "type", "param", "code"]
    return answer.status_code, body["error"]
