"""The page before the real server, in a process of its own, with a small model of random weights."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from page_visit import visiting

from legacy.generator import Arch, write_model_directory

if importlib.util.find_spec("playwright"):  # where it is missing these are only collected; run, they fail
    from playwright.sync_api import Browser, expect

pytestmark = pytest.mark.peers
PATIENCE = 240  # seconds for the server to warm up
CONTEXT = 1024  # tokens
ENDLESS = 16 * CONTEXT - 100  # as long as a text may be, far longer than any test waits


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that is ready; it must end by itself when told to."""
    path = tmp_path_factory.mktemp("page")
    arch = Arch(layers=2, d_model=64, n_heads=4, n_vocab=264, seq=CONTEXT)
    write_model_directory(path / "goose", arch, 1, [1], config=True)
    ours = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "mesh_transformer", "serve", str(path / "goose")]
    command += ["--port", "0", "--max-batch", "2", "--name", "goose", "--max-tokens-limit", str(ENDLESS)]
    with subprocess.Popen(command, env=os.environ | ours, stderr=subprocess.PIPE, text=True) as process:
        yield from watched(process)


def watched(process: subprocess.Popen[str]) -> Iterator[str]:
    """Where a server is reached, once it says that it is ready; then ends it."""
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            lines.append(line)
            if line.startswith("ready"):
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(PATIENCE), lines
        found = re.search(r"serving goose at (http://\S+)", "".join(lines))
        assert found and process.poll() is None, lines
        yield f"{found[1]}/"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, lines
    finally:
        process.kill()
        reader.join()


def ask(url: str, body: dict[str, Any] | None = None) -> str:
    """What the server answers to somebody else."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def test_the_text_is_the_servers(browser: Browser, url: str) -> None:
    # Random weights write bytes of all kinds: characters in parts, control characters, what is no character at all.
    with visiting(browser, url, "#p=Geese&n=100&t=1&tp=1&s=0", model="goose") as visit:
        expect(visit.page.locator("#context")).to_have_text("1,024 tokens of context")
        for seed in range(4):
            visit.page.locator("#seed").fill(str(seed))
            asked = visit.generate()
            plain = {name: value for name, value in asked.items() if not name.startswith("stream")}
            answer = json.loads(ask(f"{url}v1/completions", plain))
            choice = answer["choices"][0]
            assert visit.completion == choice["text"] and choice["text"]
            tokens = answer["usage"]["completion_tokens"]
            ended = (
                "The model ended its text after" if choice["finish_reason"] == "stop" else "Stopped at the length of"
            )
            visit.say(f"{ended} {tokens} tokens. The prompt has 5 tokens.")
        visit.page.locator("#text .token").first.hover()
        taken = visit.page.locator("#alternatives .alternative.taken")
        assert taken.count() >= 1
        assert visit.page.locator("#alternatives .alternative").count() >= 5


def test_a_prompt_that_is_too_long(browser: Browser, url: str) -> None:
    with visiting(browser, url, model="goose") as visit:
        visit.errors_allowed = True
        visit.generate("x" * (CONTEXT + 1))
        said = re.compile(r"^The server refused this: .* 1025 tokens.* 1024")
        expect(visit.page.get_by_role("alert")).to_have_text(said)


def test_stop_frees_the_slot(browser: Browser, url: str) -> None:
    more = {"max_tokens": ENDLESS, "ignore_eos": True}
    with visiting(browser, url, "#p=Geese&t=1", model="goose") as visit:
        visit.page.route(
            "**/v1/completions",
            lambda route: route.continue_(post_data=json.dumps(route.request.post_data_json | more)),
        )
        visit.press("Generate")
        expect(visit.page.locator("#text .token").first).to_be_visible()
        visit.press("Stop")
        visit.wait_for_end()
        visit.say(re.compile("^Stopped by you after "))
        assert busy(url) == 0


def busy(url: str) -> float:
    """Slots in use, as soon as none is or after ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        found = re.search(r"^mesh_transformer_slots_used (\S+)", ask(f"{url}metrics"), re.MULTILINE)
        assert found
        if float(found[1]) == 0 or time.monotonic() > deadline:
            return float(found[1])
        time.sleep(0.05)
