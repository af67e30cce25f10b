"""`mesh-transformer serve` before it serves: everything that may be wrong with what it is given."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import TOKENIZER, FakeService
from serve_cases import CONFIG

from mesh_transformer import api, compat
from mesh_transformer.cli.main import main
from mesh_transformer.cli.serve import default_name
from mesh_transformer.serve import run as run_module

Call = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the command here: its exit status and the lines on standard error."""
    monkeypatch.setattr(compat, "prepare_process", lambda: None)
    monkeypatch.setattr(compat, "use_compile_cache", lambda: None)
    monkeypatch.delenv("MESH_TRANSFORMER_API_KEY", raising=False)

    def called(*arguments: object) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["mesh-transformer", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err.splitlines()

    return called


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Loading, the engine and the server replaced; what they were given."""
    found: dict[str, Any] = {}

    class Opened:
        config, tokenizer, source = CONFIG, TOKENIZER, None

        def service(self, **options: Any) -> FakeService:
            found["service"] = options
            return FakeService()

    def load(model: str, **options: Any) -> Opened:
        found["load"] = {"model": model, **options}
        return Opened()

    def run(served: Any, bound: socket.socket, note: Any) -> int:
        found.update(served=served, address=bound.getsockname())
        return 143

    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr(run_module, "run", run)
    return found


def test_options_reach_where_they_act(call: Call, asked: dict[str, Any]) -> None:
    status, lines = call(
        "models/tiny", "--port", 0, "--api-key", "k", "--max-batch", 3, "--max-queue", 5, "--when-full", "stop",
        "--max-prompt-tokens", 11, "--max-body-bytes", 12, "--max-tokens-limit", 13, "--max-choices", 14,
        "--request-timeout", 15, "--allow-origin", "https://a.example", "--allow-origin", "https://b.example",
        "--shutdown-timeout", 16, "--dtype", "bfloat16", "--quantize", "int8", "--tokenizer", "bytes", "--step", 17,
        "--mesh", "data=1", "--config", "c.json",
    )  # fmt: skip
    assert (status, lines) == (143, [])
    assert asked["load"].pop("progress") is not None
    assert asked["load"] == {
        "model": "models/tiny", "dtype": "bfloat16", "quantize": "int8", "tokenizer": "bytes", "step": 17,
        "mesh": "data=1", "config": "c.json",
    }  # fmt: skip
    assert asked["service"] == {"max_batch": 3, "max_queue": 5, "when_full": "stop"}
    served, options = asked["served"], asked["served"].options
    assert (served.model.when_full, options.name, options.api_key) == ("stop", "tiny", "k")
    assert (options.max_prompt_tokens, options.max_body_bytes, options.max_tokens_limit) == (11, 12, 13)
    assert (options.max_choices, options.request_timeout, options.shutdown_timeout) == (14, 15.0, 16.0)
    assert options.allow_origins == ("https://a.example", "https://b.example")
    assert asked["address"][0] == "127.0.0.1"


def test_the_key_may_be_in_the_environment(call: Call, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_TRANSFORMER_API_KEY", "secret")
    call("tiny", "--port", 0)
    assert asked["served"].options.api_key == "secret"
    monkeypatch.setenv("MESH_TRANSFORMER_API_KEY", "")
    asked.clear()
    status, lines = call("tiny", "--port", 0)
    assert status == 2 and lines[0] == "error: the API key is empty, which would ask for none" and not asked
    assert call("tiny", "--port", 0, "--api-key", "")[0] == 2


def test_a_server_open_to_all_is_warned_of(call: Call, asked: dict[str, Any]) -> None:
    _, lines = call("tiny", "--port", 0, "--host", "0.0.0.0")
    url = f"http://0.0.0.0:{asked['address'][1]}"
    assert lines == [f"warning: whoever reaches {url} may use this server; give --api-key to ask for a key"]
    assert call("tiny", "--port", 0, "--host", "0.0.0.0", "--api-key", "k")[1] == []
    assert call("tiny", "--port", 0, "--host", "localhost")[1] == []


def test_the_fingerprint_tells_what_changes_answers(call: Call, asked: dict[str, Any]) -> None:
    prints = []
    for more in ([], ["--dtype", "float16"], ["--quantize", "int8"], ["--when-full", "stop"], ["--max-batch", 2]):
        call("tiny", "--port", 0, *more)
        prints.append(asked["served"].fingerprint)
    assert len(set(prints)) == 4 and prints[0] == prints[4]


def test_names(tmp_path: Path) -> None:
    (tmp_path / "run@home").mkdir()
    assert default_name(str(tmp_path / "run@home")) == "run@home"
    assert default_name("models/tiny") == default_name("/models/tiny/") == "tiny"
    assert default_name("owner/gpt-j@main") == "gpt-j"
    assert default_name(".") == Path.cwd().name


def test_what_is_wrong_is_said_before_the_model_is_read(call: Call, asked: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wrong = {
            ("--port", port): [f"error: cannot listen at 127.0.0.1 port {port}: Address already in use",
                               "give another --port (0 takes any free one), or another --host"],
            ("--host", "no.such.host.invalid"): ["error: --host no.such.host.invalid: no such host ",
                                                 "give an address of this machine"],
            ("--when-full", "never"): ["error: Invalid value for '--when-full': ", "see: "],
            ("--port", 65536): ["error: Invalid value for '--port': ", "see: mesh-transformer serve --help"],
            ("--max-choices", 0): ["error: Invalid value for '--max-choices': ", "see: mesh-transformer serve --help"],
            ("--allow-origin", "example"): ["error: the origin 'example' cannot be used; expected https://host"],
            ("--request-timeout", 0): ["error: request_timeout = 0.0 is out of range: more than 0 seconds"],
        }  # fmt: skip
        for options, expected in wrong.items():
            status, lines = call("tiny", *options)
            assert status == 2 and len(lines) == len(expected), lines
            assert all(line.startswith(begins) for line, begins in zip(lines, expected, strict=True)), lines
    assert not asked


def test_a_chat_template_is_read_before_the_model(call: Call, asked: dict[str, Any], tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text("{{ messages[0].content }}")
    bad.write_text("{% if %}")
    for file, said in [(bad, "the chat template is no Jinja template: "), (tmp_path / "no", "cannot be read as a ")]:
        status, lines = call("tiny", "--port", 0, "--chat-template", file)
        assert (status, len(lines)) == (2, 2) and lines[0].startswith(f"error: {file}: {said}"), lines
    assert not asked
    assert call("tiny", "--port", 0, "--chat-template", good) == (143, [])
    assert asked["served"].model.tokenizer.companions.templates == {"default": "{{ messages[0].content }}"}


def test_jinja2_is_for_chats_alone(
    call: Call, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "jinja2" else real(name, *more)
    )
    assert call("tiny", "--port", 0) == (143, [])
    asked.clear()
    (tmp_path / "chat.jinja").write_text("{{ messages | length }} without jinja2")
    status, lines = call("tiny", "--port", 0, "--chat-template", tmp_path / "chat.jinja")
    assert status == 2 and not asked
    assert lines == ["error: chat templates need jinja2", "install it: pip install 'mesh-transformer[serve]'"]


def test_without_its_packages(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else real(name, *more)
    )
    status, lines = call("tiny")
    assert (status, lines) == (
        2,
        ["error: serve needs uvicorn", "install it: pip install 'mesh-transformer[serve]'"],
    )
