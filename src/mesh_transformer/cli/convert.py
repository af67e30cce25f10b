"""`mesh-transformer convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mesh_transformer.cli import model_options

if TYPE_CHECKING:
    from mesh_transformer.checkpoint.weights import Weights


def convert(
    source: model_options.Model,
    target: Path = typer.Argument(help="Directory to write; of legacy formats, one named step_N holds the shards."),
    to: str = typer.Option(..., "--to", help="native, huggingface, legacy (the original's shards), legacy-v2 or peft."),
    dtype: str | None = typer.Option(None, help="float32, bfloat16 or float16; default: as stored."),
    quantize: str | None = typer.Option(
        None, metavar="int8|int4|int4-128", help="Of --to native: round matrices to 8 or 4 bits, to be computed with."
    ),
    shards: int = typer.Option(0, min=0, help="Of --to legacy; default: as the source, else at most 8."),
    with_optimizer: bool = typer.Option(False, "--with-optimizer", help="Adam's moments and the counts come along."),
    slim: bool = typer.Option(False, "--slim", help="As the original slims: no optimizer, float32 becomes bfloat16."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace TARGET, if it is a model."),
    base: str | None = typer.Option(
        None, metavar="NAME", help="Of --to peft: the path or Hub id of the base's Hugging Face form."
    ),
    step: model_options.Step = None,
    config: model_options.Config = None,
    tokenizer: model_options.Tokenizer = None,
) -> None:
    """Any model into any format, in bounded memory, with a certificate (conversion.json)."""
    from mesh_transformer.cli.session import start_session

    start_session()
    from mesh_transformer import api
    from mesh_transformer.checkpoint.convert import convert as run
    from mesh_transformer.checkpoint.models import open_weights
    from mesh_transformer.cli.console import StageDisplay, note
    from mesh_transformer.config.dtypes import dtype_name
    from mesh_transformer.config.errors import UserError

    if slim and with_optimizer:
        raise UserError("--slim leaves the optimizer out and --with-optimizer keeps it; give one of them")
    dtype = dtype_name(dtype, key="--dtype") if dtype is not None else None
    if to == "peft":
        refused = {"--dtype": dtype, "--shards": shards, "--with-optimizer": with_optimizer, "--slim": slim}
        refused |= {"--quantize": quantize}
        for flag in (flag for flag, given in refused.items() if given):
            raise UserError(f"{flag} is not for --to peft, which holds an adapter as it was trained; leave it out")
        _to_peft(open_weights(source, step=step, config=config, report=note), target, base, overwrite)
        return
    if base is not None:
        raise UserError(f"--base {base} is for --to peft; the other formats hold the whole model")
    weights = open_weights(source, step=step, config=config, report=note)
    if slim and dtype is None and weights.main_dtype.name == "float32":
        dtype = "bfloat16"
    chosen = api.tokenizer_of(weights, tokenizer)
    conversion = api.conversion(
        to, chosen, dtype=dtype, shards=shards, with_optimizer=with_optimizer, quantize=quantize
    )
    with StageDisplay(in_bytes=True) as display:
        facts = run(weights, target, conversion, overwrite=overwrite, progress=display.progress)
    note(f"{target}: {facts['parameters']:,} parameters, {facts['target']['format']}")
    if facts["changed"]:
        largest = max(facts["changed"], key=lambda entry: entry["largest_error"])
        note(
            f"{len(facts['changed'])} of {len(facts['tensors'])} tensors were rounded; the largest error is "
            f"{largest['largest_error']:.3g}, in {largest['name']}"
        )
    else:
        note("no value was changed")
    typer.echo(facts["target"]["digest"])


def _to_peft(weights: Weights, target: Path, base: str | None, overwrite: bool) -> None:
    from mesh_transformer.checkpoint.peft import write_peft
    from mesh_transformer.cli.console import note

    n_values = write_peft(weights, target, base_name=base, overwrite=overwrite)
    note(f"{target}: {n_values:,} parameters, peft")
    if base is None:
        note("its base is named by the path that it was trained on; --base NAME names what peft is to load")
