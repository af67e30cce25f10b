"""Servers in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeService
from serve_cases import Server


@pytest.fixture
def make_server() -> Iterator[Any]:
    """Makes servers: `held` and `model` (fields of ModelFacts) are the engine's and the model's, others options."""
    opened: list[Server] = []

    def make(*, held: bool = False, model: dict[str, Any] | None = None, **options: Any) -> Server:
        opened.append(Server(FakeService(held=held), model or {}, **options))
        opened[-1].http.__enter__()
        return opened[-1]

    yield make
    for server in opened:
        server.http.__exit__(None, None, None)


@pytest.fixture
def server(make_server: Any) -> Server:
    """With the default options."""
    return make_server()
