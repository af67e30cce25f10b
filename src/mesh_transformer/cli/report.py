"""`mesh-transformer report`."""

from __future__ import annotations

import typer


def report(
    run: str = typer.Argument(help="A run directory: <log.directory>/<name>."),
    out: str | None = typer.Option(None, "--out", metavar="FILE", help="Default: report.html in the run directory."),
    base: str | None = typer.Option(
        None,
        "--base",
        metavar="MODEL",
        help="What to compare with; default: the model that the run began from, else its earliest checkpoint.",
    ),
    prompt: list[str] = typer.Option(
        [], "--prompt", metavar="TEXT", help="A beginning for both to continue. May be repeated."
    ),
    rows: int = typer.Option(16, "--rows", min=1, help="Sequences to look at of the training data and each set."),
    dtype: str | None = typer.Option(None, "--dtype", help="float32, bfloat16 or float16; default: weights as stored."),
) -> None:
    """Write one HTML page about a run: curves, samples and losses before and after, what moved, what was memorised."""
    from mesh_transformer.cli.session import start_session

    start_session()
    from mesh_transformer.cli.console import note
    from mesh_transformer.report.make import ReportOptions, write_report

    options = ReportOptions(base=base, prompts=tuple(prompt), rows=rows, dtype=dtype)
    typer.echo(write_report(run, out, options, note))
