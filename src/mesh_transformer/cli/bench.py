"""`mesh-transformer bench`."""

from __future__ import annotations

from pathlib import Path

import typer

from mesh_transformer.cli import bench_decode, bench_load, bench_serve

app = typer.Typer(help="Measure, beside a peer in the same run.", no_args_is_help=True, rich_markup_mode=None)
app.command("decode")(bench_decode.decode)
app.command("serve")(bench_serve.serve)
app.command("load")(bench_load.load)


@app.callback()
def bench() -> None:
    """Measure, beside a peer in the same run."""


@app.command("train")
def train(
    preset: str = typer.Option("gpt-j-77m", help="The architecture."),
    against: str = typer.Option(
        "", metavar="hf,torch", help="Peers, separated by commas, that take their steps in turn; torch: hf compiled."
    ),
    dtypes: str = typer.Option("float32,bfloat16", help="Precisions, separated by commas."),
    batch_size: int = typer.Option(8, min=1, help="Sequences a step."),
    sequence_length: int = typer.Option(0, min=0, help="Default: the architecture's context."),
    rounds: int = typer.Option(5, min=1, help="Counted steps of each contender."),
    warmup: int = typer.Option(1, min=0, help="Steps of each before counting begins."),
    json_: bool = typer.Option(False, "--json", help="The whole result as JSON on standard output."),
    out: Path | None = typer.Option(None, help="Write the JSON to this file too."),
) -> None:
    """Training speed: tokens a second, model FLOP/s, share of a bare matrix product, ratios to peers."""
    from mesh_transformer.bench.train import bench_train
    from mesh_transformer.cli.bench_output import finish, listed
    from mesh_transformer.cli.console import note
    from mesh_transformer.config.dtypes import dtype_name
    from mesh_transformer.config.presets import preset as preset_named

    model = preset_named(preset)
    result = bench_train(
        model,
        batch_size=batch_size,
        sequence_length=sequence_length or model.n_ctx,
        dtypes=[dtype_name(d) for d in dtypes.split(",")],
        against=listed(against),
        rounds=rounds,
        warmup=warmup,
        progress=note,
    )
    if finish(result, json_, out):
        return
    for name, figures in result["contenders"].items():
        rate, flops = figures["tokens_per_second"], figures["model_flops_per_second"]["median"]
        typer.echo(
            f"{name:16} {rate['median']:9,.0f} tokens/s ({rate['min']:,.0f} to {rate['max']:,.0f})  "
            f"{flops / 1e9:7,.0f} GFLOP/s  {figures['share_of_matmul']:.0%} of a bare product"
        )
    for name, ratio in result["ratios"].items():
        typer.echo(f"{name}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
