"""A run of several processes: equal to one process, resumed on other meshes, and what happens when one is lost."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_cases import T, Toy, lines

from mesh_transformer.checkpoint.opening import complete_steps
from mesh_transformer.config.load import to_toml
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import MeshConfig, RunConfig
from processes_cases import Ended, run_processes

MODEL = ModelConfig(n_layers=4, d_model=16, n_heads=4, d_ff=32, n_vocab=64, n_ctx=T, d_rotary=4)
STEPS = 12
ALL = MeshConfig(fsdp=2, tensor=2, zero=3)  # and data 2
# The command; AT=step does what DO says in place of that step, in the process that has these variables.
COMMAND = """
import dataclasses, os, signal, sys, time
from mesh_transformer.cli.main import main
from mesh_transformer.train import run as runs
compile_them = runs.compile_programs
def compile_and_disturb(*arguments):
    programs = compile_them(*arguments)
    def step(state, rows):
        if int(state.step) + 1 == int(os.environ.get("AT", 0)):
            exec(os.environ["DO"])
        return programs.step(state, rows)
    return dataclasses.replace(programs, step=step)
runs.compile_programs = compile_and_disturb
sys.argv = ["mesh-transformer", "train", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables: quick compilation, each program once for all tests."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run_at(toy: Toy, where: Path, mesh: MeshConfig = ALL, **changes: Any) -> RunConfig:
    sets = {"validation": {"near": str(toy.directory / "near.tfrecords")}}
    settings = {"steps": STEPS, "batch_size": 8, "validation_batches": 1, "checkpoint_every": 4}
    return dataclasses.replace(toy.run(where, model=MODEL, data=sets, **(settings | changes)), mesh=mesh)


def started(
    run: RunConfig,
    quick: dict[str, str],
    count: int = 2,
    devices: int = 4,
    own: dict[int, dict[str, str]] | None = None,
    configs: dict[int, RunConfig] | None = None,
) -> list[Ended]:
    """`train` in `count` processes; `own`: variables of some of them."""
    config = run.run_directory.parent / f"{run.name}.toml"
    config.parent.mkdir(exist_ok=True)
    config.write_text(to_toml(run))
    variables = {index: quick | (own or {}).get(index, {}) for index in range(count)}
    return run_processes(COMMAND, count, devices=devices, arguments=[config], variables=variables)


def losses(run: RunConfig) -> list[float]:
    return [line["loss"] for line in lines(run)]


def check_done(ended: list[Ended]) -> None:
    assert [each.status for each in ended] == [0] * len(ended), "\n".join(each.stderr for each in ended)


@pytest.fixture(scope="module")
def undisturbed(toy: Toy, quick: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two processes of four devices; not to be changed."""
    run = run_at(toy, tmp_path_factory.mktemp("undisturbed") / "run")
    ended = started(run, quick)
    check_done(ended)
    first, second = (each.stderr for each in ended)
    assert "process 0 of 2" in first and "mesh: data 2 x fsdp 2 x tensor 2" in first and "step 12/12" in first
    assert "process 1 of 2" in second and "step" not in second.replace("steps", "")
    return run


def test_two_processes_equal_one(toy: Toy, quick: dict[str, str], tmp_path: Path, undisturbed: RunConfig) -> None:
    run = run_at(toy, tmp_path / "run")
    check_done(started(run, quick, count=1, devices=8))
    assert losses(undisturbed) == pytest.approx(losses(run), rel=1e-5)
    assert complete_steps(undisturbed.run_directory / "checkpoints") == [4, 8, 12]


# Step to train to, processes, devices of each, mesh: 8, 4, 2 and 8 devices.
STAGES = [
    (4, 2, 4, ALL),
    (8, 1, 4, MeshConfig(tensor=4)),
    (10, 2, 1, MeshConfig(fsdp=2)),
    (12, 1, 8, MeshConfig(pipeline=2, tensor=2)),
]


@pytest.mark.long
@pytest.mark.parametrize("stages", [STAGES[2:], STAGES], ids=["2 8", "8 4 2 8"])
def test_resumed_on_other_meshes_and_process_counts(
    toy: Toy, quick: dict[str, str], tmp_path: Path, undisturbed: RunConfig, stages: list[Any]
) -> None:
    """One loss curve, wherever each part of it was computed."""
    for steps, count, devices, mesh in stages:
        run = run_at(toy, tmp_path / "run", mesh, steps=steps)
        check_done(started(run, quick, count, devices))
    training = [line["loss"] for line in lines(run) if "validation" not in line]
    assert training == pytest.approx(
        [line["loss"] for line in lines(undisturbed) if "validation" not in line], rel=1e-5
    )
    assert [line["step"] for line in lines(run) if "validation" not in line] == list(range(1, STEPS + 1))


@pytest.mark.long
def test_a_signal_to_one_stops_all_after_the_same_step(toy: Toy, quick: dict[str, str], tmp_path: Path) -> None:
    run = run_at(toy, tmp_path / "run")
    ended = started(run, quick, own={1: {"AT": "6", "DO": "os.kill(os.getpid(), signal.SIGTERM)"}})
    assert [each.status for each in ended] == [143, 143], ended[0].stderr
    (stopped, *_) = reversed(complete_steps(run.run_directory / "checkpoints"))
    assert stopped == 7


@pytest.mark.long
def test_a_killed_process_ends_the_run_and_repeating_it_loses_nothing(
    toy: Toy, quick: dict[str, str], tmp_path: Path, undisturbed: RunConfig
) -> None:
    run = run_at(toy, tmp_path / "run", step_timeout=15.0)
    first, second = started(run, quick, own={1: {"AT": "7", "DO": "os.kill(os.getpid(), signal.SIGKILL)"}})
    assert second.status == -9
    assert first.status != 0
    assert complete_steps(run.run_directory / "checkpoints") == [4]
    check_done(started(run, quick))
    assert losses(run) == losses(undisturbed)


@pytest.mark.long
def test_a_step_that_hangs_ends_with_a_report_of_who_is_missing(
    toy: Toy, quick: dict[str, str], tmp_path: Path
) -> None:
    run = run_at(toy, tmp_path / "run", step_timeout=10.0)
    first, second = started(run, quick, own={1: {"AT": "6", "DO": "time.sleep(60)"}})
    assert first.status != 0 and second.status != 0
    # Whichever of the two looks at its clock first.
    told = first.stderr + second.stderr
    assert re.search(r"process \d \(host .*\): step 6 has not finished after \d+ s", told)
    assert re.search(r"process \d \(host .*\) was last heard at step 5", told)


@pytest.mark.parametrize("what", [pytest.param("mesh", marks=pytest.mark.long), "missing data"])
def test_a_user_s_mistake_ends_all_with_its_two_lines(
    toy: Toy, quick: dict[str, str], tmp_path: Path, what: str
) -> None:
    run = run_at(toy, tmp_path / "run", MeshConfig(tensor=3) if what == "mesh" else ALL)
    if what == "missing data":
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, train=str(tmp_path / "nothing.index")))
    for each in started(run, quick):
        assert each.status == 2, each.stderr
        assert ("must divide the 8 devices" if what == "mesh" else "nothing.index") in each.stderr
        assert "Traceback" not in each.stderr
    assert not run.run_directory.exists()


def test_processes_with_different_configurations(toy: Toy, quick: dict[str, str], tmp_path: Path) -> None:
    run, other = run_at(toy, tmp_path / "run"), run_at(toy, tmp_path / "run", learning_rate=0.02)
    config = tmp_path / "other.toml"
    config.write_text(to_toml(other))
    swap = f"sys.argv[-1] = {json.dumps(str(config))}"  # what process 1 is started with
    script = COMMAND.replace("main()\n", "exec(os.environ.get('SWAP', ''))\nmain()\n")
    (tmp_path / "run.toml").write_text(to_toml(run))
    variables = {0: quick, 1: quick | {"SWAP": swap}}
    for each in run_processes(script, devices=4, arguments=[tmp_path / "run.toml"], variables=variables):
        assert each.status == 2, each.stderr
        assert "configuration of process 1" in each.stderr and "learning_rate = 0.02" in each.stderr
    assert not run.run_directory.exists()
