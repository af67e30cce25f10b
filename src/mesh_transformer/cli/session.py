"""What every command that computes does first."""

from __future__ import annotations


def start_session() -> None:
    """Allocator and compile cache; before anything imports JAX."""
    from mesh_transformer import compat

    compat.prepare_process()
    compat.use_compile_cache()
