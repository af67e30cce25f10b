"""What a run reads: its data sets, batches and tokenizer, opened as `train` opens them, and nothing kept of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mesh_transformer.checkpoint.opening import complete_steps
from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.config.run import RunConfig
from mesh_transformer.data.choice import tokenizer_for_data
from mesh_transformer.data.expand import place_of_copy
from mesh_transformer.data.finding import resolve_data
from mesh_transformer.data.loader import TrainLoader, stream_fingerprint, validation_batches
from mesh_transformer.data.mixture import Sequences, open_training
from mesh_transformer.data.offsets import nothing_kept
from mesh_transformer.data.source import open_source
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.doctor.finding import Check, Finding, ok, warning
from mesh_transformer.train.beginning import tokenizer_at_hand
from mesh_transformer.train.data import Data, separator_of
from mesh_transformer.train.loop import micro_batch_size

# Records that are read, and their checksums with them, beside the first of every file, which opening reads.
_FIRST = 32


@dataclasses.dataclass
class Inputs:
    """The data of a run, as far as they could be opened; filled in by the checks."""

    run: RunConfig
    train: Sequences | None = None
    tokenizer: Tokenizer | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What of `train.data.Data.record` is known."""
        known: dict[str, Any] = {"sequence_length": self.run.data.sequence_length}
        if self.train is not None:
            known["fingerprint"] = stream_fingerprint(self.train, self.run.data.shuffle)
        return known

    def checks(self) -> list[Check]:
        """In the order in which they use each other's results."""
        prepare = (
            "name records that fit this configuration; `mesh-transformer prepare` makes them, and an index, from text"
        )
        found = [Check(name="data.train", look=self.check_training, mend=prepare)]
        found.append(Check(name="train.batch_size", look=self.check_batch, mend="lower train.batch_size, or add data"))
        for name in self.run.data.validation:
            mend = f"{prepare}; at least one batch of them; or leave data.validation.{name} out"
            found.append(Check(name=f"data.validation.{name}", look=self._looking_at_set(name), mend=mend))
        mend = "name the tokenizer that made the data in data.tokenizer, or set model.n_vocab to hold its ids"
        return [*found, Check(name="tokenizer", look=self.check_tokenizer, mend=mend)]

    def check_training(self) -> Iterator[Finding]:
        """Paths, lengths, ids and checksums; the first record of every file and some more."""
        data = self.run.data
        places = data.train.values() if isinstance(data.train, Mapping) else [data.train]
        if packed := [path for where in places for path in _not_expanded(where)]:
            yield _packed("data.train", packed)
            return
        with nothing_kept():
            source = open_training(data.train, data.weights, note=None, **_fitting(self.run))
            _read_some(source)
        self.train = source
        yield ok("data.train", f"{_counted(source)} in {len(source.files)} file{_s(len(source.files))}")
        for line in getattr(source, "notes", []):
            yield warning("data.train", line, "take the second mention out of the index, unless it is meant")

    def check_batch(self) -> Iterator[Finding]:
        """Enough sequences for a batch, and how often they are gone through."""
        run, name = self.run, "train.batch_size"
        if self.train is None:
            yield not_looked_at(name, "data.train")
            return
        TrainLoader(self.train, seed=run.seed, batch_size=run.train.batch_size)
        steps = run.train.with_steps(len(self.train)).steps
        epochs = steps * run.train.batch_size / len(self.train)
        yield ok(name, f"{run.train.batch_size} sequences; {steps:,} steps go {epochs:.3g} times through the data")

    def check_validation(self, name: str) -> Iterator[Finding]:
        """As `check_training`, of one set."""
        where, called = self.run.data.validation[name], f"data.validation.{name}"
        if packed := _not_expanded(where):
            yield _packed(called, packed)
            return
        with nothing_kept():
            source = open_source(where, **_fitting(self.run))
            _read_some(source)
        validation_batches(source, micro_batch_size(self.run)).close()
        yield ok(called, _counted(source))

    def _looking_at_set(self, name: str) -> Callable[[], Iterator[Finding]]:
        return lambda: self.check_validation(name)

    def check_tokenizer(self) -> Iterator[Finding]:
        """It opens, made the data and has no more ids than the model."""
        if self.train is None:
            yield not_looked_at("tokenizer", "data.train")
            return
        run, checkpoints = self.run, RunDirectory(self.run.run_directory).checkpoints
        kept = tokenizer_at_hand(run, checkpoints if complete_steps(checkpoints) else None, None)
        found = tokenizer_for_data(run.data.tokenizer, run.data.train, run.model.n_vocab, kept)
        if run.data.separate_documents:
            separator_of(run, Data(train=self.train, validation={}, tokenizer=found))
        self.tokenizer = found
        if found is None:
            mend = 'name it, for example data.tokenizer = "gpt2"'
            message = "nobody says which made the data; training works, and text cannot be given to the model"
            yield warning("tokenizer", message, mend)
            return
        spare = run.model.n_vocab - found.n_vocab
        yield ok("tokenizer", f"{found.name}, {found.n_vocab} ids; model.n_vocab has {spare} more")


def _fitting(run: RunConfig) -> dict[str, Any]:
    return {"sequence_length": run.data.sequence_length, "n_vocab": run.model.n_vocab}


def _read_some(source: Sequences) -> None:
    """Reads the first records and the last one, which checks their checksums, lengths and ids."""
    n = len(source)
    source.read_many(list(dict.fromkeys([*range(min(n, _FIRST)), n - 1])))


def _counted(source: Sequences) -> str:
    return f"{len(source):,} sequences of {source.sequence_length} + 1 ids"


def _s(n: int) -> str:
    return "" if n == 1 else "s"


def _not_expanded(where: str) -> list[str]:
    """Files stored as ZLIB streams of which no expanded copy is in the cache yet."""
    copies = {path: place_of_copy(path) for path in resolve_data(where)}
    return [path for path, copy in copies.items() if copy is not None and not copy.exists()]


def _packed(name: str, files: list[str]) -> Finding:
    message = f"{len(files)} files are compressed ({files[0]}); `train` expands them into the user's cache, once"
    return warning(name, f"{message}: not looked into", "see that the cache has room, and run doctor again after that")


def not_looked_at(name: str, because: str) -> Finding:
    """Of a check that needs what an earlier one did not get."""
    return warning(name, f"not looked at, since {because} could not be used", f"mend {because} first")


def check_software(run: RunConfig) -> Iterator[Finding]:
    """Optional packages that the configuration asks for."""
    from mesh_transformer.evaluate.installed import require_harness
    from mesh_transformer.train.tracking import check_tracking

    check_tracking(run)
    if run.evaluate.every:
        require_harness()
        yield ok("packages", "lm-eval is installed; whether its tasks are known is seen when the run begins")
    elif run.log.wandb_project:
        yield ok("packages", "wandb is installed")
    else:
        yield ok("packages", "no optional one is asked for")
