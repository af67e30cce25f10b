"""What every command that computes does first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesh_transformer.api import Model


def start_session() -> None:
    """Allocator and compile cache; before anything imports JAX."""
    from mesh_transformer import compat

    compat.prepare_process()
    compat.use_compile_cache()


def open_model(model: str, **how: Any) -> Model:
    """MODEL with its options, as `api.load` takes them, read before the user's eyes."""
    from mesh_transformer.api import load
    from mesh_transformer.cli.console import StageDisplay

    with StageDisplay(in_bytes=True) as display:
        return load(model, **how, progress=display.progress)
