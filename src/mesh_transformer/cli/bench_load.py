"""`mesh-transformer bench load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from mesh_transformer.cli import model_options


def load(
    model: str | None = typer.Argument(None, help="The model to serve; leave it out with --url."),
    url: str | None = typer.Option(None, help="A server that runs already, as http://127.0.0.1:8000."),
    clients: int = typer.Option(64, min=1, help="Streaming clients at once."),
    seconds: float = typer.Option(300.0, min=0.1, help="How long they go on asking."),
    vanish: float = typer.Option(0.1, min=0, max=1, help="Share of requests whose client goes away in mid-stream."),
    seed: int = typer.Option(0, min=0, help="The same seed asks the same requests."),
    prompt_tokens: str | None = typer.Option(
        None, metavar="LOW-HIGH", help="Default: 4 to half of the context; with --url 4-64."
    ),
    output_tokens: str | None = typer.Option(None, metavar="LOW-HIGH", help="Default: as --prompt-tokens."),
    timeout: float = typer.Option(120.0, min=1, help="Seconds after which a request has failed."),
    one_by_one: bool = typer.Option(False, "--one-by-one", help="Compare with the same server, one request at a time."),
    against: str = typer.Option("", metavar="hf", help="Compare with a server of Hugging Face's generate."),
    rounds: int = typer.Option(3, min=1, help="Turns of each contender of the comparison."),
    compare_seconds: float = typer.Option(20.0, min=0.1, help="Length of a turn."),
    max_batch: int | None = typer.Option(None, help="Of the server."),
    max_queue: int | None = typer.Option(None, help="Of the server."),
    dtype: model_options.Dtype = None,
    quantize: model_options.Quantize = None,
    mesh: model_options.Mesh = None,
    tokenizer: model_options.Tokenizer = None,
    step: model_options.Step = None,
    config: model_options.Config = None,
    json_: bool = typer.Option(False, "--json", help="The whole result as JSON on standard output."),
    out: Path | None = typer.Option(None, help="Write the JSON to this file too."),
) -> None:
    """A server under load: failures, times to tokens, tokens a second, memory. A key is read from the environment."""
    import json

    from mesh_transformer.bench.load import LoadOptions
    from mesh_transformer.bench.load_run import Asked, run_load
    from mesh_transformer.cli.console import note
    from mesh_transformer.config.errors import RunError

    options = LoadOptions(
        clients=clients,
        seconds=seconds,
        timeout=timeout,
        rounds=rounds,
        compare_seconds=compare_seconds,
        one_by_one=one_by_one,
    )
    of_model = {"--tokenizer": tokenizer, "--step": step, "--config": config}
    of_server = {"--max-batch": max_batch, "--max-queue": max_queue, "--dtype": dtype}
    of_server |= {"--quantize": quantize, "--mesh": mesh}
    result = run_load(
        Asked(
            model=model,
            url=url,
            against=tuple(peer for peer in against.split(",") if peer),
            vanish=vanish,
            seed=seed,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            of_model=_given(of_model),
            of_server=_given(of_server),
        ),
        options,
        note,
    )
    text = json.dumps(result, indent=2)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    if json_:
        typer.echo(text)
    else:
        _print(result)
    if result["faults"]:
        raise RunError("the server did not bear the load: " + "; ".join(result["faults"]))


def _given(options: dict[str, Any]) -> tuple[str, ...]:
    """The words of a command line for those options that were given."""
    return tuple(word for name, value in options.items() if value is not None for word in (name, str(value)))


def _print(result: dict[str, Any]) -> None:
    load = result["load"]
    typer.echo(
        f"{load['requests']:,} requests in {load['seconds']:.0f} s: {load['done']:,} done, "
        f"{load['vanished']:,} vanished, {load['refused']:,} refused, {load['failed']:,} failed"
    )
    typer.echo(f"{load['tokens_per_second']:,.0f} output tokens/s")
    for name in ("time_to_first_token", "time_per_token", "time_between_pieces"):
        if figures := load[name]:
            p50, p99, largest = (1000 * figures[k] for k in ("p50", "p99", "max"))
            typer.echo(f"{name.replace('_', ' ')}: p50 {p50:,.1f} ms, p99 {p99:,.1f} ms, largest {largest:,.1f} ms")
    if memory := load["memory"]:
        first, last = (memory[k] / 2**20 for k in ("first_fifth", "last_fifth"))
        typer.echo(
            f"resident memory: {first:,.0f} MiB in the first fifth, {last:,.0f} in the last: "
            + ("flat" if memory["flat"] else "not flat")
        )
    if comparison := result["comparison"]:
        for name, rate in comparison["tokens_per_second"].items():
            typer.echo(f"{name:16} {rate['median']:9,.0f} tokens/s ({rate['min']:,.0f} to {rate['max']:,.0f})")
        for name, ratio in comparison["ratios"].items():
            typer.echo(f"{name}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
