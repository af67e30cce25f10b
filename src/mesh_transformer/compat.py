"""Differences between versions of JAX, and what is known of the installed ones. The only module that looks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform

# Versions that this project's tests have run with.
TESTED_JAX = ("0.10.2",)


def version_report() -> str:
    """One line a package, and whether this jax is one that the tests have run with."""
    names = ("mesh-transformer", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "grain", "tokenizers")
    lines = []
    for name in names:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} (not installed)")
    jax_version = importlib.metadata.version("jax")
    tested = "tested" if jax_version in TESTED_JAX else f"not tested; tested: {', '.join(TESTED_JAX)}"
    return "\n".join([*lines, f"python {platform.python_version()}", f"this jax is {tested}"])


def prepare_process() -> None:
    """Settings that must be made before JAX is imported; called once by the command line, never by the library.

    On Linux the C allocator is told to keep big buffers instead of returning them to the system after every step,
    where fresh pages would be paid for again (what it is worth: docs/performance.md). The process then never shrinks.
    MESH_TRANSFORMER_ALLOCATOR=default leaves the allocator alone.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's start-up chatter
    if platform.system() == "Linux" and os.environ.get("MESH_TRANSFORMER_ALLOCATOR") != "default":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    import ctypes

    # Constants of glibc's malloc.h; another C library has no mallopt and is left as it is.
    m_mmap_max, m_trim_threshold, m_arena_max = -4, -1, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)  # as an unsigned number of bytes: never
    mallopt(m_arena_max, 1)


def give_memory_back() -> None:
    """Returns freed memory to the system once, where the C library can: after a phase that needed much for a moment."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def use_compile_cache() -> None:
    """Keeps compiled programs between processes, under the user's cache directory.

    JAX_COMPILATION_CACHE_DIR, if set, is left to JAX.
    """
    import jax

    from mesh_transformer.config.paths import cache_directory

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
