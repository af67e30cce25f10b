"""`mesh-transformer tpu`."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mesh_transformer.cluster.tpu_commands import Hardware, Tpu

app = typer.Typer(
    help="TPU VMs through Google Cloud's own command line, gcloud.", no_args_is_help=True, rich_markup_mode=None
)

_NAME = typer.Argument(metavar="NAME", help="The TPU's name.")
_ZONE = typer.Option(None, metavar="ZONE", help="Its zone, e.g. us-west4-a. Default: gcloud's own setting.")
_PROJECT = typer.Option(None, metavar="PROJECT", help="Its project. Default: gcloud's own setting.")
_SPOT = typer.Option(False, "--spot", help="A Spot VM: cheaper, and the cloud may take it back at any time.")
_PREEMPTIBLE = typer.Option(False, "--preemptible", help="The older kind of Spot: it lives for a limited time.")
_WAIT = typer.Option(1800.0, min=0, metavar="SECONDS", help="How long to wait until it is ready.")
_DRY_RUN = typer.Option(False, "--dry-run", help="Print the command lines in their order and execute none of them.")


@app.callback()
def tpu() -> None:
    """TPU VMs through Google Cloud's own command line, gcloud."""


@app.command("create")
def create(
    name: str = _NAME,
    type_: str = typer.Option(..., "--type", metavar="TYPE", help="Accelerator type, e.g. v5litepod-8."),
    version: str = typer.Option(..., metavar="VERSION", help="TPU software version, e.g. v2-alpha-tpuv5-lite."),
    zone: str | None = _ZONE,
    project: str | None = _PROJECT,
    spot: bool = _SPOT,
    preemptible: bool = _PREEMPTIBLE,
    wait: float = _WAIT,
    dry_run: bool = _DRY_RUN,
) -> None:
    """Create a TPU and wait until it is ready; one of that name and type that is there is used as it is."""
    from mesh_transformer.cli.console import note
    from mesh_transformer.cluster.tpu import Cloud
    from mesh_transformer.cluster.tpu_commands import Hardware, Tpu
    from mesh_transformer.cluster.tpu_run import plan_create

    which = Tpu(name=name, zone=zone, project=project)
    hardware = Hardware(accelerator_type=type_, version=version, spot=spot, preemptible=preemptible)
    if dry_run:
        return _print_all(plan_create(which, hardware, wait=wait))
    with _interruptible(which):
        Cloud(which, note).create(hardware, wait=wait)


@app.command("status")
def status(name: str = _NAME, zone: str | None = _ZONE, project: str | None = _PROJECT) -> None:
    """Print a TPU's state, health, type and hosts."""
    from mesh_transformer.cli.console import note
    from mesh_transformer.cluster.tpu import Cloud
    from mesh_transformer.cluster.tpu_commands import Tpu

    node = Cloud(Tpu(name=name, zone=zone, project=project), note).require()
    health = f"{node.health} {node.health_description}".rstrip()
    lines = [("state", node.state), ("health", health), ("type", node.accelerator_type), ("version", node.version)]
    lines += [(f"host {n}", " ".join(addresses).rstrip()) for n, addresses in enumerate(node.hosts)]
    for key, value in lines:
        typer.echo(f"{key:9}{value}")


@app.command("run")
def run(
    name: str = _NAME,
    config: str = typer.Argument(metavar="CONFIG", help="What `train` takes: TOML, or the original's JSON."),
    zone: str | None = _ZONE,
    project: str | None = _PROJECT,
    type_: str | None = typer.Option(None, "--type", metavar="TYPE", help="Create it if it is not there: its type."),
    version: str | None = typer.Option(None, metavar="VERSION", help="With --type: the TPU software version."),
    spot: bool = _SPOT,
    preemptible: bool = _PREEMPTIBLE,
    max_restarts: int = typer.Option(
        100, min=0, metavar="N", help="With --spot or --preemptible: how often to create it again and go on."
    ),
    wait: float = _WAIT,
    source: Path | None = typer.Option(
        None, metavar="DIRECTORY", help="The checkout to install on the hosts. Default: the one that runs now."
    ),
    dry_run: bool = _DRY_RUN,
    set_: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="As `train --set`. May be repeated."),
    new: bool = typer.Option(False, "--new", help="As `train --new`, but never after a restart."),
    yes: bool = typer.Option(False, "--yes", help="As `train --yes`."),
    init_from: str | None = typer.Option(None, metavar="MODEL", help="As `train --init-from`; a path on the hosts."),
    fresh_optimizer: bool = typer.Option(False, "--fresh-optimizer", help="As `train --fresh-optimizer`."),
    keep_schedule: bool = typer.Option(False, "--keep-schedule", help="As `train --keep-schedule`."),
    init_step: int | None = typer.Option(None, min=0, metavar="N", help="As `train --init-step`."),
    init_config: str | None = typer.Option(None, metavar="FILE", help="As `train --init-config`; a path on the hosts."),
    profile: int = typer.Option(0, "--profile", min=0, metavar="STEPS", help="As `train --profile`."),
) -> None:
    """Install this project on all hosts of a TPU and train there; with --spot, on a new one when it is taken back."""
    from mesh_transformer.cli.console import note
    from mesh_transformer.cluster import tpu_source
    from mesh_transformer.cluster.tpu import Cloud
    from mesh_transformer.cluster.tpu_commands import Tpu
    from mesh_transformer.cluster.tpu_run import Launcher, Training, plan_run
    from mesh_transformer.config.load import load_run_config

    config = config.removeprefix("file://")
    which = Tpu(name=name, zone=zone, project=project)
    hardware = _hardware(type_, version, spot=spot, preemptible=preemptible)
    training = Training(
        config=config, source=source or tpu_source.default_source(), settings=tuple(set_), new=new, yes=yes,
        init_from=init_from, fresh_optimizer=fresh_optimizer, keep_schedule=keep_schedule, init_step=init_step,
        init_config=init_config, profile=profile,
    )  # fmt: skip
    # A mistake in the configuration is told before anything is created.
    load_run_config(config, set_)
    tpu_source.check_source(training.source)
    directory = tpu_source.directory_on_host(config, training.settings)
    if directory is not None:
        if hardware is not None and hardware.may_be_taken:
            tpu_source.refuse_lost_runs(directory)
        note(f"log.directory = {directory} is on the TPU's own disk: delete the TPU, and the run is lost")
    if dry_run:
        return _print_all(plan_run(which, training, hardware, wait=wait, max_restarts=max_restarts))
    with _interruptible(which):
        cloud = Cloud(which, note)
        launcher = Launcher(
            cloud=cloud, training=training, hardware=hardware, show=typer.echo, wait=wait, max_restarts=max_restarts
        )
        launcher.run()
    note(f"done; {which} costs money until: {which.ours('delete', '--yes')}")


@app.command("delete")
def delete(
    name: str = _NAME,
    zone: str | None = _ZONE,
    project: str | None = _PROJECT,
    yes: bool = typer.Option(False, "--yes", help="Delete it without asking."),
    wait: float = typer.Option(600.0, min=0, metavar="SECONDS", help="How long to wait until it is gone."),
    dry_run: bool = _DRY_RUN,
) -> None:
    """Delete a TPU with all that is on its hosts, and wait until it is gone."""
    from mesh_transformer.cli.console import note
    from mesh_transformer.cluster.tpu import Cloud
    from mesh_transformer.cluster.tpu_commands import Tpu
    from mesh_transformer.cluster.tpu_run import plan_delete
    from mesh_transformer.config.errors import UserError

    which = Tpu(name=name, zone=zone, project=project)
    if dry_run:
        return _print_all(plan_delete(which, wait=wait))
    cloud = Cloud(which, note)
    if not yes:
        raise UserError(f"{which} and all that is on its hosts would be deleted\nadd --yes to delete it")
    with _interruptible(which):
        cloud.delete(wait=wait)


def _hardware(type_: str | None, version: str | None, *, spot: bool, preemptible: bool) -> Hardware | None:
    from mesh_transformer.cluster.tpu_commands import Hardware
    from mesh_transformer.config.errors import ConfigError

    if type_ is not None and version is not None:
        return Hardware(accelerator_type=type_, version=version, spot=spot, preemptible=preemptible)
    given = {"--spot": spot, "--preemptible": preemptible, "--type": type_, "--version": version}
    flags = [flag for flag, value in given.items() if value]
    if flags:
        raise ConfigError(
            f"{flags[0]} says what to create, and that takes both --type and --version\n"
            "add them, e.g. --type v5litepod-8 --version v2-alpha-tpuv5-lite"
        )
    return None


def _print_all(lines: Iterator[str]) -> None:
    for line in lines:
        typer.echo(line)


class _Terminated(KeyboardInterrupt):
    pass


def _on_term(number: int, frame: FrameType | None) -> None:
    raise _Terminated


@contextlib.contextmanager
def _interruptible(which: Tpu) -> Iterator[None]:
    """Ends by SIGINT or SIGTERM with a word on what may be left, and exit status 128 + signal."""
    from mesh_transformer.cli.console import note

    before = signal.signal(signal.SIGTERM, _on_term)
    try:
        yield
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT
        note(
            f"stopped by signal {number}; {which} may exist, and then it costs money\n"
            f"look: {which.ours('status')}\ndelete: {which.ours('delete', '--yes')}"
        )
        raise typer.Exit(128 + number) from stop
    finally:
        signal.signal(signal.SIGTERM, before)
