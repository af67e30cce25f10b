"""Weights & Biases through a stand-in of the same surface: it is never asked for anything, and a run stays one run."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import socket
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from run_cases import Listener, Toy, command, terminate

from mesh_transformer.config.errors import UserError
from mesh_transformer.config.run import RunConfig
from mesh_transformer.train import wandb as tracking
from mesh_transformer.train.run import Result, train

KEYS = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_SILENT", "NETRC")


class StandIn(types.ModuleType):
    """`wandb`, as far as it is used."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="stand-in")
        self.runs: list[dict[str, Any]] = []
        self.logged: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.runs.append(options)
        lines = self.logged.setdefault(options["id"], [])

        def log(values: dict[str, float], *, step: int) -> None:
            if not lines or step >= lines[-1][0]:  # the service takes no step before the last one
                lines.append((step, values))

        def finish() -> None:
            self.finished += 1

        return types.SimpleNamespace(log=log, finish=finish)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return stand_in


def tracked(toy: Toy, where: Path, **changes: Any) -> RunConfig:
    run = toy.run(where, **changes)
    return dataclasses.replace(run, log=dataclasses.replace(run.log, wandb_project="geese", tensorboard=False))


def test_an_interrupted_run_is_one_run_there(
    tmp_path: Path, toy: Toy, quick_compile: None, wandb: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracked(toy, tmp_path / "run")
    assert train(run, Listener(on_step={7: terminate})).stopped_by == 15
    assert train(run, Listener()) == Result(12, None)
    first, second = wandb.runs
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["project"] == "geese"
    assert first["name"] == "run" and first["config"]["train"]["steps"] == 12
    assert wandb.finished == 2
    losses = [step for step, values in wandb.logged[first["id"]] if "train/loss" in values]
    assert losses == list(range(1, 13))
    train(run, Listener(), new=True)
    assert wandb.runs[2]["id"] != first["id"]


def test_without_a_key_it_records_offline_and_says_where(
    tmp_path: Path, toy: Toy, quick_compile: None, wandb: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody_connects(*_: Any, **__: Any) -> None:
        raise AssertionError("there is no key, so there is nothing to connect for")

    monkeypatch.setattr(socket, "create_connection", nobody_connects)
    run, listener = tracked(toy, tmp_path / "run", steps=1), Listener()
    train(run, listener)
    assert wandb.runs[0]["mode"] == "offline"
    (said,) = [note for note in listener.notes if "Weights & Biases" in note]
    assert "there is no key" in said and f"wandb sync {tmp_path / 'run' / 'wandb'}" in said


@pytest.mark.parametrize("where", ["environment", "netrc"])
def test_with_a_key_and_no_network_too(
    where: str, tmp_path: Path, wandb: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    else:
        (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
        (tmp_path / ".netrc").chmod(0o600)
    asked = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        asked.append(address)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert tracking._why_offline() == "api.wandb.ai cannot be reached (timed out)"
    assert asked == [("api.wandb.ai", 443)]
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
    assert tracking._why_offline() is None


def test_what_the_user_says_of_the_mode_is_left_to_wandb(
    tmp_path: Path, toy: Toy, quick_compile: None, wandb: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(tracked(toy, tmp_path / "run", steps=1), Listener())
    assert wandb.runs[0]["mode"] is None


def test_a_missing_package_is_found_before_anything_is_written(
    tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "is_installed", lambda: False)
    run = tracked(toy, tmp_path / "run")
    with pytest.raises(UserError, match=r"log\.wandb_project") as caught:
        train(run, Listener())
    assert str(caught.value).count("\n") == 1
    assert not run.run_directory.exists()
    assert command(run, tmp_path, monkeypatch) == 2
    assert "pip install 'mesh-transformer[wandb]'" in capsys.readouterr().err


def test_a_directory_of_that_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # what a run offline leaves
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert importlib.util.find_spec("wandb") is not None
    assert not tracking.is_installed()
