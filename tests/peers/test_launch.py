"""`launch` over a local Ray cluster, beside `train` in one process; workers killed, stopped, refused."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh_transformer.cluster import launch as launching
from mesh_transformer.cluster.launch import run_on_workers
from mesh_transformer.cluster.options import ClusterOptions
from mesh_transformer.cluster.platforms import platform_of, worker_environment
from mesh_transformer.cluster.worker import traces
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.train.metrics import read_metrics

pytestmark = pytest.mark.peers

STEPS = 60
SECONDS = 240  # for one launch, on a machine that is busy
ROOT = Path(__file__).parents[2]
TPU_NODE = {"Alive": True, "Labels": {"ray.io/tpu-topology": "4x4", "ray.io/accelerator-type": "TPU-V6E"}}
CONFIGURATION = """
[model]
n_layers = 1
d_model = 16
n_heads = 2
d_ff = 32
n_vocab = 64
n_ctx = 16
d_rotary = 4
[data]
train = "data.tfrecords"
sequence_length = 16
[train]
steps = {steps}
batch_size = 4
learning_rate = 1e-2
checkpoint_every = 5
[mesh]
data = 2
[log]
directory = "runs"
"""


class Place:
    """A configuration with its data, and commands given there."""

    def __init__(self, directory: Path) -> None:
        import numpy as np

        from mesh_transformer.data.tfrecord import write_records

        self.directory = directory
        starts = np.random.default_rng(1).integers(0, 64, (40, 1))
        write_records(directory / "data.tfrecords", (starts + 5 * np.arange(17)) % 64)
        (directory / "toy.toml").write_text(CONFIGURATION.format(steps=STEPS))
        ours = {"JAX_PLATFORMS": "cpu", "MESH_TRANSFORMER_CACHE": str(directory / "cache")}
        two_devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        self.environment = os.environ | ours | two_devices

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "mesh_transformer", *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    def launch(
        self,
        name: str,
        *more: str,
        workers: int = 2,
        meanwhile: Callable[[subprocess.Popen[str]], object] | None = None,
    ) -> tuple[int, str]:
        """Exit status and output of a launch of the run `name`; `meanwhile` is called once it has a checkpoint."""
        arguments = ["launch", "toy.toml", "--workers", str(workers), "--set", f"name={name}", *more]
        with (self.directory / f"{name}.log").open("w+") as log:
            process = subprocess.Popen(
                self.command(*arguments), cwd=self.directory, env=self.environment, stdout=log, stderr=log, text=True
            )
            try:
                if meanwhile is not None:
                    self.wait_for_checkpoint(name, process)
                    meanwhile(process)
                status = process.wait(SECONDS)
            finally:
                process.kill()
                process.wait()
            log.seek(0)
            return status, log.read()

    def wait_for_checkpoint(self, name: str, process: subprocess.Popen[str]) -> None:
        """Until this launch, and not a run before it, has saved something."""
        run, begun = self.directory / "runs" / name, time.time()
        metrics = run / "metrics.jsonl"
        while time.time() < begun + SECONDS and process.poll() is None:
            is_new = False
            with contextlib.suppress(FileNotFoundError):  # --new may remove it at any moment
                is_new = metrics.stat().st_mtime > begun
            if is_new and any(path.name.isdigit() for path in run.glob("checkpoints/*")):
                return
            time.sleep(0.02)
        pytest.fail(f"{name} saved nothing: {(self.directory / f'{name}.log').read_text()}")

    def outcome(self, name: str) -> tuple[str, list[tuple[int, float]]]:
        """Digest of the newest checkpoint, and the loss of every step."""
        run = self.directory / "runs" / name
        shown = self.run("inspect", str(run), "--digest")
        found = re.search(r"\b[0-9a-f]{64}\b", shown.stdout)
        assert found, shown.stderr
        return found[0], [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def reference(place: Place) -> tuple[str, list[tuple[int, float]]]:
    """What `train` makes of it in one process with two devices."""
    done = place.run("train", "toy.toml", "--set", "name=reference")
    assert done.returncode == 0, done.stderr
    return place.outcome("reference")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process of Ray outlives a launch."""
    before = ray_processes()
    yield
    assert not ray_processes() - before


def ray_processes() -> set[int]:
    import psutil

    named = [(p.pid, p.info["name"] or "", p.info["status"]) for p in psutil.process_iter(["name", "status"])]
    alive = [(pid, name) for pid, name, status in named if status != psutil.STATUS_ZOMBIE]
    return {pid for pid, name in alive if name.startswith("ray::") or name in ("raylet", "gcs_server")}


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Process numbers of the training workers of a launch."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    return sorted(p.pid for p in children if "RayTrainWorker" in " ".join(p.cmdline()))


def kill_a_worker(process: subprocess.Popen[str]) -> None:
    os.kill(workers_of(process)[-1], signal.SIGKILL)


def listening(process: subprocess.Popen[str]) -> set[str]:
    """Addresses on which the command and everything below it listens."""
    import psutil

    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    connections = [c for member in family for c in member.net_connections("tcp")]
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def test_two_workers_train_as_one_process_does_and_listen_on_loopback(
    place: Place, reference: tuple[str, list[tuple[int, float]]]
) -> None:
    found: set[str] = set()
    n_workers: list[int] = []

    def look(process: subprocess.Popen[str]) -> None:
        found.update(listening(process))
        n_workers.append(len(workers_of(process)))

    status, output = place.launch("calm", meanwhile=look)
    assert status == 0, output
    assert place.outcome("calm") == reference
    assert n_workers == [2]
    assert found and found <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert re.search(rf"^worker 0: .* step {STEPS}/{STEPS}  loss ", output, re.MULTILINE), output
    assert re.search(r"^worker 1: ", output, re.MULTILINE), output
    assert output.splitlines()[-1] == f"done: step {STEPS}; see {place.directory / 'runs' / 'calm'}"


def test_a_killed_worker_is_replaced_and_new_deletes_only_the_earlier_run(
    place: Place, reference: tuple[str, list[tuple[int, float]]]
) -> None:
    earlier = place.run("train", "toy.toml", "--set", "name=killed", "--set", "seed=1")
    assert earlier.returncode == 0, earlier.stderr
    assert place.outcome("killed") != reference
    status, output = place.launch("killed", "--new", "--yes", meanwhile=kill_a_worker)
    assert status == 0, output
    assert "its process died" in output
    assert "going on from checkpoint" in output
    assert place.outcome("killed") == reference


def test_sigterm_saves_and_the_same_command_goes_on(
    place: Place, reference: tuple[str, list[tuple[int, float]]]
) -> None:
    status, output = place.launch("stopped", meanwhile=lambda process: process.send_signal(signal.SIGTERM))
    assert status == 128 + signal.SIGTERM, output
    saved = re.search(r"stopped by signal 15; step (\d+) is saved", output)
    assert saved, output
    assert 5 <= int(saved[1]) < STEPS
    assert (place.directory / "runs" / "stopped" / "checkpoints" / saved[1]).is_dir()
    done = place.run("train", "toy.toml", "--set", "name=stopped")
    assert done.returncode == 0, done.stderr
    assert place.outcome("stopped") == reference


@pytest.mark.long
def test_failures_are_counted(place: Place) -> None:
    one_device = ("--set", "mesh.data=1", "--max-failures", "0")
    status, output = place.launch("failed", *one_device, workers=1, meanwhile=kill_a_worker)
    assert status == 1, output
    lines = output.splitlines()  # what Ray says of the dead worker may come in between or after
    told = lines.index("error: worker 0: its process died; --max-failures 0 allows no further attempt")
    assert "the same command goes on from the newest checkpoint" in lines[told + 1 :]


@pytest.mark.long
def test_what_a_worker_refuses_is_not_tried_again(place: Place) -> None:
    status, output = place.launch("refused", "--set", "mesh.data=3")
    assert status == 2, output
    told = "error: mesh.data x fsdp x tensor x pipeline = 3 x 1 x 1 x 1 = 3"
    assert any(line.startswith(told) for line in output.splitlines())
    assert output.count("Starting JAX distributed service") == 1
    assert not (place.directory / "runs" / "refused").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "train.steps=0"], "train.steps = 0 is too small"),
        (["--set", "data.train=nowhere.tfrecords"], "nowhere.tfrecords"),
        (["--fresh-optimizer"], "add --init-from MODEL"),
        (["--worker-timeout", "0"], "--worker-timeout"),
        (["--address", "nonsense"], "expected host:port"),
        (["--address", "ray://127.0.0.1:10001"], "expected host:port"),
        (["--address", "127.0.0.1:1"], "nothing answers there"),
    ],
)
def test_mistakes_are_said_before_ray_is_started(place: Place, arguments: list[str], said: str) -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('ray' in sys.modules))\n"
        "from mesh_transformer.cli.main import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "launch", "toy.toml", "--workers", "2", "--set", "name=never", *arguments]
    done = subprocess.run(
        command, cwd=place.directory, env=place.environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "False\n"
    assert said in done.stderr and len(done.stderr.splitlines()) <= 2
    assert not (place.directory / "runs" / "never").exists()


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mesh-transformer\[cluster\]'"):
        run_on_workers(lambda worker: None, ClusterOptions(workers=1), print)


def test_the_platform_is_what_the_cluster_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS")
    options = ClusterOptions(workers=4, devices_per_worker=2)
    tpu = platform_of(options, {"CPU": 8, "GPU": 1, "TPU": 16}, [{"Alive": True, "Labels": {}}, TPU_NODE])
    assert tpu.name == "tpu"
    assert tpu.scaling == {
        "num_workers": 4,
        "use_tpu": True,
        "resources_per_worker": {"TPU": 2},
        "topology": "4x4",
        "accelerator_type": "TPU-V6E",
    }
    gpu = platform_of(options, {"CPU": 8, "GPU": 8}, [])
    assert gpu.name == "gpu"
    assert gpu.scaling == {"num_workers": 4, "use_gpu": True, "resources_per_worker": {"CPU": 1, "GPU": 2}}
    assert platform_of(options, {"CPU": 8}, []).name == "cpu"
    with pytest.raises(ConfigError, match="topology"):
        platform_of(options, {"TPU": 16}, [TPU_NODE | {"Alive": False}])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cpu = platform_of(options, {"GPU": 8, "TPU": 16}, [])
    assert cpu.scaling == {"num_workers": 4, "resources_per_worker": {"CPU": 1}}
    flags = "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2"
    variables = worker_environment(cpu, options, {"XLA_FLAGS": flags})
    assert variables["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_b=2", "--xla_force_host_platform_device_count=2"]
    assert variables["JAX_PLATFORMS"] == "cpu"
    assert "XLA_FLAGS" not in worker_environment(gpu, options, {"XLA_FLAGS": flags})


def test_a_run_is_told_from_its_successor(tmp_path: Path) -> None:
    assert traces(tmp_path) == {}
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    earlier = traces(tmp_path)
    assert len(earlier) == 2
    (tmp_path / "metrics.jsonl").unlink()
    assert traces(tmp_path).items() & earlier.items()  # half deleted is not deleted
    (tmp_path / "checkpoints" / "5").rmdir()
    time.sleep(0.02)
    (tmp_path / "checkpoints" / "5").mkdir()
    assert not traces(tmp_path).items() & earlier.items()
