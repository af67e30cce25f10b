"""`mesh-transformer bench serve`."""

from __future__ import annotations

from pathlib import Path

import typer

from mesh_transformer.cli import model_options


def serve(
    model: str | None = typer.Argument(None, help="The model; leave it out for random weights of --preset."),
    preset: str | None = typer.Option(None, help="The architecture; default: gpt-j-77m."),
    texts: int = typer.Option(64, min=1, help="Texts, all there from the beginning."),
    prompt_tokens: str = typer.Option("4-64", metavar="LOW-HIGH", help="Tokens of a prompt."),
    output_tokens: str = typer.Option("4-64", metavar="LOW-HIGH", help="Tokens written after it."),
    max_batch: int = typer.Option(16, min=1, help="Texts computed together."),
    precisions: str = typer.Option("float32,bfloat16,int8,int4", help="Ours, separated by commas."),
    against: str = typer.Option(
        "", metavar="hf,ctranslate2", help="Peers, separated by commas, each in every precision that it has."
    ),
    step: model_options.Step = None,
    config: model_options.Config = None,
    rounds: int = typer.Option(3, min=1, help="Counted turns of each contender."),
    warmup: int = typer.Option(1, min=0, help="Turns of each before counting begins."),
    json_: bool = typer.Option(False, "--json", help="The whole result as JSON on standard output."),
    out: Path | None = typer.Option(None, help="Write the JSON to this file too."),
) -> None:
    """Speed of the engine behind `serve`, without HTTP: tokens a second of many texts, time to the first token."""
    from mesh_transformer.bench.load_plan import Span
    from mesh_transformer.bench.load_server import stopped_by_sigterm
    from mesh_transformer.bench.serve import bench_serve
    from mesh_transformer.cli.bench_output import chosen_model, finish, listed
    from mesh_transformer.cli.console import note

    chosen, options = chosen_model(model, preset, "gpt-j-77m", {"--step": step, "--config": config})
    prompt, output = Span.of(prompt_tokens, "--prompt-tokens"), Span.of(output_tokens, "--output-tokens")
    with stopped_by_sigterm():
        result = bench_serve(
            chosen,
            texts=texts,
            prompt_tokens=(prompt.low, prompt.high),
            output_tokens=(output.low, output.high),
            max_batch=max_batch,
            precisions=listed(precisions),
            against=listed(against),
            rounds=rounds,
            warmup=warmup,
            progress=note,
            options=options,
        )
    if finish(result, json_, out):
        return
    for name, figures in result["contenders"].items():
        rate, first = figures["tokens_per_second"], figures["first_token_seconds"]
        typer.echo(
            f"{name:36} {rate['median']:8,.1f} tokens/s ({rate['min']:,.1f} to {rate['max']:,.1f})  "
            f"first token after {first['median']:.2f} s (largest {first['max']:.2f})"
        )
    for name, ratio in result["ratios"].items():
        typer.echo(f"{name}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
