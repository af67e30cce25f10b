"""Leaving a run after an error, when the others may hang or be gone."""

from __future__ import annotations

import contextlib
import os
import sys

from mesh_transformer import compat
from mesh_transformer.config.errors import RunError
from mesh_transformer.processes.group import LEFT, Processes


def end_after_error(status: int, patience: float = 5.0) -> None:
    """Ends this process at once where not all processes of the run are leaving too; otherwise returns.

    To be called when the error was told, just before the process would end by itself. At a normal end JAX waits for
    all processes, and ends those that waited in vain from C++, with signal 6 in place of their exit status. The others
    may be inside a step that waits for this process: their `Watchdog` hears of its end.

    Args:
        status: the exit status.
        patience: seconds that the others have to come here too.
    """
    if not compat.is_distributed():
        return
    import jax

    store = compat.KeyValueStore()
    processes = Processes(index=jax.process_index(), count=jax.process_count(), store=store)
    try:
        processes.barrier("goodbye", patience)
    except RunError:
        with contextlib.suppress(RunError):
            store.set(f"{LEFT}/{processes.index}", str(status))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
