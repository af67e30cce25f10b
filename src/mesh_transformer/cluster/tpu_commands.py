"""The command lines of `gcloud` for TPU VMs, and the names that go into them. Nothing is executed here.

Flags, by command:

    describe  https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/describe
    create    https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/create
    delete    https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/delete
    scp       https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/scp
    ssh       https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh
    --format, --project, --quiet: https://cloud.google.com/sdk/gcloud/reference
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence

from mesh_transformer.config import checks
from mesh_transformer.config.errors import ConfigError

ARCHIVE = "mesh-transformer.tar.gz"
HOST_SCRIPT = "host.sh"
_DIRECTORY = "mesh-transformer"  # on a host, in the home directory
_TPU_VM = ("gcloud", "compute", "tpus", "tpu-vm")
# A host that has gone sends no word of it. By ssh_config(5) the connection ends after 4 x 30 s of silence.
_CONNECTION = ("-oServerAliveInterval=30", "-oServerAliveCountMax=4", "-oConnectTimeout=20")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu:
    """Which TPU VM. Without `zone` or `project`, gcloud's own setting (`gcloud config list`) decides.

    Raises:
        ConfigError: a name is none that the cloud takes.
    """

    name: str
    zone: str | None = None
    project: str | None = None

    def __post_init__(self) -> None:
        _check("the TPU's name", self.name, r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", "my-tpu")
        _check("--zone", self.zone, r"[a-z][-a-z0-9]*[a-z0-9]", "us-west4-a")
        _check("--project", self.project, r"[a-z][-a-z0-9.:]*[a-z0-9]", "my-project")

    def __str__(self) -> str:
        return self.name if self.zone is None else f"{self.name} in {self.zone}"

    def ours(self, command: str, *more: str) -> str:
        """What to type to do `command` to this TPU, e.g. `mesh-transformer tpu delete my-tpu --zone us-west4-a`."""
        words = ["mesh-transformer", "tpu", command, self.name]
        words += ["--zone", self.zone] if self.zone else []
        words += ["--project", self.project] if self.project else []
        return shlex.join([*words, *more])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """What to create: accelerator type, TPU software version, and whether the cloud may take it back at any time.

    Raises:
        ConfigError: a name is none that the cloud takes, or both `spot` and `preemptible` are set.
    """

    accelerator_type: str  # https://cloud.google.com/tpu/docs/regions-zones
    version: str  # https://cloud.google.com/tpu/docs/runtimes
    spot: bool = False
    preemptible: bool = False

    def __post_init__(self) -> None:
        _check("--type", self.accelerator_type, r"[a-z0-9][-a-z0-9]*", "v5litepod-8")
        _check("--version", self.version, r"[a-z0-9][-a-z0-9._]*", "v2-alpha-tpuv5-lite")
        if self.spot and self.preemptible:
            raise ConfigError("--spot and --preemptible are two kinds of the same thing; give one of them")

    @property
    def may_be_taken(self) -> bool:
        """Whether the cloud may take it back at any time."""
        return self.spot or self.preemptible


def _check(what: str, value: str | None, pattern: str, example: str) -> None:
    if value is not None and not re.fullmatch(pattern, value):
        raise ConfigError(f"{what} {checks.shown(value)} is no name of that kind; expected for example {example}")


def describe(tpu: Tpu) -> list[str]:
    """Prints the node as JSON."""
    return [*_TPU_VM, "describe", tpu.name, *_where(tpu), "--format=json"]


def create(tpu: Tpu, hardware: Hardware) -> list[str]:
    """Creates it and waits until the cloud has done so or refuses."""
    kind = [flag for flag, wanted in (("--spot", hardware.spot), ("--preemptible", hardware.preemptible)) if wanted]
    what = [f"--accelerator-type={hardware.accelerator_type}", f"--version={hardware.version}"]
    return [*_TPU_VM, "create", tpu.name, *_where(tpu), *what, *kind]


def delete(tpu: Tpu) -> list[str]:
    """Deletes it, its hosts and their disks."""
    return [*_TPU_VM, "delete", tpu.name, *_where(tpu)]


def copy(tpu: Tpu) -> list[str]:
    """Copies the archive in the working directory to the home directory on all hosts."""
    connection = [f"--scp-flag={flag}" for flag in _CONNECTION]
    return [*_TPU_VM, "scp", ARCHIVE, f"{tpu.name}:{ARCHIVE}", *_where(tpu), "--worker=all", *connection]


def install(tpu: Tpu) -> list[str]:
    """Unpacks and installs on all hosts what `copy` copied."""
    unpack = f"mkdir -p {_DIRECTORY} && tar -xzf {ARCHIVE} -C {_DIRECTORY} {HOST_SCRIPT}"
    return _on_all_hosts(tpu, f"{unpack} && {_host_script(['install'])}")


def train(tpu: Tpu, arguments: Sequence[str]) -> list[str]:
    """Runs `mesh-transformer train ARGUMENTS` on all hosts, or follows it where it was begun since `install`."""
    return _on_all_hosts(tpu, _host_script(["train", *arguments]))


def stop(tpu: Tpu) -> list[str]:
    """Ends on all hosts what `train` began; it saves its state."""
    return _on_all_hosts(tpu, _host_script(["stop"]))


def _where(tpu: Tpu) -> list[str]:
    zone = [f"--zone={tpu.zone}"] if tpu.zone else []
    project = [f"--project={tpu.project}"] if tpu.project else []
    return [*zone, *project, "--quiet"]


def _host_script(words: Sequence[str]) -> str:
    return shlex.join(["bash", f"{_DIRECTORY}/{HOST_SCRIPT}", *words])


def _on_all_hosts(tpu: Tpu, command: str) -> list[str]:
    connection = [f"--ssh-flag={flag}" for flag in _CONNECTION]
    return [*_TPU_VM, "ssh", tpu.name, *_where(tpu), "--worker=all", *connection, f"--command={command}"]
