"""Plans as JSON and as tables: with lines on a terminal, plain columns elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from mesh_transformer.config.devices import GIB, Device
from mesh_transformer.config.run import RunConfig
from mesh_transformer.plan.search import Assumed, Plan
from mesh_transformer.plan.serving import ServePlan

_DAY = 86_400


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB where there are few."""
    return f"{size / GIB:,.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def base_of(run: RunConfig, assumed: Assumed) -> str:
    """The dtype in which the model rests beside an adapter."""
    return assumed.base or run.train.param_dtype


def mesh_text(one: Plan) -> str:
    """For example "fsdp 8 x tensor 8, zero 3"."""
    mesh, train = one.run.mesh, one.run.train
    text = str(one.work.sizes)
    if one.work.sizes.fsdp > 1:
        text += f", zero {mesh.zero}" + (", per_step" if mesh.zero == 3 and train.gather == "per_step" else "")
    return text + (", shard_sequence" if mesh.shard_sequence and one.work.sizes.tensor > 1 else "")


def as_json(one: Plan, price: float | None) -> dict[str, Any]:
    """A plan for programs; bytes and seconds are of one device, tokens of all."""
    run, time = one.run, one.time
    return {
        "mesh": {**vars(one.work.sizes), "zero": run.mesh.zero, "shard_sequence": run.mesh.shard_sequence},
        "train": {
            "batch_size": run.train.batch_size,
            "gradient_accumulation": run.train.gradient_accumulation,
            "remat": run.train.remat,
            "gather": run.train.gather,
            "compute_dtype": one.work.dtype,
            "param_dtype": run.train.param_dtype,
            "moment_dtype": run.train.moment_dtype,
        },
        "changes": one.changes,
        "fits": one.fits,
        "bytes": {name: round(size) for name, size in one.bytes.categories().items()}
        | {"total": round(one.bytes.total), "usable": round(one.device.usable), "room": round(one.room)},
        "fullest_moment": one.bytes.moment,
        "seconds": {
            "step": time.seconds,
            "products": time.products,
            "memory": time.memory,
            "update": time.update,
            "idle": time.idle,
            "links": time.links,
        },
        "tokens_per_second": time.tokens_per_second,
        "mfu": time.mfu,
        "days": days(one),
        "cost": cost(one, price),
    }


def device_json(device: Device) -> dict[str, Any]:
    """A device for programs."""
    fields = ("name", "memory", "bandwidth", "near", "far", "n_near", "source")
    found = {name: getattr(device, name) for name in fields} | {"flops": dict(device.flops), "usable": device.usable}
    return {key: None if value == float("inf") else value for key, value in found.items()}


def days(one: Plan) -> float | None:
    """For the configured steps; None where the configuration counts epochs."""
    return None if one.run.train.steps is None else one.run.train.steps * one.time.seconds / _DAY


def cost(one: Plan, price: float | None) -> float | None:
    """At so much a device and hour."""
    length = days(one)
    return None if price is None or length is None else length * 24 * one.work.sizes.n_devices * price


def bytes_rows(one: Plan) -> list[list[str]]:
    """Category and bytes."""
    rows = [[name, gib(size)] for name, size in one.bytes.categories().items() if size]
    return [*rows, ["together", gib(one.bytes.total)], ["usable", gib(one.device.usable)]]


def time_rows(one: Plan) -> list[list[str]]:
    """What a step's time goes into, with its part of the whole."""
    time = one.time
    parts = {"products": time.products, "activations in memory": time.memory, "optimizer's update": time.update}
    parts |= {"idle stages": time.idle} | {f"links: {what}": seconds for what, seconds in time.links.items()}
    rows = [[what, f"{seconds:.3g} s", f"{seconds / time.seconds:.0%}"] for what, seconds in parts.items() if seconds]
    return [*rows, ["a step", f"{time.seconds:.3g} s", ""]]


RANKING = ("mesh", "remat", "accumulation", "moments", "memory", "tokens/s", "MFU", "days", "cost")


def ranking_rows(plans: Sequence[Plan], price: float | None) -> list[list[str]]:
    """A line a plan; the last column only with a price."""
    rows = []
    for one in plans:
        train, length, amount = one.run.train, days(one), cost(one, price)
        row = [mesh_text(one), train.remat, str(train.gradient_accumulation), train.moment_dtype]
        row += [gib(one.bytes.total), f"{one.time.tokens_per_second:,.0f}", f"{one.time.mfu:.1%}"]
        row += ["" if length is None else f"{length:,.1f}"]
        rows.append(row + ([] if amount is None else [f"{amount:,.0f}"]))
    return rows


def serve_json(one: ServePlan) -> dict[str, Any]:
    """A plan of inference for programs."""
    return {
        "mesh": {"data": one.sizes.data, "tensor": one.sizes.tensor},
        "weights_as": one.weights_as,
        "batch": one.batch,
        "context": one.context,
        "fits": one.fits,
        "bytes": {
            "weights": round(one.weights),
            "cache": round(one.cache),
            "workspace": round(one.workspace),
            "total": round(one.total),
            "usable": round(one.device.usable),
        },
        "cache_bytes_a_text": round(one.cache_a_text),
        "largest_batch": one.largest_batch,
        "seconds_a_token": one.seconds,
        "tokens_per_second": one.tokens_per_second,
    }


SERVING = ("mesh", "weights", "of weights", "cache", "workspace", "together", "fits", "largest batch", "tokens/s")


def serve_rows(plans: Sequence[ServePlan]) -> list[list[str]]:
    """A line a plan."""
    return [
        [
            str(one.sizes),
            one.weights_as,
            gib(one.weights),
            gib(one.cache),
            gib(one.workspace),
            gib(one.total),
            "yes" if one.fits else "no",
            f"{one.largest_batch:,}",
            f"{one.tokens_per_second:,.0f}",
        ]
        for one in plans
    ]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """On a terminal a table with lines; elsewhere columns with two spaces between."""
    header = header[: max(map(len, rows), default=len(header))]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, show_header=any(header))
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    lines = [list(header), *map(list, rows)] if any(header) else [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
