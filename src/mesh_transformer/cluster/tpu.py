"""One TPU VM: looking at it, creating it, waiting for it, deleting it.

States and health: https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from typing import Any

from mesh_transformer.cluster import gcloud, tpu_commands
from mesh_transformer.cluster.tpu_commands import Hardware, Tpu
from mesh_transformer.config.errors import RunError, UserError

CREATION_SECONDS = 1800.0
DELETION_SECONDS = 600.0
SECONDS_BETWEEN_LOOKS = 10.0
SECONDS_BETWEEN_REQUESTS = 60.0  # to create, where the zone has no capacity
_ANSWER_SECONDS = 120.0
_FAILED_LOOKS = 5  # in a row, before it is believed
_BECOMING_READY = ("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "UNHIDING")
_TAKEN = ("PREEMPTED", "TERMINATED")
# What asking again cannot mend.
_FINAL = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|active account|auth login|find attribute|unrecognized arg"
)
_NO_CAPACITY = re.compile(r"no more capacity|insufficient capacity|not enough capacity", re.IGNORECASE)


class TakenError(RunError):
    """The cloud took the TPU back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """A TPU as the cloud describes it."""

    state: str
    health: str
    health_description: str
    accelerator_type: str
    version: str
    hosts: tuple[tuple[str, str], ...]  # internal and external address of each; "" without one

    @classmethod
    def from_json(cls, text: str) -> Node:
        """From the output of `describe`. Raises ValueError where it is something else."""
        raw: Any = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        ends = raw.get("networkEndpoints", [])
        return cls(
            state=raw.get("state", "STATE_UNSPECIFIED"),
            health=raw.get("health", "HEALTH_UNSPECIFIED"),
            health_description=raw.get("healthDescription", ""),
            accelerator_type=raw.get("acceleratorType", "").rpartition("/")[2],
            version=raw.get("runtimeVersion", ""),
            hosts=tuple((end.get("ipAddress", ""), end.get("accessConfig", {}).get("externalIp", "")) for end in ends),
        )

    @property
    def is_ready(self) -> bool:
        """Whether programs can run on it."""
        return self.state == "READY" and self.health == "HEALTHY"

    @property
    def was_taken(self) -> bool:
        """Whether the cloud took it back."""
        return self.state in _TAKEN

    def __str__(self) -> str:
        health = f"{self.health} ({self.health_description})" if self.health_description else self.health
        return f"{self.state}, {health}" if self.state == "READY" else self.state


class Cloud:
    """What can be done to one TPU. Nothing waits without a bound.

    Args:
        note: is given a line for the person who waits.
        clock, sleep: of seconds.
    """

    def __init__(
        self,
        tpu: Tpu,
        note: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        gcloud.require_gcloud()
        self.tpu, self.note, self.clock, self.sleep = tpu, note, clock, sleep

    def look(self) -> Node | None:
        """The TPU as it is now; None where there is none of that name.

        Raises:
            RunError: gcloud cannot tell, also when asked again.
        """
        for attempt in range(_FAILED_LOOKS):
            if attempt:
                self.sleep(SECONDS_BETWEEN_LOOKS)
            ended = gcloud.ask(tpu_commands.describe(self.tpu), limit=_ANSWER_SECONDS)
            if ended.status == 0:
                try:
                    return Node.from_json(ended.out)
                except ValueError as error:
                    ended = gcloud.Ended(status=0, error=f"its answer is not JSON: {error}")
            elif _is_missing(ended):
                return None
            if _FINAL.search(ended.error):
                break
        raise RunError(f"gcloud cannot describe {self.tpu}: {ended.last_words()}")

    def require(self) -> Node:
        """The TPU as it is now. Raises UserError where there is none of that name."""
        node = self.look()
        if node is None:
            raise UserError(
                f"there is no TPU {self.tpu}\ncheck --zone and --project (what there is: gcloud compute tpus tpu-vm "
                f"list), or create it: {self.tpu.ours('create', '--type', 'TYPE', '--version', 'VERSION')}"
            )
        return node

    def create(self, hardware: Hardware, *, wait: float = CREATION_SECONDS, replace_taken: bool = False) -> Node:
        """Creates it, unless it is there, and waits until it is ready.

        A zone without capacity is asked again.

        Args:
            wait: seconds for both.
            replace_taken: first delete one that the cloud took back; its name is not free before.

        Raises:
            UserError: one of that name exists, of another type or in a state from which it cannot become ready.
            RunError: the cloud refuses, or it is not ready in time, or never will be.
        """
        node = self.look()
        if node is not None and node.was_taken and replace_taken:
            self._delete(node, DELETION_SECONDS)
            node = None
        deadline = self.clock() + wait
        if node is None:
            self._request(hardware, deadline, wait)
        elif node.accelerator_type != hardware.accelerator_type:
            raise UserError(
                f"{self.tpu} exists and is a {node.accelerator_type}, not a {hardware.accelerator_type}\ntake another "
                f"name, or delete it first: {self.tpu.ours('delete', '--yes')}"
            )
        else:
            self._check_existing(node)
        return self._await_ready(deadline, wait)

    def use(self, *, wait: float = CREATION_SECONDS) -> Node:
        """Waits until the one that exists is ready. Raises as `create` does, and UserError where there is none."""
        deadline = self.clock() + wait
        self._check_existing(self.require())
        return self._await_ready(deadline, wait)

    def delete(self, *, wait: float = DELETION_SECONDS) -> None:
        """Deletes it and waits, at most `wait` seconds, until it is gone.

        Raises:
            UserError: there is none.
            RunError: the cloud refuses, or it is still there after that time.
        """
        self._delete(self.require(), wait)

    def _delete(self, node: Node, wait: float) -> None:
        deadline = self.clock() + wait
        if node.state != "DELETING":
            self.note(f"deleting {self.tpu}")
            ended = gcloud.ask(tpu_commands.delete(self.tpu), limit=wait)
            if ended.status != 0 and not _is_missing(ended):
                raise RunError(f"{self.tpu} could not be deleted: {ended.last_words()}\n{self._still_there()}")
        while (left := self.look()) is not None:
            if self.clock() >= deadline:
                raise RunError(f"{self.tpu} is still {left.state} after {wait:.0f} s\n{self._still_there()}")
            self.sleep(SECONDS_BETWEEN_LOOKS)
        self.note(f"{self.tpu} is deleted")

    def _check_existing(self, node: Node) -> None:
        if node.state not in ("READY", "CREATING"):
            raise UserError(
                f"{self.tpu} exists and is {node.state}; expected READY or CREATING\ndelete it first: "
                f"{self.tpu.ours('delete', '--yes')}"
            )
        self.note(f"{self.tpu} exists and is {node.state}; it is used as it is")

    def _request(self, hardware: Hardware, deadline: float, wait: float) -> None:
        while True:
            self.note(f"creating {self.tpu}: {hardware.accelerator_type}, {hardware.version}")
            ended = gcloud.ask(tpu_commands.create(self.tpu, hardware), limit=max(1.0, deadline - self.clock()))
            if ended.status == 0:
                return
            if ended.status is None:
                raise RunError(f"{self.tpu} is not created after {wait:.0f} s\n{self._still_there()}")
            if not _NO_CAPACITY.search(ended.error):
                raise RunError(f"{self.tpu} could not be created: {ended.last_words()}")
            if self.clock() + SECONDS_BETWEEN_REQUESTS > deadline:
                raise RunError(
                    f"{self.tpu} could not be created within {wait:.0f} s: {ended.last_words()}\n"
                    "wait longer (--wait SECONDS), or take another zone or type"
                )
            self.note(f"no capacity in the zone; asking again in {SECONDS_BETWEEN_REQUESTS:.0f} s")
            self.sleep(SECONDS_BETWEEN_REQUESTS)

    def _await_ready(self, deadline: float, wait: float) -> Node:
        said = ""
        while True:
            node = self.look()
            if node is None or node.was_taken:
                what = "is gone" if node is None else f"is {node.state}"
                raise TakenError(f"{self.tpu} {what} before it was ready: the cloud took it back; create it again")
            if node.is_ready:
                self.note(f"{self.tpu} is READY and HEALTHY, {len(node.hosts)} hosts")
                return node
            if node.state not in ("READY", *_BECOMING_READY):
                raise RunError(f"{self.tpu} is {node.state} and will not become READY\n{self._still_there()}")
            if self.clock() >= deadline:
                raise RunError(
                    f"{self.tpu} is {node}, not READY and HEALTHY, after {wait:.0f} s\n{self._still_there()}"
                )
            if str(node) != said:
                said = str(node)
                self.note(f"{self.tpu} is {said}; waiting")
            self.sleep(SECONDS_BETWEEN_LOOKS)

    def _still_there(self) -> str:
        return f"it may cost money until it is deleted: {self.tpu.ours('delete', '--yes')}"


def _is_missing(ended: gcloud.Ended) -> bool:
    # ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'projects/P/locations/Z/nodes/N' was not found
    return ended.status not in (0, None) and "NOT_FOUND" in ended.error
