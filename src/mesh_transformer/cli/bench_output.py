"""What the commands of `bench` share: lists in options, and where a result goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def listed(text: str) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def finish(result: dict[str, Any], as_json: bool, out: Path | None) -> bool:
    """Writes the JSON where it was asked for; whether standard output has it."""
    text = json.dumps(result, indent=2)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
    return as_json


def chosen_model(
    model: str | None, preset: str | None, default: str, of_model: dict[str, Any]
) -> tuple[Any, list[str]]:
    """An architecture or a path, and the options of `convert` that say which of a path's models is meant.

    Raises:
        UserError: both are given, or options of a model with a preset.
    """
    from mesh_transformer.config.errors import UserError
    from mesh_transformer.config.presets import preset as preset_named

    options = [word for name, value in of_model.items() if value is not None for word in (name, str(value))]
    if model is not None:
        if preset is not None:
            raise UserError(f"MODEL {model} and --preset {preset} are both given; expected one of them")
        return model, options
    if options:
        raise UserError(f"{options[0]} says which of MODEL's checkpoints is meant; give MODEL, or leave it out")
    return preset_named(preset or default), []
