"""One process is asked to stop, and all stop after the same step."""

from __future__ import annotations

from mesh_transformer.processes.group import Processes


class StopAgreement:
    """Asks all processes to stop when one was signalled.

    A process that was signalled publishes "stop after the next step" before it begins that step. No process can finish
    a step that another has not begun, so whoever finishes it finds the word there.

    Args:
        processes: those that take every step together.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._key = processes.fresh_key("stop")

    def stop_after(self, step: int, signalled: int | None) -> int | None:
        """The signal to stop by now, the same in all processes; None: go on. To be asked once after each step.

        Args:
            step: the step just finished.
            signalled: the signal that this process itself has had so far.

        Raises:
            RunError: the coordinator cannot be reached.
        """
        store = self._processes.store
        if store is None:
            return signalled
        # Everyone's own key: of two that are signalled before different steps, the earlier step counts.
        asked = [tuple(map(int, text.split())) for text in store.entries(self._key).values()]
        if asked:
            last, signal = min(asked)
            return signal if step >= last else None
        if signalled is not None:
            store.set(f"{self._key}/{self._processes.index}", f"{step + 1} {signalled}")
        return None
