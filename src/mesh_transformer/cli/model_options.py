"""The argument MODEL and the options that go with it, the same in every command that opens a model."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="A run directory, a checkpoint, a Hugging Face GPT-J directory, an original step_N or model directory."
    ),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: weights as stored.")]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="int8|int4|int4-128", help="Hold matrices in 8 or 4 bits; default: as stored."),
]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="gpt2, bytes or a tokenizer.json; default: the model's own.")
]
Step = Annotated[int | None, typer.Option("--step", help="Which checkpoint of several; default: the newest.")]
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="AXIS=N,...",
        help="Devices to lay the model over, as data=2,tensor=4; default: one device.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="Of an original checkpoint that has none beside it."),
]
