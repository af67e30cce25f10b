"""A `gcloud` for tests: an executable that notes its arguments and answers from a script."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh_transformer.cluster.tpu import Cloud

Command = Callable[..., tuple[int, str, str]]

_PROGRAM = """#!{python} -SE
import json, os, sys, time
place = {place!r}
words = sys.argv[1:]
assert words[:3] == ["compute", "tpus", "tpu-vm"], words
verb = words[3]
if verb == "ssh":
    verb = words[-1].rpartition("host.sh ")[2].split()[0]
with open(place + "/calls.jsonl", "a") as file:
    file.write(json.dumps([verb, os.getpid(), ["gcloud", *words]]) + "\\n")
with open(place + "/answers.json") as file:
    answers = json.load(file)
script = answers.get(verb, [{{}}])
answer = script[0]
if len(script) > 1:
    del script[0]
    with open(place + "/answers.json", "w") as file:
        json.dump(answers, file)
if answer.get("keep"):
    import shutil
    shutil.copy(words[4], answer["keep"])
print(answer.get("out", ""), end="", flush=True)
print(answer.get("err", ""), end="", file=sys.stderr, flush=True)
time.sleep(answer.get("sleep", 0))
sys.exit(answer.get("status", 0))
"""
MISSING = {
    "err": "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'projects/p/locations/z/nodes/my-tpu' "
    "was not found\n",
    "status": 1,
}
NO_CAPACITY = {
    "err": 'Create request issued for: [my-tpu]\nERROR: (gcloud.compute.tpus.tpu-vm.create) {\n  "code": 8,\n'
    '  "message": "There is no more capacity in the zone \\"us-west4-a\\"; you can try in another zone"\n}\n',
    "status": 1,
}
NO_QUOTA = {
    "err": "ERROR: (gcloud.compute.tpus.tpu-vm.create) RESOURCE_EXHAUSTED: Quota limit "
    "'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-west4-a.\n",
    "status": 1,
}
UNAVAILABLE = {"err": "ERROR: (gcloud.compute.tpus.tpu-vm.describe) UNAVAILABLE: try again\n", "status": 1}
FORBIDDEN = {"err": "ERROR: (gcloud.compute.tpus.tpu-vm.describe) PERMISSION_DENIED: no\n", "status": 1}


def node(state: str = "READY", health: str | None = "HEALTHY", **more: Any) -> dict[str, str]:
    """What `describe` answers about a TPU."""
    raw = {
        "name": "projects/p/locations/us-west4-a/nodes/my-tpu",
        "state": state,
        "acceleratorType": "v5litepod-8",
        "runtimeVersion": "v2-alpha-tpuv5-lite",
        "networkEndpoints": [
            {"ipAddress": "10.0.0.2", "port": 8470, "accessConfig": {"externalIp": "34.1.2.3"}},
            {"ipAddress": "10.0.0.3", "port": 8470},
        ],
        **more,
    }
    return {"out": json.dumps(raw | ({"health": health} if health else {}))}


class FakeGcloud:
    """The executable in `place`/bin. Each command answers with the next of its answers; the last one stays."""

    def __init__(self, place: Path) -> None:
        self.place, self.bin = place, place / "bin"
        self.bin.mkdir(parents=True)
        program = self.bin / "gcloud"
        program.write_text(_PROGRAM.format(python=sys.executable, place=str(place)))
        program.chmod(0o755)
        self._answers: dict[str, list[Any]] = {}
        self.answer()

    def answer(self, **script: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Answers of describe, create, delete, scp, and, on the hosts, install, train, stop."""
        for verb, answers in script.items():
            self._answers[verb] = answers if isinstance(answers, list) else [answers]
        (self.place / "answers.json").write_text(json.dumps(self._answers))

    def _calls(self) -> list[Any]:
        path = self.place / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def verbs(self) -> list[str]:
        """What was called, in order."""
        return [verb for verb, _, _ in self._calls()]

    @property
    def lines(self) -> list[list[str]]:
        """The command lines."""
        return [line for _, _, line in self._calls()]

    @property
    def processes(self) -> list[int]:
        """The number of each call's process."""
        return [process for _, process, _ in self._calls()]


@dataclasses.dataclass
class Clock:
    """Seconds that pass only by sleeping."""

    now: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclasses.dataclass
class Scene:
    """One cloud, what it said and how long that took."""

    gcloud: FakeGcloud
    cloud: Cloud
    clock: Clock
    notes: list[str]
