"""`mesh-transformer generate`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mesh_transformer.cli import model_options

if TYPE_CHECKING:
    from mesh_transformer.api import Model
    from mesh_transformer.sample.options import SamplingOptions


def generate(
    model: model_options.Model,
    prompt: list[str] = typer.Option([], "--prompt", metavar="TEXT", help="May be repeated."),
    prompt_file: Path | None = typer.Option(None, "--prompt-file", metavar="FILE", help="A whole file as one prompt."),
    max_tokens: int = typer.Option(256, help="Tokens of each completion at the most."),
    temperature: float = typer.Option(1.0, help="0 is greedy."),
    top_p: float = typer.Option(1.0, help="Probability mass of the candidates kept."),
    top_k: int = typer.Option(0, help="Candidates kept; 0 keeps all."),
    min_tokens: int = typer.Option(0, help="Holds end-of-text off until then."),
    ignore_eos: bool = typer.Option(False, "--ignore-eos", help="Go on past end-of-text."),
    seed: int = typer.Option(0, help="The same seed writes the same text."),
    samples: int = typer.Option(1, help="Completions of each prompt."),
    stop: list[str] = typer.Option([], "--stop", metavar="S", help="Text that ends a completion. May be repeated."),
    stream: bool = typer.Option(False, "--stream", help="Write the text as it comes (one prompt, one sample)."),
    json_: bool = typer.Option(False, "--json", help="One JSON object a completion."),
    dtype: model_options.Dtype = None,
    quantize: model_options.Quantize = None,
    tokenizer: model_options.Tokenizer = None,
    step: model_options.Step = None,
    mesh: model_options.Mesh = None,
    config: model_options.Config = None,
) -> None:
    """Write with a model. Without a prompt, on a terminal, an interactive session."""
    from mesh_transformer.cli.session import open_model, start_session

    start_session()
    from mesh_transformer.config.errors import UserError
    from mesh_transformer.sample.options import SamplingOptions

    options = SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        seed=seed,
        stop=tuple(stop),
    )
    prompts = [*prompt, *([_read(prompt_file)] if prompt_file else [])]
    if not prompts and not sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT or --prompt-file FILE, or run on a terminal to be asked for it")
    if stream and (len(prompts) != 1 or samples != 1 or json_):
        raise UserError("--stream writes one completion as text: give one prompt, and neither --samples nor --json")
    opened = open_model(model, dtype=dtype, tokenizer=tokenizer, step=step, config=config, mesh=mesh, quantize=quantize)
    if not prompts:
        _interactive(opened, options)
    elif stream:
        _stream(opened, prompts[0], options)
    else:
        _print_all(opened, prompts, options, samples, json_)


def _read(path: Path) -> str:
    from mesh_transformer.config.errors import UserError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path}: cannot be read as UTF-8 text ({error})") from error


def _print_all(model: Model, prompts: list[str], options: SamplingOptions, samples: int, as_json: bool) -> None:
    import json

    from mesh_transformer.cli.console import StageDisplay

    done: dict[int, Any] = {}
    written: Counter[int] = Counter()  # about as many pieces as tokens
    with StageDisplay() as display:
        for piece in model.stream(prompts, options, samples):
            written[piece.row] += 1
            if piece.completion is not None:
                done[piece.row] = piece.completion
                written[piece.row] = options.max_tokens
            display.progress("tokens", written.total(), len(prompts) * samples * options.max_tokens)
    for row in range(len(prompts) * samples):
        prompt, completion = prompts[row // samples], done[row]
        if as_json:
            record = {"prompt": prompt, "sample": row % samples, "text": completion.text, "tokens": completion.tokens}
            print(json.dumps(record | {"finish_reason": completion.finish_reason}))
        else:
            if len(done) > 1:
                print(f"--- prompt {row // samples + 1}, sample {row % samples + 1} ---")
            print(prompt + completion.text)


def _stream(model: Model, prompt: str, options: SamplingOptions) -> None:
    print(prompt, end="", flush=True)
    for piece in model.stream(prompt, options):
        print(piece.text, end="", flush=True)
    print()


def _interactive(model: Model, options: SamplingOptions) -> None:
    import dataclasses

    from mesh_transformer.config.errors import UserError

    print("Type a prompt and press Enter; Ctrl-C stops a completion, Ctrl-D or an empty line leaves.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        if not prompt:
            return
        try:
            _stream(model, prompt, options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        # The next completion of the same prompt is another one.
        options = dataclasses.replace(options, seed=(options.seed + 1) % 2**32)
