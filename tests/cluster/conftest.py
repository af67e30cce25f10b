"""A `gcloud` that is none, and a clock that does not wait."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_gcloud import Clock, Command, FakeGcloud, Scene

from mesh_transformer.cluster.tpu import Cloud
from mesh_transformer.cluster.tpu_commands import Tpu

CONFIG = """
[model]
preset = "gpt-j-tiny"
[data]
train = "/mnt/data/tiny.index"
[train]
steps = 4
learning_rate = 1e-2
[log]
directory = "/mnt/runs"
"""


@pytest.fixture
def gcloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGcloud:
    """First on PATH."""
    fake = FakeGcloud(tmp_path / "gcloud")
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    return fake


@pytest.fixture
def scene(gcloud: FakeGcloud) -> Scene:
    notes: list[str] = []
    clock = Clock()
    tpu = Tpu(name="my-tpu", zone="us-west4-a")
    return Scene(gcloud, Cloud(tpu, notes.append, clock=lambda: clock.now, sleep=clock.sleep), clock, notes)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose run outlives the TPU."""
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`mesh-transformer tpu ARGUMENTS` in this process: exit status, output, errors."""
    from mesh_transformer.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mesh-transformer", "tpu", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call
