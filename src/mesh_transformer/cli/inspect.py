"""`mesh-transformer inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from mesh_transformer.cli import model_options

if TYPE_CHECKING:
    from mesh_transformer.checkpoint.weights import Weights


def inspect(
    model: model_options.Model,
    other: str | None = typer.Argument(None, metavar="[OTHER]", help="A second model: list the tensors that differ."),
    digest: bool = typer.Option(False, "--digest", help="Print only the sha256 over all parameters."),
    json_: bool = typer.Option(False, "--json", help="As one JSON object."),
    step: model_options.Step = None,
    config: model_options.Config = None,
) -> None:
    """Say what a model is: format, shapes, parameter count, dtype, step; or how two models differ."""
    from mesh_transformer.cli.session import start_session

    start_session()
    import json

    from mesh_transformer.checkpoint.logical import fingerprint
    from mesh_transformer.checkpoint.models import open_weights
    from mesh_transformer.cli.console import note
    from mesh_transformer.config.errors import UserError

    weights = open_weights(model, step=step, config=config, report=note)
    if other is not None:
        if digest:
            raise UserError("--digest is of one model; leave it out to compare two")
        _compare(weights, open_weights(other, report=note), json_)
        return
    facts = {} if digest and not json_ else _facts(weights)
    if digest:
        from mesh_transformer.checkpoint.weights import stored_bytes

        with _counting("hashing", stored_bytes(weights)) as count:
            facts["digest"] = fingerprint(weights, count).digest
        if not json_:
            typer.echo(facts["digest"])
            return
    if json_:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


def _facts(weights: Weights) -> dict[str, Any]:
    from mesh_transformer.api import tokenizer_of
    from mesh_transformer.evaluate.describe import describe

    tokenizer = tokenizer_of(weights)
    return {
        "path": str(weights.where),
        "format": weights.format,
        "step": weights.step,
        **describe(weights),
        "tokenizer": tokenizer.name if tokenizer else None,
    }


def _print(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if name == "tensors":
            typer.echo("tensors")
            for path, entry in value.items():
                axes = ", ".join(f"{axis} {n}" for axis, n in zip(entry["axes"], entry["shape"], strict=True))
                typer.echo(f"  {path:24} {entry['dtype']:9} {axes}")
        elif isinstance(value, dict):
            typer.echo(name.replace("_", " "))
            for field, setting in value.items():
                typer.echo(f"  {field} = {setting}")
        else:
            shown = f"{value:,}" if isinstance(value, int) else value
            typer.echo(f"{name.replace('_', ' ')}: {shown}")


def _compare(a: Weights, b: Weights, as_json: bool) -> None:
    import dataclasses
    import json

    from mesh_transformer.checkpoint.compare import differences
    from mesh_transformer.config.model import differing_fields
    from mesh_transformer.model.params import count_params

    fields = {name: list(pair) for name, pair in differing_fields(a.cfg, b.cfg).items()}
    with _counting("comparing values", count_params(a.cfg)) as count:
        found = differences(a, b, progress=count)
    if as_json:
        tensors = [dataclasses.asdict(difference) for difference in found]
        typer.echo(json.dumps({"equal": not found and not fields, "model": fields, "tensors": tensors}, indent=2))
        return
    for name, (own, others) in fields.items():
        typer.echo(f"model.{name}: {own} and {others}")
    for difference in found:
        if difference.n_values is None:
            shapes = " and ".join(
                str(s) if s is not None else "absent" for s in (difference.shape_a, difference.shape_b)
            )
            typer.echo(f"{difference.name}: {shapes}")
        else:
            typer.echo(
                f"{difference.name}: {difference.n_different:,} of {difference.n_values:,} values, "
                f"by {difference.largest:.3g} at the most"
            )
    if not found:
        typer.echo("all tensors are equal")


def _counting(stage: str, total: int) -> Any:
    import contextlib
    from collections.abc import Callable, Iterator

    from mesh_transformer.cli.console import StageDisplay

    @contextlib.contextmanager
    def counting() -> Iterator[Callable[[int], None]]:
        done = 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            display.progress(stage, done, total)

        with StageDisplay(in_bytes=stage == "hashing") as display:
            yield count

    return counting()
