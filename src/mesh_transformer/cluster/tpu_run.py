"""A training on all hosts of a TPU, begun again on a new one when the cloud takes the TPU back.

`plan_create`, `plan_run` and `plan_delete` give the same command lines without executing any.
"""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mesh_transformer.cluster import gcloud, tpu_commands, tpu_source
from mesh_transformer.cluster.tpu import (
    CREATION_SECONDS,
    DELETION_SECONDS,
    SECONDS_BETWEEN_LOOKS,
    Cloud,
    TakenError,
)
from mesh_transformer.cluster.tpu_commands import ARCHIVE, Hardware, Tpu
from mesh_transformer.config.errors import ConfigError, RunError

_INSTALLATION_SECONDS = 1800.0
_STOP_SECONDS = 600.0
# After a failure: how long the cloud may take to say that it took the TPU back.
_GRACE_SECONDS = 90.0
_CONNECTION_LOST = 255  # ssh's own exit status
_WRONG_INPUT = 2  # the exit status of a mistake in the configuration, which no other TPU mends


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What to train: CONFIG and options of `mesh-transformer train`. Paths in options are those of the hosts.

    Raises:
        ConfigError: an option needs another one.
    """

    config: str  # a file here, which is copied to the hosts, or a URL, which is not
    source: Path  # a checkout of this project
    settings: tuple[str, ...] = ()  # --set
    new: bool = False
    yes: bool = False
    init_from: str | None = None
    fresh_optimizer: bool = False
    keep_schedule: bool = False
    init_step: int | None = None
    init_config: str | None = None
    profile: int = 0

    def __post_init__(self) -> None:
        if self.init_from is None and (given := [flag for flag, value in self._init_options() if value]):
            raise ConfigError(f"{given[0]} says how to begin from a model, and none is given\nadd --init-from MODEL")

    def arguments(self, *, is_first: bool) -> list[str]:
        """The arguments of `train` on a host. Only the first attempt may delete an earlier run."""
        words = [tpu_source.remote_config(self.config)]
        for setting in self.settings:
            words += ["--set", setting]
        words += ["--new"] * (self.new and is_first) + ["--yes"] * (self.yes and is_first)
        words += ["--profile", str(self.profile)] if self.profile else []
        if self.init_from is not None:
            words += ["--init-from", self.init_from]
            for flag, value in self._init_options():
                words += [] if not value else [flag] if value is True else [flag, value]
        return words

    def _init_options(self) -> list[tuple[str, str | bool]]:
        step = "" if self.init_step is None else str(self.init_step)
        options: list[tuple[str, str | bool]] = [("--fresh-optimizer", self.fresh_optimizer)]
        options += [("--keep-schedule", self.keep_schedule), ("--init-step", step)]
        return [*options, ("--init-config", self.init_config or "")]


class StepError(RunError):
    """A command on the hosts failed."""

    def __init__(self, message: str, *, what: str, status: int | None) -> None:
        super().__init__(message)
        self.what, self.status = what, status


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launcher:
    """Runs a training. `hardware` None: the TPU exists and is never created."""

    cloud: Cloud
    training: Training
    hardware: Hardware | None = None
    show: Callable[[str], None] = print  # is given every line of the hosts' output
    wait: float = CREATION_SECONDS  # seconds, for every creation
    max_restarts: int = 100

    def run(self) -> None:
        """Trains to the end.

        Raises:
            UserError: the TPU cannot be used.
            RunError: a step failed, or the TPU was taken more than `max_restarts` times.
            KeyboardInterrupt: after the training on the hosts has ended and saved its state.
        """
        restarts = 0
        has_begun = False
        while True:
            try:
                self._prepare()
                is_first, has_begun = not has_begun, True
                return self._train(is_first=is_first)
            except (TakenError, StepError) as error:
                if self.hardware is None or not self.hardware.may_be_taken or not self._was_taken(error):
                    raise
            restarts += 1
            if restarts > self.max_restarts:
                raise RunError(
                    f"{self.cloud.tpu} was taken back {restarts} times; --max-restarts allows {self.max_restarts}\n"
                    "the same command goes on from the newest checkpoint"
                )
            self.cloud.note(f"{self.cloud.tpu} was taken back; restart {restarts} of at most {self.max_restarts}")

    def _prepare(self) -> None:
        if self.hardware is None:
            self.cloud.use(wait=self.wait)
        else:
            self.cloud.create(self.hardware, wait=self.wait, replace_taken=self.hardware.may_be_taken)
        tpu = self.cloud.tpu
        with tempfile.TemporaryDirectory(prefix="mesh-transformer-") as name:
            tpu_source.make_archive(self.training.source, self.training.config, Path(name, ARCHIVE))
            self._step("copying", tpu_commands.copy(tpu), directory=Path(name), limit=_INSTALLATION_SECONDS)
        self._step("installing", tpu_commands.install(tpu), limit=_INSTALLATION_SECONDS)

    def _train(self, *, is_first: bool) -> None:
        try:
            self._step("training", tpu_commands.train(self.cloud.tpu, self.training.arguments(is_first=is_first)))
        except KeyboardInterrupt:
            self.cloud.note("ending the training on the hosts, which saves its state; once more: leave it running")
            if gcloud.follow(tpu_commands.stop(self.cloud.tpu), self.show, limit=_STOP_SECONDS).status != 0:
                self.cloud.note("the hosts did not confirm it: the training may still run")
            raise

    def _step(
        self, what: str, command: list[str], *, directory: Path | None = None, limit: float | None = None
    ) -> None:
        self.cloud.note(f"{what} on all hosts of {self.cloud.tpu}")
        ended = gcloud.follow(command, self.show, directory=directory, limit=limit)
        if ended.status == 0:
            return
        if ended.status is None:
            how = f"took longer than {limit:.0f} s"
        elif ended.status == _CONNECTION_LOST:
            how = "lost the connection (exit status 255), and may go on there"
        else:
            how = f"ended with exit status {ended.status}"
        last = ended.out.replace("\n", "\n  ")
        raise StepError(
            f"{what} on {self.cloud.tpu} {how}; the TPU costs money until: "
            f"{self.cloud.tpu.ours('delete', '--yes')}\nthe last lines:\n  {last}",
            what=what,
            status=ended.status,
        )

    def _was_taken(self, error: TakenError | StepError) -> bool:
        if isinstance(error, TakenError):
            return True
        if error.status == _WRONG_INPUT:
            return False
        self.cloud.note(f"{error.what} failed; looking for {_GRACE_SECONDS:.0f} s whether the TPU was taken back")
        deadline = self.cloud.clock() + _GRACE_SECONDS
        while True:
            node = self.cloud.look()
            if node is None or node.was_taken:
                return True
            if node.state == "DELETING":
                raise RunError(f"{self.cloud.tpu} is being deleted, so it is not created again") from error
            if self.cloud.clock() >= deadline:
                return False
            self.cloud.sleep(SECONDS_BETWEEN_LOOKS)


def plan_create(tpu: Tpu, hardware: Hardware, *, wait: float) -> Iterator[str]:
    """The command lines of `Cloud.create`, with what happens between them."""
    yield _line(tpu_commands.describe(tpu))
    yield from _creation(tpu, hardware, wait)


def plan_delete(tpu: Tpu, *, wait: float) -> Iterator[str]:
    """The command lines of `Cloud.delete`."""
    yield _line(tpu_commands.describe(tpu))
    yield _line(tpu_commands.delete(tpu))
    yield f"# every {SECONDS_BETWEEN_LOOKS:.0f} s until it is gone, for at most {wait:.0f} s:"
    yield _line(tpu_commands.describe(tpu))


def plan_run(
    tpu: Tpu, training: Training, hardware: Hardware | None, *, wait: float, max_restarts: int
) -> Iterator[str]:
    """The command lines of `Launcher.run`."""
    yield _line(tpu_commands.describe(tpu))
    if hardware is None:
        yield from _readiness(tpu, wait)
    else:
        yield from _creation(tpu, hardware, wait)
    yield from _work(tpu, training, is_first=True)
    if hardware is not None and hardware.may_be_taken:
        yield f"# whenever the cloud has taken it back, at most {max_restarts} times:"
        yield from plan_delete(tpu, wait=DELETION_SECONDS)
        yield from _creation(tpu, hardware, wait)
        yield from _work(tpu, training, is_first=False)


def _creation(tpu: Tpu, hardware: Hardware, wait: float) -> Iterator[str]:
    yield "# where there is none, and again where the zone has no capacity:"
    yield _line(tpu_commands.create(tpu, hardware))
    yield from _readiness(tpu, wait)


def _readiness(tpu: Tpu, wait: float) -> Iterator[str]:
    yield f"# every {SECONDS_BETWEEN_LOOKS:.0f} s until it is READY and HEALTHY, for at most {wait:.0f} s in all:"
    yield _line(tpu_commands.describe(tpu))


def _work(tpu: Tpu, training: Training, *, is_first: bool) -> Iterator[str]:
    yield f"# {ARCHIVE}: the source in {training.source} and the configuration"
    yield _line(tpu_commands.copy(tpu))
    yield _line(tpu_commands.install(tpu))
    yield _line(tpu_commands.train(tpu, training.arguments(is_first=is_first)))


def _line(command: list[str]) -> str:
    return shlex.join(command)
