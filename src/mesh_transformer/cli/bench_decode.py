"""`mesh-transformer bench decode`."""

from __future__ import annotations

from pathlib import Path

import typer

from mesh_transformer.cli import model_options


def decode(
    model: str | None = typer.Argument(None, help="The model; leave it out for random weights of --preset."),
    preset: str | None = typer.Option(None, help="The architecture; default: gpt-j-77m."),
    batch: int = typer.Option(1, min=1, help="Texts written together."),
    prompt: int = typer.Option(32, min=1, help="Tokens of each prompt."),
    tokens: int = typer.Option(128, min=2, help="Tokens written after it."),
    precisions: str = typer.Option("float32,bfloat16,int8,int4", help="Ours, separated by commas."),
    against: str = typer.Option(
        "", metavar="hf,ctranslate2,torch", help="Peers, separated by commas, each in every precision that it has."
    ),
    step: model_options.Step = None,
    config: model_options.Config = None,
    rounds: int = typer.Option(5, min=1, help="Counted turns of each contender."),
    warmup: int = typer.Option(1, min=1, help="Turns of each before counting begins; peers choose their way in them."),
    json_: bool = typer.Option(False, "--json", help="The whole result as JSON on standard output."),
    out: Path | None = typer.Option(None, help="Write the JSON to this file too."),
) -> None:
    """Speed of writing: tokens a second, share of the memory's bandwidth, ratios to peers."""
    from mesh_transformer.bench.decode import bench_decode
    from mesh_transformer.bench.load_server import stopped_by_sigterm
    from mesh_transformer.cli.bench_output import chosen_model, finish, listed
    from mesh_transformer.cli.console import note

    chosen, options = chosen_model(model, preset, "gpt-j-77m", {"--step": step, "--config": config})
    with stopped_by_sigterm():
        result = bench_decode(
            chosen,
            batch=batch,
            prompt=prompt,
            tokens=tokens,
            precisions=listed(precisions),
            against=listed(against),
            rounds=rounds,
            warmup=warmup,
            progress=note,
            options=options,
        )
    if finish(result, json_, out):
        return
    readable = result["read_bytes_per_second"]["median"]
    typer.echo(f"memory is read at {readable / 1e9:.1f} GB/s")
    for name, figures in result["contenders"].items():
        rate, decoded, share = (
            figures[k] for k in ("tokens_per_second", "decoded_tokens_per_second", "share_of_bandwidth")
        )
        line = f"{name:36} {rate['median']:8,.1f} tokens/s ({rate['min']:,.1f} to {rate['max']:,.1f})"
        if decoded is not None:
            line += f"  {decoded:8,.1f} without the prompt, {share:.0%} of the bandwidth"
        typer.echo(line)
    best = result["best"]
    for group in ("ours", "ours without native kernels"):
        if group in best and "peers" in best:
            ratio = result["ratios"][f"{best[group]} over {best['peers']}"]
            typer.echo(
                f"{best[group]} over {best['peers']}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            )
