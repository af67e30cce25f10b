"""`mesh-transformer serve`."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any, Literal

import typer

from mesh_transformer.cli import model_options

if TYPE_CHECKING:
    from mesh_transformer.api import Model
    from mesh_transformer.serve.served import ModelFacts

WhenFull = Literal["slide", "stop"]
KEY_VARIABLE = "MESH_TRANSFORMER_API_KEY"
# Without jinja2 it serves everything but chats, which say what is missing.
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: model_options.Model,
    host: str = typer.Option("127.0.0.1", help="The address to listen at; 0.0.0.0 for every one of this machine."),
    port: int = typer.Option(8000, min=0, max=65535, help="0 takes any free one."),
    api_key: str | None = typer.Option(
        None,
        metavar="KEY",
        envvar=KEY_VARIABLE,
        help="What clients must send. In the environment it is not seen in the list of processes.",
    ),
    max_batch: int = typer.Option(16, min=1, help="Completions under way at one time."),
    max_queue: int = typer.Option(64, min=0, help="Completions that may wait; more are refused with 429."),
    name: str | None = typer.Option(None, help="What clients call the model; default: the name of its directory."),
    when_full: WhenFull = typer.Option(
        "slide", help="A text that outgrows the context forgets its beginning, or ends."
    ),
    chat_template: str | None = typer.Option(
        None, metavar="FILE", help="Jinja text that makes a prompt of messages; default: the model's own."
    ),
    max_prompt_tokens: int | None = typer.Option(None, min=1, help="Of one prompt; default: the context."),
    max_body_bytes: int = typer.Option(1 << 20, min=1, help="Of one request."),
    max_tokens_limit: int = typer.Option(4096, min=1, help="The largest max_tokens of a request."),
    max_choices: int = typer.Option(128, min=1, help="Completions of one request: prompts times n."),
    request_timeout: float = typer.Option(600.0, help="Seconds that an answer may take, waiting included."),
    allow_origin: list[str] = typer.Option(
        [], metavar="ORIGIN", help="A web page's origin that may use /v1, as https://host. May be repeated; * for all."
    ),
    shutdown_timeout: float = typer.Option(30.0, help="Seconds for what runs to finish once told to stop."),
    dtype: model_options.Dtype = None,
    quantize: model_options.Quantize = None,
    tokenizer: model_options.Tokenizer = None,
    step: model_options.Step = None,
    mesh: model_options.Mesh = None,
    config: model_options.Config = None,
) -> None:
    """Serve a model over HTTP: OpenAI's protocol for completions and chats, the original's two, and a page."""
    from mesh_transformer.config.errors import UserError

    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}\ninstall it: pip install 'mesh-transformer[serve]'")
    from mesh_transformer.cli.session import open_model, start_session

    start_session()
    from mesh_transformer.cli.console import note
    from mesh_transformer.data.chat import read_template, with_template
    from mesh_transformer.serve.options import ServeOptions
    from mesh_transformer.serve.run import bind, is_loopback, run, url_of
    from mesh_transformer.serve.served import Served

    options: dict[str, Any] = {
        "name": name or default_name(model),
        "api_key": api_key if api_key is not None else os.environ.get(KEY_VARIABLE),
        "max_prompt_tokens": max_prompt_tokens,
        "max_body_bytes": max_body_bytes,
        "max_tokens_limit": max_tokens_limit,
        "max_choices": max_choices,
        "request_timeout": request_timeout,
        "allow_origins": tuple(allow_origin),
        "shutdown_timeout": shutdown_timeout,
    }
    checked = ServeOptions(**options)
    # What may be wrong with the template and the address shows before the model is read.
    template = None if chat_template is None else read_template(chat_template)
    with bind(host, port) as bound:
        if not is_loopback(bound) and checked.api_key is None:
            note(f"warning: whoever reaches {url_of(bound)} may use this server; give --api-key to ask for a key")
        opened = open_model(
            model, dtype=dtype, tokenizer=tokenizer, step=step, config=config, mesh=mesh, quantize=quantize
        )
        if template is not None:
            if opened.tokenizer is None:
                raise UserError("--chat-template is for text, and this model has no tokenizer; give --tokenizer")
            opened.tokenizer = with_template(opened.tokenizer, template)
        service = opened.service(max_batch=max_batch, max_queue=max_queue, when_full=when_full)
        served = Served(facts_of(opened, when_full, variant=f"{dtype} {quantize} {mesh}"), service, checked)
        status = run(served, bound, note)
    raise typer.Exit(status)


def default_name(model: str) -> str:
    """The last part of a path or of a Hub id, without its revision."""
    from pathlib import Path

    path = Path(model) if Path(model).exists() else Path(model.partition("@")[0])
    return path.name or path.resolve().name or model


def facts_of(model: Model, when_full: WhenFull, variant: str) -> ModelFacts:
    """What the server has to know of an opened model."""
    from mesh_transformer.serve.served import ModelFacts

    step = model.source.step if model.source else None
    return ModelFacts(config=model.config, tokenizer=model.tokenizer, when_full=when_full, variant=f"{step} {variant}")
