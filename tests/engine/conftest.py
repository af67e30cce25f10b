"""Services that are closed after a test, whatever became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_programs import fake_engine
from service_cases import Gate, Made

from mesh_transformer.engine.service import EngineService


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Made]]:
    """Makes services that are started, and closes them; there is nothing to compile."""
    monkeypatch.setattr("mesh_transformer.engine.service.warm", lambda engine: None)
    made: list[EngineService] = []

    def one(max_queue: int = 100, start: bool = True, **options: Any) -> Made:
        engine, programs = fake_engine(**options)
        service = EngineService(engine, max_queue=max_queue)
        made.append(service)
        if start:
            service.start()
        return service, engine, programs

    yield one
    while Gate.made:
        Gate.made.pop().open()
    for service in made:
        service.close(0.0)
        assert not service._thread.is_alive()
