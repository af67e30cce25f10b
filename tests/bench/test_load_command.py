"""`mesh-transformer bench load` as it is typed."""

import json
import sys
from pathlib import Path

import pytest

from bench.fake_server import FakeServer
from mesh_transformer.cli.main import main


def typed(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["mesh-transformer", "bench", "load", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


SHORT = ("--clients", 2, "--seconds", 0.2, "--vanish", 0)


def test_figures_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MESH_TRANSFORMER_API_KEY", "the-key")
    with FakeServer() as server:
        url = f"http://127.0.0.1:{server.port}"
        turn = ("--one-by-one", "--rounds", 1, "--compare-seconds", 0.1)
        assert typed(monkeypatch, "--url", url, *SHORT, *turn, "--out", tmp_path / "out.json") == 0
    assert all("\r\nAuthorization: Bearer the-key\r\n" in head for head in server.heads)
    result = json.loads((tmp_path / "out.json").read_text())
    printed = capsys.readouterr().out
    assert f"{result['load']['requests']:,} requests in 0 s: {result['load']['done']:,} done, 0 vanished" in printed
    for line in ("output tokens/s", "time to first token: p50 ", "time per token: p50 ", "ours over ours one by one: "):
        assert line in printed


def test_faults_are_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The figures are there all the same."""
    with FakeServer(lambda number, body: "500" if number == 3 else "whole") as server:
        url = f"http://127.0.0.1:{server.port}"
        assert typed(monkeypatch, "--url", url, *SHORT, "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["load"]["failures"] == {"status 500": 1}
    assert err.endswith("error: the server did not bear the load: 1 x status 500\n")


def test_wrong_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch) == 2
    assert "error: bench load needs a MODEL to serve, or --url" in capsys.readouterr().err


def test_lengths_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before any server is started."""
    from bench.tiny_model import save_tiny_model

    model = save_tiny_model(tmp_path / "model")
    assert typed(monkeypatch, model, "--prompt-tokens", "4-40", "--output-tokens", 30) == 2
    assert "up to 40 and --output-tokens up to 30 do not fit the model's context of 64" in capsys.readouterr().err
