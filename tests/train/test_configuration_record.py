"""RUN/config.toml: the record of a run's configuration, and of its changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.load import load_run_config
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import DataConfig, LogConfig, RunConfig, TrainConfig
from mesh_transformer.train.record import CHANGES_FILE, record_configuration


def configuration(tmp_path: Path) -> RunConfig:
    return RunConfig(
        name="run",
        seed=0,
        model=preset("gpt-j-tiny"),
        data=DataConfig(train=str(tmp_path / "train.index"), sequence_length=128),
        train=TrainConfig(steps=10, learning_rate=1e-3),
        log=LogConfig(directory=str(tmp_path)),
    )


def recorded(tmp_path: Path) -> tuple[RunConfig, RunDirectory]:
    run = configuration(tmp_path)
    directory = RunDirectory(run.run_directory)
    directory.path.mkdir()
    record_configuration(run, directory, 0)
    return run, directory


def test_written_as_it_is_read_and_changes_are_kept_with_their_step(tmp_path: Path) -> None:
    run, directory = recorded(tmp_path)
    assert load_run_config(directory.config)[0] == run
    longer = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_size=16))
    record_configuration(longer, directory, 7)
    assert load_run_config(directory.config)[0] == longer
    line = json.loads((directory.path / CHANGES_FILE).read_text())
    assert line == {"step": 7, "changed": {"train.batch_size": [8, 16]}}


@pytest.mark.parametrize("damage", [b"name = ", b"\xff\xfe"])
def test_a_damaged_record_is_named_and_left_alone(tmp_path: Path, damage: bytes) -> None:
    run, directory = recorded(tmp_path)
    directory.config.write_bytes(damage)
    with pytest.raises(ConfigError, match=r"config\.toml: the record of this run's configuration is damaged") as caught:
        record_configuration(run, directory, 7)
    assert "delete that file" in str(caught.value)
    assert directory.config.read_bytes() == damage
