"""Writing checkpoints while training goes on; `opening` says what one is, and how it is read.

Whatever dies whenever, there is either no checkpoint of a step or a whole one: it is written under a temporary name
beside its place (`.STEP.tmp-PID`), brought to the disk, listed in its manifest, and only then renamed. What is removed
gets a temporary name first (`.STEP.del-PID`; `.STEP.old-PID` while its successor takes its place).

In a run of several processes each writes the values that its own devices hold, into the one temporary directory, which
must therefore be on a file system that all share. Process 0 does what is done once: it makes the directory, writes the
documents, renames and deletes. What goes wrong in one process is raised in all.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from mesh_transformer.checkpoint import arrays, opening
from mesh_transformer.checkpoint.manifest import MANIFEST, write_manifest
from mesh_transformer.checkpoint.opening import CHECKPOINT_FILE, STATE, open_native
from mesh_transformer.config.errors import CheckpointError, ConfigError, RunError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.files import clear_leftovers, fsync_path, fsync_tree, is_out_of_space, make_directories
from mesh_transformer.processes import ONE, Processes
from mesh_transformer.shapes import Params

__all__ = ["CheckpointStore", "open_native"]

_STEP = "[0-9]+"
_REMOVALS, _PAUSE = 50, 0.1  # attempts, seconds between them
# A slow disk is no reason to give up on the others; JAX ends a process whose coordinator misses another one.
_TIMEOUT = 24 * 3600.0  # seconds
_SHOWING = 15.0  # seconds that a new directory may need to show itself on the other machines of a network file system
_GIVING_UP = 60.0  # seconds that the others may need to end their writes before a half-written checkpoint is removed
_RESERVED = (STATE, CHECKPOINT_FILE, MANIFEST)


class CheckpointStore:
    """The checkpoints of one run, for the process or processes that write them.

    Opening it clears away what dead processes left half done, so open it only under the run directory's lock. Use it
    as a context manager, or call `close`: a save that is under way is waited for. Of several processes all must open
    it and call `save`, `newest_intact` and the restoring methods alike.

    Args:
        directory: where the checkpoints are; made by the first save.
        keep_last: how many of the newest to keep, at least 1.
        keep_every: keep also every step that is a multiple of this; 0 for none.
        processes: those of this run.

    Raises:
        ConfigError: `keep_last` or `keep_every` is out of range.
    """

    def __init__(
        self, directory: str | os.PathLike[str], keep_last: int, keep_every: int, *, processes: Processes = ONE
    ) -> None:
        if keep_last < 1:
            raise ConfigError(f"train.keep_last = {keep_last} must be at least 1: the newest checkpoint is always kept")
        if keep_every < 0:
            raise ConfigError(f"train.keep_every = {keep_every} must not be negative; 0 keeps none beside the newest")
        self.directory = Path(directory)
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._processes = processes
        with processes.agree("opening of the checkpoints"):
            if processes.is_first:
                clear_leftovers(self.directory, _STEP)
        # Process 0 clears away what bears the number of a dead process: the number must be its own.
        self._pid = int(processes.from_first("process number", str(os.getpid())))

    def save(
        self, step: int, state: Any, *, metadata: Mapping[str, Any], files: Mapping[str, bytes], wait: bool = False
    ) -> None:
        """Saves `state` as checkpoint `step`, replacing one of that step.

        Returns as soon as the arrays are copied to the host, and may then be donated; the rest happens on another
        thread. At most one save is under way: a second one waits for the first.

        Args:
            step: optimizer steps finished.
            state: a pytree of arrays with at least one value each, parameters under "params"; random keys as
                `jax.random.key_data`.
            metadata: goes into checkpoint.json; JSON values only, "model" (`ModelConfig.to_dict()`) among them.
            files: name -> contents of files to put beside it: the tokenizer's.
            wait: return only when the checkpoint is complete.

        Raises:
            CheckpointError: this save, or the one before it, could not be written; earlier checkpoints are untouched.
            ValueError, TypeError: the arguments are unsuitable; nothing was written.
        """
        self.wait()
        temporary = self.directory / f".{step}.tmp-{self._pid}"
        writes: list[Callable[[], None]] = []
        with self._undone_on_error(temporary, writes):
            with self._processes.agree("checkpoint begun", _TIMEOUT), self._clear_errors(step):
                arrays.check(state)
                document = checkpoint_document(step, arrays.describe(state), metadata)
                for name in files:
                    if name in _RESERVED or Path(name).name != name:
                        raise ValueError(f"files: {name!r} is not a free plain file name")
                if self._processes.is_first:
                    clear_leftovers(self.directory, _STEP)  # of our own failed saves
                    make_directories(temporary)
            with self._processes.agree("checkpoint copied", _TIMEOUT), self._clear_errors(step):
                self._check_shared(temporary)
                writes.append(arrays.start_write(temporary / STATE, state))
        contents = {**files, CHECKPOINT_FILE: document}
        self._thread = threading.Thread(
            target=self._run, args=(step, temporary, *writes, contents), name=f"checkpoint-{step}"
        )
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits for the save that is under way, if any; raises its error, once.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """`wait`; the store may be used again."""
        self.wait()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as own:
            if error is None:
                raise
            error.add_note(str(own))  # what ended the block is the news

    def steps(self) -> list[int]:
        """Steps whose save was finished, ascending; their files are not checked."""
        return opening.complete_steps(self.directory)

    def newest_intact(self, report: Callable[[str], None]) -> int | None:
        """The newest step whose files are all intact, None if there is none; see `opening.newest_intact`.

        Process 0 reads and reports, and its answer is everyone's.

        Raises:
            CheckpointError: another process does not see that checkpoint.
        """
        newest = None
        with self._processes.agree("newest checkpoint", _TIMEOUT):
            if self._processes.is_first:
                newest = opening.newest_intact(self.directory, report)
        answer = json.loads(self._processes.from_first("newest checkpoint", json.dumps(newest)))
        with self._processes.agree("sight of the newest checkpoint"):
            if answer is not None and not self._processes.is_first:
                self._check_shared(self.directory / str(answer))
        return answer

    def path(self, step: int) -> Path:
        """Directory of checkpoint `step`.

        Raises:
            CheckpointError: there is none; the message lists those that there are.
        """
        found = opening.step_directories(self.directory).get(step)
        if found is None:
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory}: there is no step {step}; steps there: {there}")
        return found

    def read_metadata(self, step: int) -> dict[str, Any]:
        """The contents of checkpoint.json of `step`; see `opening.read_metadata`."""
        return opening.read_metadata(self.path(step))

    def restore(self, step: int, abstract_state: Any, *, model: ModelConfig | None = None) -> Any:
        """The whole state of `step`; see `opening.restore_state`. Files are not verified: `newest_intact` did that."""
        with self._processes.agree("restoring", _TIMEOUT):
            return opening.restore_state(self.path(step), abstract_state, model=model)

    def restore_params(self, step: int, abstract_params: Params, *, model: ModelConfig | None = None) -> Params:
        """The parameters of `step` alone; see `opening.restore_params`."""
        with self._processes.agree("restoring", _TIMEOUT):
            return opening.restore_params(self.path(step), abstract_params, model=model)

    def _run(
        self, step: int, temporary: Path, finish_arrays: Callable[[], None], contents: Mapping[str, bytes]
    ) -> None:
        agree, is_first = self._processes.agree, self._processes.is_first
        try:
            with self._undone_on_error(temporary, []):
                with agree("checkpoint written", _TIMEOUT), self._clear_errors(step):
                    finish_arrays()
                with agree("checkpoint published", _TIMEOUT), self._clear_errors(step):
                    if is_first:
                        _complete(temporary, contents)
                        _publish(temporary, self.directory / str(step), self._pid)
            with agree("old checkpoints deleted", _TIMEOUT):
                if is_first:
                    self._retain(step)
        except BaseException as error:  # handed to the thread that calls `wait`
            self._error = error

    def _check_shared(self, there: Path) -> None:
        """Returns if this process sees what process 0 sees; a network file system may take its time."""
        deadline = time.monotonic() + _SHOWING
        while not there.is_dir():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{there}: process 0 sees this directory, {self._processes.name(self._processes.index)} does not\n"
                    "Put the run directory on a file system that all processes share (log.directory)."
                )
            time.sleep(_PAUSE)

    @contextlib.contextmanager
    def _undone_on_error(self, temporary: Path, writes: list[Callable[[], None]]) -> Iterator[None]:
        """Removes the directory when the block raises; `writes`: those under way then, to be waited for."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception):  # who is interrupted waits for nobody
                # What is written after the removal would make the directory anew, so all come to their end first.
                for finish in writes:
                    with contextlib.suppress(Exception):  # the first error is the news
                        finish()
                with contextlib.suppress(RunError):
                    self._processes.barrier("checkpoint given up", _GIVING_UP)
            if self._processes.is_first:
                _remove(temporary)
            raise

    @contextlib.contextmanager
    def _clear_errors(self, step: int) -> Iterator[None]:
        """What the file system says becomes a CheckpointError that says what is left and what to do."""
        try:
            yield
        except Exception as error:
            if not is_out_of_space(error) and not isinstance(error, OSError):
                raise
            previous = opening.newest_intact(self.directory, lambda _: None)
            kept = f"checkpoint {previous} is intact" if previous is not None else "there is no earlier checkpoint"
            if is_out_of_space(error):
                raise CheckpointError(
                    f"{self.directory}: no space left on the disk for checkpoint {step}; {kept}\n"
                    "Free space there, or lower train.keep_last and train.keep_every; then repeat the command to go on."
                ) from error
            raise CheckpointError(
                f"{self.directory}: checkpoint {step} could not be written ({error}); {kept}\n"
                "Make the directory writable; then repeat the command to go on."
            ) from error

    def _retain(self, saved: int) -> None:
        # A step beyond the one just saved was damaged, or we would have gone on from it: it is no reason to delete
        # a good one, and it is replaced when its turn comes.
        steps = [step for step in self.steps() if step <= saved]
        for step in steps[: -self.keep_last]:
            if not (self.keep_every and step % self.keep_every == 0):
                try:
                    _discard(self.path(step), step, self._pid)
                except OSError as error:
                    raise CheckpointError(
                        f"{self.path(step)}: the old checkpoint cannot be deleted ({error.strerror}); "
                        f"checkpoint {saved} is saved"
                    ) from error


def _complete(temporary: Path, contents: Mapping[str, bytes]) -> None:
    """Everything of a checkpoint, on the disk, the manifest last; the parts of all processes are there."""
    arrays.merge(temporary / STATE)
    for name, data in contents.items():
        (temporary / name).write_bytes(data)
    fsync_tree(temporary)
    write_manifest(temporary)


def checkpoint_document(step: int, described: Mapping[str, Any], metadata: Mapping[str, Any]) -> bytes:
    """Contents of checkpoint.json; `described` is what `arrays.describe` says of the state."""
    own = {
        "format": opening.FORMAT,
        "version": opening.VERSION,
        "project_version": importlib.metadata.version("mesh-transformer"),
        "jax_version": jax.__version__,
        "step": step,
        "arrays": dict(described),
    }
    if step < 0:
        raise ValueError(f"step = {step} must not be negative")
    if "model" not in metadata or own.keys() & metadata.keys():
        raise ValueError(f"metadata must have the key 'model', and none of: {', '.join(own)}")
    return (json.dumps({**own, **metadata}, indent=1, allow_nan=False) + "\n").encode()


def _publish(temporary: Path, final: Path, pid: int) -> None:
    """Gives the finished directory its name; one that has the name already leaves only then."""
    if final.exists():
        replaced = final.with_name(f".{final.name}.old-{pid}")
        final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            replaced.rename(final)
            raise
        fsync_path(final.parent)
        _discard(replaced, int(final.name), pid)
    else:
        temporary.rename(final)
        fsync_path(final.parent)


def _discard(path: Path, step: int, pid: int) -> None:
    doomed = path.with_name(f".{step}.del-{pid}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _remove(directory: Path) -> None:
    """Removes a directory into which writes of a save that failed may still be under way."""
    for _ in range(_REMOVALS):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(_PAUSE)
