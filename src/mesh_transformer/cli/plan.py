"""`mesh-transformer plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mesh_transformer.config.devices import Device
    from mesh_transformer.config.run import RunConfig
    from mesh_transformer.plan.search import Assumed, Plan

_HERE = "here"
# Lines of the ranking.
_BEST = 10


def plan(
    config: str = typer.Argument(help="A TOML configuration, or the original's JSON as it stands."),
    device: str = typer.Option(
        "tpu-v3", "--device", metavar="NAME", help="A device of the table; a wrong name lists them. here: measured."
    ),
    devices: int | None = typer.Option(
        None,
        "--devices",
        min=1,
        metavar="N",
        help="How many; by default the original's tpu_size, or the mesh's product.",
    ),
    mesh: str | None = typer.Option(
        None, "--mesh", metavar="AXIS=N,...", help="This mesh and no other, for example data=2,tensor=4."
    ),
    serve: bool = typer.Option(False, "--serve", help="Plan inference: weights, cache, tokens per second."),
    batch: int = typer.Option(16, "--batch", min=1, help="With --serve: texts at one time."),
    price: float | None = typer.Option(
        None, "--price-per-device-hour", min=0, metavar="X", help="Shows what the configured steps cost."
    ),
    reach: float = typer.Option(
        0.6, "--products-reach", min=0.01, max=1, metavar="F", help="The part of the peak that products reach."
    ),
    base: str | None = typer.Option(
        None,
        "--base",
        metavar="DTYPE",
        help="With [lora]: the dtype in which the model is stored that is adapted; by default train.param_dtype.",
    ),
    json_: bool = typer.Option(False, "--json", help="As one JSON object."),
    set_: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Override one value. May be repeated."),
) -> None:
    """Say before a run whether it fits, how fast it would be, and which mesh is best; nothing is compiled or run."""
    from mesh_transformer.cli.console import note

    found, n_devices = _devices(device, devices, config)
    run, notes = _load(config, set_, mesh, n_devices)
    if n_devices is None:
        n_devices = _product(run)
    for line in notes:
        note(line)
    assumed = _assumed(reach, base, run, serve)
    if serve:
        _serve(run, found, n_devices, mesh, batch, json_)
    else:
        _train(run, found, n_devices, mesh is not None, price, assumed, json_)


def _devices(name: str, given: int | None, config: str) -> tuple[Device, int | None]:
    """The device, and how many of it; None: as many as the configuration's mesh has."""
    from mesh_transformer.config.devices import device
    from mesh_transformer.config.load import read_config_file

    if name == _HERE:
        from mesh_transformer.cli.session import start_session

        start_session()
        from mesh_transformer.plan.measure import measured

        found, there = measured()
        return found, given or there
    found = device(name)
    if given is None:
        raw, is_legacy = read_config_file(config)
        size = raw.get("tpu_size", raw.get("cores_per_replica", 1)) if is_legacy else None
        given = size if isinstance(size, int) and size > 0 else None
    return found, given


def _load(config: str, set_: list[str], mesh: str | None, n_devices: int | None) -> tuple[RunConfig, list[str]]:
    import dataclasses

    from mesh_transformer.config.load import load_run_config
    from mesh_transformer.config.run import mesh_from_text

    run, notes = load_run_config(config, set_, n_devices=lambda: n_devices or 1)
    if mesh is not None:
        asked = mesh_from_text(mesh)
        kept = {name: getattr(run.mesh, name) for name in ("zero", "shard_sequence")}
        run = dataclasses.replace(run, mesh=dataclasses.replace(asked, **kept))
    return run, notes


def _assumed(reach: float, base: str | None, run: RunConfig, serve: bool) -> Assumed:
    """Raises UserError where `base` is no dtype, or there is no adapter for it to be the base of."""
    from mesh_transformer.config.dtypes import dtype_name
    from mesh_transformer.config.errors import UserError
    from mesh_transformer.plan.search import Assumed

    if base is not None:
        base = dtype_name(base, key="--base")
        if serve:
            raise UserError("--base is for training an adapter, and --serve plans inference\nleave one of them out")
        if run.lora is None:
            raise UserError(
                "--base is the dtype of the model that an adapter rests on, and this configuration has no [lora]\n"
                "leave --base out, or plan an adapter: --set lora.rank=8"
            )
    return Assumed(products_reach=reach, base=base)


def _product(run: RunConfig) -> int:
    return max(1, run.mesh.data) * run.mesh.fsdp * run.mesh.tensor * run.mesh.pipeline


def _train(
    run: RunConfig, device: Device, n: int, only_mesh: bool, price: float | None, assumed: Assumed, as_json: bool
) -> None:
    import json

    from mesh_transformer.config.errors import ConfigError
    from mesh_transformer.plan import search, show
    from mesh_transformer.plan.speed import MEMORY_REACH
    from mesh_transformer.plan.work import adapter_size

    n_adapted = adapter_size(run.model, run.lora) if run.lora else 0  # targets that are none end here
    configured: Plan | None = None
    refused = None
    try:
        configured = search.plan(run, device, n, assumed=assumed)
    except ConfigError as error:
        if only_mesh:
            raise
        refused = str(error)
    plans = search.ranked(run, device, n, only_mesh=only_mesh, assumed=assumed)
    fitting = [one for one in plans if one.fits]
    mends = _mends(run, device, n, configured, plans, assumed)
    if as_json:
        facts = {
            "device": show.device_json(device),
            "devices": n,
            "assumed": {"products_reach": assumed.products_reach, "memory_reach": MEMORY_REACH, "links_hidden": False}
            | ({"base": show.base_of(run, assumed)} if run.lora else {}),
            "configured": show.as_json(configured, price) if configured else {"refused": refused},
            "fits": bool(fitting),
            "best": [show.as_json(one, price) for one in fitting[:_BEST]],
            "mends": mends,
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{run.name} on {n} x {device.name} ({device.source})")
    if run.lora:
        given = "" if assumed.base else " (train.param_dtype; --base names another)"
        typer.echo(
            f"an adapter of {n_adapted:,} parameters is trained; the model rests in {show.base_of(run, assumed)}{given}"
        )
    if configured:
        _print_configured(configured, price)
    else:
        typer.echo(f"as configured: refused: {refused}")
    for line in mends:
        typer.echo(line)
    if fitting:
        typer.echo(f"\nfits, best first ({len(fitting)} of {len(plans)} that divide):")
        show.print_table(show.RANKING, show.ranking_rows(fitting[:_BEST], price))
    typer.echo(
        f"\nAn estimate: products at {assumed.products_reach:.0%} of the peak, memory at {MEMORY_REACH:.0%} of its "
        "bandwidth, links at their full speed, one after the other. docs/planning.md says how far off it was."
    )


def _print_configured(one: Plan, price: float | None) -> None:
    from mesh_transformer.plan import show

    train = one.run.train
    verdict = "fits" if one.fits else f"does not fit: {show.gib(-one.room)} a device too much"
    kernel = "in its plain form" if one.work.scores else "by a kernel"
    typer.echo(
        f"as configured: {show.mesh_text(one)}, remat {train.remat}, accumulation {train.gradient_accumulation}, "
        f"{one.work.dtype} products, attention {kernel}: {verdict}"
    )
    typer.echo(f"\nbytes on a device, fullest in the {one.bytes.moment}:")
    show.print_table(("", ""), show.bytes_rows(one))
    typer.echo("\ntime:")
    show.print_table(("", "", ""), show.time_rows(one))
    typer.echo(f"\n{one.time.tokens_per_second:,.0f} tokens/s, MFU {one.time.mfu:.1%}")
    length, amount = show.days(one), show.cost(one, price)
    if length is None:
        typer.echo("train.epochs says how long: the steps are known once the data is counted, so no days are given")
    else:
        typer.echo(f"{train.steps:,} steps: {length:,.2f} days" + ("" if amount is None else f", cost {amount:,.0f}"))


def _mends(
    run: RunConfig, device: Device, n: int, configured: Plan | None, plans: list[Any], assumed: Assumed
) -> list[str]:
    """What to change where the configuration does not fit, the smallest change first."""
    from mesh_transformer.plan import search, show

    if configured and configured.fits:
        return []
    fitting = [one for one in plans if one.fits]
    if fitting:
        nearest = min(fitting, key=search.nearness)
        changes = " ".join(f"--set {key}={value}" for key, value in nearest.changes.items())
        return [f"smallest change that fits: {changes} ({show.gib(nearest.bytes.total)} a device)"]
    lines = []
    if plans:
        least = min(plans, key=lambda one: one.bytes.total)
        lines.append(
            f"nothing fits on {n} x {device.name}: the smallest plan needs {show.gib(least.bytes.total)} a device "
            f"({show.mesh_text(least)}, remat {least.run.train.remat}, accumulation "
            f"{least.run.train.gradient_accumulation}), {show.gib(-least.room)} more than there is"
        )
    else:
        lines.append(f"no mesh of {n} devices divides this model and its batch of {run.train.batch_size} sequences")
    more = search.more_devices(run, device, n, assumed=assumed)
    if more is not None:
        lines.append(
            f"would fit: {more.work.sizes.n_devices} devices, {show.mesh_text(more)}, batch_size "
            f"{more.run.train.batch_size}, remat {more.run.train.remat} ({show.gib(more.bytes.total)} a device)"
        )
    shorter = search.shorter_sequence(run, device, n, assumed=assumed)
    if shorter is not None:
        lines.append(f"would fit: --set data.sequence_length={shorter}")
    return lines or ["nothing was found that would fit; a smaller model would"]


def _serve(run: RunConfig, device: Device, n: int, mesh: str | None, batch: int, as_json: bool) -> None:
    import json

    from mesh_transformer.plan import serving, show

    weights = ["float32"] if device.maker == "other" else ["bfloat16"]
    pair = None
    if mesh is not None:
        _check_serving_mesh(run)
        pair = (max(1, run.mesh.data), run.mesh.tensor)
    plans = serving.serve_plans(run.model, device, n, batch=batch, mesh=pair, weights=[*weights, *serving.QUANTIZED])
    if as_json:
        facts = {"device": show.device_json(device), "devices": n, "plans": [show.serve_json(one) for one in plans]}
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(
        f"serving {run.name} on {n} x {device.name} ({device.source}), {batch} texts of {run.model.n_ctx} tokens"
    )
    show.print_table(show.SERVING, show.serve_rows(plans))
    typer.echo("\nbytes on a device; tokens per second of all texts together, each reading a whole context")
    if not any(one.fits for one in plans):
        best = min(plans, key=lambda one: one.total)
        typer.echo(
            f"nothing fits: the smallest needs {show.gib(best.total - device.usable)} a device more; "
            + (f"--batch {best.largest_batch} would do" if best.largest_batch else "take more devices")
        )


def _check_serving_mesh(run: RunConfig) -> None:
    from mesh_transformer.config.errors import ConfigError

    for name in ("fsdp", "pipeline"):
        if getattr(run.mesh, name) != 1:
            raise ConfigError(
                f"--mesh with {name} = {getattr(run.mesh, name)} is for training; with --serve a model lies over data "
                "and tensor, for example data=2,tensor=4"
            )
