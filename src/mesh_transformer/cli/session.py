"""What every command that computes does first."""

from __future__ import annotations

MODEL_HELP = "A run directory, a checkpoint, a Hugging Face GPT-J directory, an original step_N or model directory."


def start_session() -> None:
    """Allocator and compile cache; before anything imports JAX."""
    from mesh_transformer import compat

    compat.prepare_process()
    compat.use_compile_cache()
