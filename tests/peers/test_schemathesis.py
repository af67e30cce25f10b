"""Thousands of requests made from /openapi.json, good and bad, against the real server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.tiny_model import save_tiny_model
from mesh_transformer.bench.load_server import ServerProcess, idle, metrics, watched_counters

pytestmark = pytest.mark.peers

KEY = "a-key"
SEED = 20
# A request that takes longer than this has hung.
HANG_SECONDS = 60
# What the description cannot say, and the server may refuse with 400: how fields go together (best_of and n, echo and
# max_tokens), prompts that do not fit the context, limits that the operator set.
NOT_CHECKED = "positive_data_acceptance"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The real command, with limits under which no single request takes long."""
    place = tmp_path_factory.mktemp("fuzzed")
    model = save_tiny_model(place / "model")
    line = [sys.executable, "-m", "mesh_transformer", "serve", str(model), "--max-batch", "4"]
    (place / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    limits = ["--max-tokens-limit", "256", "--max-choices", "8", "--chat-template", str(place / "chat.jinja")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        patch.setenv("MESH_TRANSFORMER_CACHE", str(place / "cache"))
        running = ServerProcess("the server", [*line, *limits], threads=os.cpu_count() or 1, key=KEY)
    with running:
        asyncio.run(running.wait_ready(600))
        yield running
        assert running.stop() == 0


def fuzz(server: ServerProcess, place: Path, n_each: int, n_least: int, seconds: float) -> None:
    """`n_each` random cases at the most for each operation, beside those that go through its fields one by one."""
    url = f"http://{server.address.host}:{server.address.port}/openapi.json"
    line = [sys.executable, "-m", "schemathesis.cli", "run", url, "--header", f"Authorization: Bearer {KEY}"]
    line += ["--seed", str(SEED), "--max-examples", str(n_each), "--request-timeout", str(HANG_SECONDS)]
    line += ["--checks", "all", "--exclude-checks", NOT_CHECKED, "--continue-on-failure", "--no-color"]
    line += ["--report", "json", "--report-json-path", str(place / "report.json")]
    done = subprocess.run(line, cwd=place, capture_output=True, text=True, timeout=seconds)
    report = json.loads((place / "report.json").read_text(encoding="utf-8"))
    assert report["failures"] == report["errors"] == [] and done.returncode == 0, done.stdout[-20_000:]
    assert report["complete"] and report["operations"]["tested"] == report["operations"]["total"] > 5
    assert report["test_cases"]["generated"] >= n_least
    # It lives, is free, and no step of the engine failed.
    samples = asyncio.run(metrics(server.address))
    assert idle(samples) and watched_counters(samples)["engine_step_failures"] == 0
    asked = [name for name in samples if name.startswith("mesh_transformer_requests_total")]
    # Until it is ready, /health says 503.
    assert not [name for name in asked if 'status="5' in name and 'endpoint="/health"' not in name]
    assert "Traceback" not in server.last_lines()


def test_some_hundred_cases(server: ServerProcess, tmp_path: Path) -> None:
    fuzz(server, tmp_path, n_each=15, n_least=300, seconds=500)


@pytest.mark.long
def test_five_thousand_cases(server: ServerProcess, tmp_path: Path) -> None:
    fuzz(server, tmp_path, n_each=2000, n_least=5000, seconds=3000)
