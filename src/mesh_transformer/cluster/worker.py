"""What one worker of a cluster does: the same training that `train` does, as one process of several."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesh_transformer.train.init_from import InitFrom
    from mesh_transformer.train.loop import Observer, StopRequest
    from mesh_transformer.train.run import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worker:
    """One worker of an attempt, as the function that it carries out sees it.

    number: 0 to the number of workers less one; that of its process in `jax.distributed`. stop: set when the workers
    are asked to stop. from_first: gives worker 0's value to all; every worker must call it.
    """

    number: int
    stop: StopRequest
    from_first: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """A training run as it travels to the workers.

    configuration: TOML with absolute paths. earlier: from `traces`, of the run to delete first; empty: none is to be.
    display: makes the observer of worker 0 from the number of steps.
    """

    configuration: str
    init_from: InitFrom | None
    earlier: Mapping[str, int]
    display: Callable[[int], AbstractContextManager[Observer]]

    def __call__(self, worker: Worker) -> Result:
        """Trains, going on from the newest checkpoint of an earlier attempt. Raises as `train.run.train`."""
        from mesh_transformer import compat
        from mesh_transformer.config.schema import run_config_from_dict
        from mesh_transformer.evaluate.in_loop import evaluation_of
        from mesh_transformer.processes import join
        from mesh_transformer.train.data import count_steps
        from mesh_transformer.train.run import train

        compat.prepare_process()
        compat.use_compile_cache()
        run = count_steps(run_config_from_dict(tomllib.loads(self.configuration), default_name="run"))
        # Only what was there before the launch is deleted, never what an earlier attempt of it left to go on from.
        still_there = traces(run.run_directory).items() & self.earlier.items()
        new = worker.from_first(bool(still_there))
        with self.display(run.train.steps) as display:
            processes = join(display.note)
            # Signals reach the main thread, and this is another one: the worker's own request is looked at.
            return train(
                run,
                display,
                new=new,
                init_from=self.init_from,
                processes=processes,
                stop=worker.stop,
                evaluate=evaluation_of,
            )


def traces(run_directory: Path) -> dict[str, int]:
    """What tells one run from the next in the same directory: metrics and checkpoints, with times in nanoseconds."""
    paths = [run_directory / "metrics.jsonl", *(run_directory / "checkpoints").glob("*")]
    return {str(path): path.stat().st_mtime_ns for path in paths if path.exists()}
