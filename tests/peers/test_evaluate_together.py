"""Tasks evaluated by two real processes, of which the first runs the harness: the same figures as by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_cases import benchmark

import mesh_transformer as mt
from mesh_transformer.config.errors import UserError
from mesh_transformer.config.load import to_toml
from mesh_transformer.config.run import DataConfig, LogConfig, LoraConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.config.tuning import EvaluateConfig
from mesh_transformer.data.tfrecord import write_records
from mesh_transformer.train.metrics import read_metrics
from processes_cases import run_processes

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
NAMES = ("choosing", "reading", "writing")
COMMAND = "from mesh_transformer.cli.main import main; import sys; sys.argv[0] = 'mesh-transformer'; main()"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark().make_model(tmp_path_factory.mktemp("model") / "exported", layers=1, width=64)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    benchmark().make_tasks(place, 8)
    return place


def ran(count: int, devices: int, *arguments: object) -> list[str]:
    """The command in so many processes; what each wrote to standard output."""
    ended = run_processes(COMMAND, count, devices=devices, arguments=arguments, timeout=300)
    assert [each.status for each in ended] == [0] * count, "\n".join(each.stderr for each in ended)
    return [each.stdout for each in ended]


def test_the_command(model: Path, tasks: Path, tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        output = tmp_path / f"{count}.json"
        how = ["--tasks", ",".join(NAMES), "--include-path", tasks, "--output", output]
        said = ran(count, 1, "evaluate", model, *how)
        assert ["|choosing" in each for each in said] == [True, False][:count]
        found.append(json.loads(output.read_text())["results"])
    for name in NAMES:
        numbers = {key: value for key, value in found[0][name].items() if isinstance(value, float)}
        assert numbers and {key: found[1][name][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)


def test_an_unknown_task_ends_both(model: Path, tasks: Path) -> None:
    how = ["evaluate", model, "--tasks", "chosing", "--include-path", tasks]
    for each in run_processes(COMMAND, 2, devices=1, arguments=how):
        assert each.status == 2 and "task 'chosing' is not known; nearest: choosing" in each.stderr


def tuning(model: Path, tasks: Path, where: Path) -> RunConfig:
    cfg = mt.load(model).config
    ids = np.random.default_rng(1).integers(0, 200, (16, 17))
    write_records(where.parent / "data.tfrecords", ids)
    return RunConfig(
        name=where.name,
        model=cfg,
        data=DataConfig(train=str(where.parent / "data.tfrecords"), sequence_length=16),
        train=TrainConfig(steps=2, batch_size=4, learning_rate=1e-2, warmup_steps=0),
        lora=LoraConfig(rank=2, targets=("q", "w_out")),
        evaluate=EvaluateConfig(tasks=NAMES, every=1, include_path=str(tasks)),
        mesh=MeshConfig(tensor=2),
        log=LogConfig(directory=str(where.parent)),
    )


def test_within_a_training_of_an_adapter(model: Path, tasks: Path, tmp_path: Path) -> None:
    """The tokenizer is the model's: neither the configuration nor the data name one."""
    found: list[list[dict[str, Any]]] = []
    for count in (1, 2):
        run = tuning(model, tasks, tmp_path / f"run{count}")
        (tmp_path / f"{count}.toml").write_text(to_toml(run))
        ran(count, 4 // count, "train", tmp_path / f"{count}.toml", "--init-from", model)
        lines = read_metrics(run.run_directory / "metrics.jsonl")
        found.append([line for line in lines if "evaluation" in line])
    assert [(line["step"], line["evaluation"]) for line in found[0]] == [(s, n) for s in (1, 2) for n in NAMES]
    assert found[0][1] != {**found[0][4], "step": 1}, "the adapter learned nothing"
    for one, two in zip(*found, strict=True):
        assert two.pop("evaluation") == one.pop("evaluation")
        assert two == pytest.approx(one, rel=1e-4)


def test_rows_at_the_most_of_the_harness_own_command(model: Path) -> None:
    from mesh_transformer.evaluate.harness import LoadedHarnessModel

    taken = [LoadedHarnessModel(str(model), batch_size=given).scorer.most_rows for given in (None, 1, "auto:4", "3")]
    assert taken == [None, None, None, 3]
    with pytest.raises(UserError, match="batch_size = 'many': expected auto or a whole number"):
        LoadedHarnessModel(str(model), batch_size="many")
    with pytest.raises(UserError, match="max_batch_size = 8 is not taken"):
        LoadedHarnessModel(str(model), max_batch_size=8)
