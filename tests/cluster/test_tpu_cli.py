"""`mesh-transformer tpu` as it is typed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer.main
from fake_gcloud import MISSING, Command, FakeGcloud, node

from mesh_transformer.cli.main import app

HARDWARE = ["--type", "v5litepod-8", "--version", "v2-alpha-tpuv5-lite"]
WHERE = "my-tpu --zone=us-west4-a --quiet"
LOOK = f"gcloud compute tpus tpu-vm describe {WHERE} --format=json"
CREATE = (
    f"gcloud compute tpus tpu-vm create {WHERE} --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite --spot"
)
DELETE = f"gcloud compute tpus tpu-vm delete {WHERE}"


def connection(tool: str) -> str:
    options = ("ServerAliveInterval=30", "ServerAliveCountMax=4", "ConnectTimeout=20")
    return "--worker=all " + " ".join(f"--{tool}-flag=-o{option}" for option in options)


SSH = f"gcloud compute tpus tpu-vm ssh {WHERE} {connection('ssh')}"
COPY = f"gcloud compute tpus tpu-vm scp mesh-transformer.tar.gz my-tpu:mesh-transformer.tar.gz --zone=us-west4-a --quiet {connection('scp')}"  # noqa: E501
INSTALL = f"{SSH} '--command=mkdir -p mesh-transformer && tar -xzf mesh-transformer.tar.gz -C mesh-transformer host.sh && bash mesh-transformer/host.sh install'"  # noqa: E501
TRAIN = f"{SSH} '--command=bash mesh-transformer/host.sh train config/tiny.toml --set train.steps=9"
IF_NONE = "# where there is none, and again where the zone has no capacity:"
READY = "# every 10 s until it is READY and HEALTHY, for at most 60 s in all:"
GONE = "# every 10 s until it is gone, for at most 600 s:"


def test_dry_run_of_create(command: Command, gcloud: FakeGcloud) -> None:
    status, out, _ = command("create", "my-tpu", "--zone", "us-west4-a", *HARDWARE, "--spot", "--wait", 60, "--dry-run")
    assert (status, out.splitlines()) == (0, [LOOK, IF_NONE, CREATE, READY, LOOK])
    assert gcloud.verbs == []


def test_dry_run_of_delete(command: Command, gcloud: FakeGcloud) -> None:
    status, out, _ = command("delete", "my-tpu", "--zone", "us-west4-a", "--dry-run")
    assert (status, out.splitlines()) == (0, [LOOK, DELETE, GONE, LOOK])
    assert gcloud.verbs == []


def test_dry_run_of_run(command: Command, gcloud: FakeGcloud, config: Path) -> None:
    run = ["run", "my-tpu", config, "--zone", "us-west4-a", *HARDWARE, "--spot", "--wait", 60]
    status, out, _ = command(*run, "--set", "train.steps=9", "--new", "--yes", "--max-restarts", 7, "--dry-run")
    source = Path(__file__).parents[2]
    archive = f"# mesh-transformer.tar.gz: the source in {source} and the configuration"
    creation = [IF_NONE, CREATE, READY, LOOK]
    expected = [LOOK, *creation, archive, COPY, INSTALL, f"{TRAIN} --new --yes'"]
    expected += ["# whenever the cloud has taken it back, at most 7 times:", LOOK, DELETE, GONE, LOOK]
    expected += [*creation, archive, COPY, INSTALL, f"{TRAIN}'"]
    assert (status, out.splitlines()) == (0, expected)
    assert gcloud.verbs == []


@pytest.mark.parametrize("hardware", [[], HARDWARE])
def test_what_the_dry_run_says_is_done(command: Command, gcloud: FakeGcloud, config: Path, hardware: list[str]) -> None:
    gcloud.answer(describe=[MISSING, node()] if hardware else node(), train={"out": "[worker 0] step 1\n"})
    run = ["run", "my-tpu", config, "--zone", "us-west4-a", "--project", "my-project", *hardware]
    _, out, _ = command(*run, "--dry-run")
    said = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    status, out, err = command(*run)
    assert status == 0 and out == "[worker 0] step 1\n"
    assert gcloud.lines == said
    delete = "mesh-transformer tpu delete my-tpu --zone us-west4-a --project my-project --yes"
    assert err.splitlines()[-1] == f"done; my-tpu in us-west4-a costs money until: {delete}"


def test_status(command: Command, gcloud: FakeGcloud) -> None:
    gcloud.answer(describe=node(health="UNHEALTHY_MAINTENANCE", healthDescription="soon"))
    status, out, _ = command("status", "my-tpu")
    assert status == 0
    assert out.splitlines() == [
        "state    READY",
        "health   UNHEALTHY_MAINTENANCE soon",
        "type     v5litepod-8",
        "version  v2-alpha-tpuv5-lite",
        "host 0   10.0.0.2 34.1.2.3",
        "host 1   10.0.0.3",
    ]
    assert gcloud.lines == [shlex.split("gcloud compute tpus tpu-vm describe my-tpu --quiet --format=json")]


def test_status_of_none(command: Command, gcloud: FakeGcloud) -> None:
    gcloud.answer(describe=MISSING)
    status, out, err = command("status", "my-tpu")
    assert (status, out) == (2, "") and err.startswith("error: there is no TPU my-tpu\n") and len(err.splitlines()) == 2


def test_create_and_delete(command: Command, gcloud: FakeGcloud) -> None:
    gcloud.answer(describe=[MISSING, node(), node(), MISSING])
    assert command("create", "my-tpu", *HARDWARE)[0] == 0
    assert command("delete", "my-tpu", "--yes")[0] == 0
    assert gcloud.verbs == ["describe", "create", "describe", "describe", "delete", "describe"]


def test_a_failure_is_status_1(command: Command, gcloud: FakeGcloud, config: Path) -> None:
    gcloud.answer(describe=node(), train={"out": "[worker 0] error: no data\n", "status": 2})
    status, _, err = command("run", "my-tpu", config)
    assert status == 1 and err.splitlines()[-1] == "  [worker 0] error: no data"


@pytest.mark.parametrize("flags", [["--spot"], ["--preemptible"], HARDWARE[:2], HARDWARE[2:]])
def test_half_a_hardware_is_refused(command: Command, gcloud: FakeGcloud, config: Path, flags: list[str]) -> None:
    status, _, err = command("run", "my-tpu", config, *flags)
    assert status == 2 and err.startswith(f"error: {flags[0]} says what to create, and that takes both --type and")


def test_deletion_is_asked_for(command: Command, gcloud: FakeGcloud) -> None:
    status, _, err = command("delete", "my-tpu")
    assert status == 2 and "add --yes to delete it" in err
    assert gcloud.verbs == []


def test_a_run_on_the_tpus_own_disk(command: Command, gcloud: FakeGcloud, config: Path) -> None:
    gcloud.answer(describe=node())
    lost = ["--set", "log.directory=runs"]
    status, _, err = command("run", "my-tpu", config, *lost, *HARDWARE, "--spot")
    assert status == 2 and 'log.directory = "runs" is on the TPU\'s own disk' in err and gcloud.verbs == []
    # Nothing is taken back here, so a word is enough.
    status, _, err = command("run", "my-tpu", config, *lost)
    assert status == 0 and err.startswith("log.directory = runs is on the TPU's own disk")


def test_mistakes_are_told_before_anything_is_created(
    command: Command, gcloud: FakeGcloud, config: Path, tmp_path: Path
) -> None:
    for arguments, words in (
        ([tmp_path / "none.toml"], "there is no such file"),
        ([config, "--set", "train.stepz=1"], "train.steps"),
        ([config, "--fresh-optimizer"], "add --init-from MODEL"),
        ([config, "--source", tmp_path], "expected a checkout of mesh-transformer"),
    ):
        status, _, err = command("run", "my-tpu", *arguments)
        assert status == 2 and words in err
    assert gcloud.verbs == []


def test_without_gcloud(command: Command, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for line in (["create", "a", *HARDWARE], ["status", "a"], ["run", "a", config], ["delete", "a", "--yes"]):
        status, _, err = command(*line)
        assert status == 2 and len(err.splitlines()) == 2
        assert err.startswith("error: gcloud, ") and "https://cloud.google.com/sdk/docs/install" in err


def test_every_option_of_train_is_there() -> None:
    commands = typer.main.get_command(app).commands
    ours = {option for parameter in commands["tpu"].commands["run"].params for option in parameter.opts}
    assert {option for parameter in commands["train"].params for option in parameter.opts} <= ours


@pytest.mark.parametrize(("number", "verb"), [(signal.SIGTERM, "create"), (signal.SIGINT, "train")])
def test_a_signal_leaves_a_word_and_no_process(gcloud: FakeGcloud, config: Path, number: int, verb: str) -> None:
    gcloud.answer(describe=[MISSING, node()], **{verb: {"sleep": 60}})
    line = [sys.executable, "-m", "mesh_transformer", "tpu", "run", "my-tpu", str(config), *HARDWARE]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    with process:
        deadline = time.monotonic() + 30
        while verb not in gcloud.verbs and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    # The training on the hosts outlives the connection, so it is ended by a command of its own.
    assert gcloud.verbs[-1] == ("stop" if verb == "train" else verb)
    assert err.splitlines()[-3:] == [
        f"stopped by signal {number}; my-tpu may exist, and then it costs money",
        "look: mesh-transformer tpu status my-tpu",
        "delete: mesh-transformer tpu delete my-tpu --yes",
    ]
    for child in gcloud.processes:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
