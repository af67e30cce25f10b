"""`mesh-transformer doctor` as it is typed: lines, JSON, exit status; and what `train` says by itself."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doctor_cases import ONE_CPU, Case, everything

from mesh_transformer import compat
from mesh_transformer.cli.main import main
from mesh_transformer.doctor import devices
from mesh_transformer.train import run as train_run

Called = tuple[int, str, str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Called]:
    """Runs the command in this process: status, output, errors."""

    def run(*arguments: object) -> Called:
        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["mesh-transformer", *map(str, arguments)])
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            patch.setattr(compat, "prepare_process", lambda: None)
            patch.setattr(compat, "use_compile_cache", lambda: None)
            patch.setattr(devices, "look_for_devices", lambda: ONE_CPU)
            with pytest.raises(SystemExit) as ended:
                main()
        return int(ended.value.code or 0), out.getvalue(), err.getvalue()

    return run


def test_a_sound_run(call: Callable[..., Called], case: Case, tmp_path: Path) -> None:
    before = everything(tmp_path)
    status, out, err = call("doctor", case.config, "--storage", case.path)
    assert (status, err) == (0, "")
    *lines, last = out.splitlines()
    assert last.startswith("0 failed, ")
    assert all(line.startswith(("ok       ", "warning  ", "         mend: ")) for line in lines)
    assert f"ok       storage {case.path}: " in out
    assert everything(tmp_path).keys() == before.keys()


def test_a_fault_and_its_mend(call: Callable[..., Called], case: Case) -> None:
    (case.path / "data" / "held.tfrecords").unlink()
    status, out, err = call("doctor", case.config, "--set", "train.batch_size=64")
    assert (status, err) == (1, "")
    lines = out.splitlines()
    (number,) = [n for n, line in enumerate(lines) if line.startswith("failed   data.validation.held: ")]
    assert "held.tfrecords" in lines[number] and lines[number + 1].startswith("         mend: ")
    assert any(line.startswith("failed   train.batch_size: ") for line in lines)
    assert lines[-1].startswith("2 failed, ")


def test_json(call: Callable[..., Called], case: Case) -> None:
    status, out, _ = call("doctor", case.config, "--json")
    told = json.loads(out)
    assert status == 0 and told["ok"] is True and told["counts"]["failed"] == 0
    assert set(told["checks"][0]) == {"name", "status", "message", "mend"}
    status, out, _ = call("doctor", case.config.with_name("lost.toml"), "--json")
    told = json.loads(out)
    assert status == 1 and told["ok"] is False
    assert [check["name"] for check in told["checks"] if check["status"] == "failed"] == ["configuration"]


def test_wrong_usage(call: Callable[..., Called]) -> None:
    status, out, err = call("doctor", "--set", "train.steps=1")
    assert (status, out) == (2, "") and "--set is of a run" in err and "doctor CONFIG" in err
    status, _, err = call("doctor", "--port", "70000")
    assert status == 2 and "--port" in err
    status, _, err = call("doctor", "x.toml", "--init-step", "3")
    assert status == 2 and "--init-from" in err


def test_train_tells_the_cheap_part(
    call: Callable[..., Called], case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    began: list[Any] = []

    def train(run: Any, observer: Any, **how: Any) -> train_run.Result:
        began.append(run)
        return train_run.Result(8, None)

    monkeypatch.setattr(train_run, "train", train)
    status, _, err = call("train", case.config)
    assert status == 0 and "warning" not in err and len(began) == 1
    monkeypatch.setenv("JAX_DISABLE_JIT", "1")  # JAX has read it by now
    from mesh_transformer.doctor import space

    monkeypatch.setattr(space, "memory", lambda: (1000, 1000))
    status, _, err = call("train", case.config)
    assert status == 0 and len(began) == 2  # a warning stops nothing
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1] for line in warnings] == ["JAX_DISABLE_JIT", "memory"]
