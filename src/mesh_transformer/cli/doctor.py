"""`mesh-transformer doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mesh_transformer.doctor import Finding


def doctor(
    config: str | None = typer.Argument(None, help="A run's configuration; without it the environment alone."),
    set_: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Override one value of CONFIG, as `train` does. May be repeated."
    ),
    init_from: str | None = typer.Option(
        None, "--init-from", metavar="MODEL", help="The model that the run is to begin from."
    ),
    init_step: int | None = typer.Option(None, "--init-step", min=0, metavar="N", help="As `train` has it."),
    init_config: str | None = typer.Option(None, "--init-config", metavar="FILE", help="As `train` has it."),
    port: int | None = typer.Option(None, min=1, max=65535, help="A port that `serve` is to have."),
    host: str = typer.Option("127.0.0.1", help="The address that `serve` is to listen at; for --port."),
    storage: list[str] = typer.Option(
        [], "--storage", metavar="PLACE", help="A directory or URL (gs://, s3://) to write to, read and delete."
    ),
    json_: bool = typer.Option(False, "--json", help="As one JSON object."),
) -> None:
    """Check environment, storage, data, checkpoint and configuration before a run; name each fault with its mend.

    Exit status: 0 if nothing failed (warnings do not count), 1 if a check failed, one that CONFIG cannot be read
    included; 2 if the options are wrong.
    """
    from mesh_transformer import compat

    compat.prepare_process()
    from mesh_transformer.cli.train import begin_from_options
    from mesh_transformer.config.errors import UserError
    from mesh_transformer.doctor import Options, examine

    given = {"--set": set_, "--init-from": init_from, "--init-step": init_step, "--init-config": init_config}
    useless = [flag for flag, value in given.items() if value]
    if config is None and useless:
        raise UserError(f"{useless[0]} is of a run, and no CONFIG is given\nadd it: mesh-transformer doctor CONFIG ...")
    options = Options(
        config=config,
        overrides=set_,
        init_from=begin_from_options(
            init_from, fresh_optimizer=False, keep_schedule=False, step=init_step, config=init_config
        ),
        port=port,
        host=host,
        storage=storage,
    )
    found: list[Finding] = []
    for finding in examine(options):
        found.append(finding)
        if not json_:
            _print(finding)
    counts = {status: sum(each.status == status for each in found) for status in ("ok", "warning", "failed")}
    if json_:
        _print_json(found, counts)
    else:
        plural = "" if counts["warning"] == 1 else "s"
        typer.echo(f"{counts['failed']} failed, {counts['warning']} warning{plural}, {counts['ok']} ok")
    if counts["failed"]:
        raise typer.Exit(1)


def _print(finding: Finding) -> None:
    typer.echo(f"{finding.status:8} {finding.name}: {finding.message}")
    if finding.mend:
        typer.echo(f"{'':8} mend: {finding.mend}")


def _print_json(found: list[Finding], counts: dict[str, int]) -> None:
    import dataclasses
    import json

    checks = [dataclasses.asdict(finding) for finding in found]
    typer.echo(json.dumps({"ok": not counts["failed"], "counts": counts, "checks": checks}, indent=2))
