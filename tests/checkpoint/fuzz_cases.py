"""Damages one byte range of one file of a sound model or data set, reads all of it, and says what came of it.

    PYTHONPATH=tests python -m checkpoint.fuzz_cases --seed 1 --first 0 --count 40 DIRECTORY

A case is a function of the seed and of its number. One line of JSON is printed when a case begins and one when it ends;
it ends with a fault if anything but one of our own errors came out, if the error does not name the place or is too
long, if it took too much memory, or if damage that a checksum covers went by unseen. A case that takes longer than
`LONGEST` ends the process, with the stack on standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import gc
import hashlib
import json
import os
import random
import resource
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from checkpoint import fuzz_models
from checkpoint.fuzz_damage import damaged
from checkpoint.fuzz_models import SEQUENCE_LENGTH, VOCABULARY
from mesh_transformer.api import tokenizer_of
from mesh_transformer.checkpoint.logical import fingerprint
from mesh_transformer.checkpoint.manifest import write_manifest
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.weights import Weights, piece_shape
from mesh_transformer.config.errors import UserError
from mesh_transformer.data.source import open_source

LONGEST = 20  # seconds
MOST_MEMORY = 256 * 2**20  # bytes that a case may need beyond what all before it did
MOST_ADDRESSES = 2**32  # bytes of address space, touched or not; threads and their heaps take some
LONGEST_MESSAGE = 1000  # letters

# What may come of damage when no error is raised. "equal": nothing but what was there before. "part": sequences that
# were there before, as a cut between two records leaves sound ones. "length": anything, unless the file has become
# longer or shorter. "any": anything.
Rule = Literal["equal", "part", "length", "any"]


@dataclasses.dataclass(frozen=True)
class Subject:
    """Files of one kind in one of the models of `fuzz_models`. anew: the manifest is made to fit the damage."""

    model: str
    files: str
    rule: Rule
    anew: bool = False


SUBJECTS = [
    *(Subject("v1", "step_5/shard_*/*.npz", "equal"), Subject("v1", "meta.json", "any")),
    *(Subject("v1", "config.json", "any"), Subject("v1", "tokenizer.json", "any")),
    *(Subject("v1-slim", "step_5/shard_*/*.npz", "equal"), Subject("v1-slim", "config.json", "any")),
    *(Subject("v1-float16", "step_5/shard_*/*.npz", "equal"), Subject("v1-converted", "**/*", "equal")),
    *(Subject("v2", "step_7/*/*.npz", "equal"), Subject("v2", "step_7/meta.json", "any")),
    *(Subject("v2", "meta.json", "any"), Subject("v2", "config.json", "any")),
    *(Subject("v2-hosts", "step_7/*/*.npz", "equal"), Subject("v2-converted", "**/*", "equal")),
    *(Subject("native", "state/*/[0-9]*", "equal"), Subject("native", "state/*/.zarray", "equal")),
    *(Subject("native", "state/_METADATA", "equal"), Subject("native", "*.json", "equal")),
    *(Subject("native", "state/**/*", "any", anew=True), Subject("native", "checkpoint.json", "any", anew=True)),
    *(Subject("run", "checkpoints/*/**/*", "equal"), Subject("run", "checkpoints/3/state/**/*", "any", anew=True)),
    *(Subject("hf", "*", "equal"), Subject("hf-bare", "model.safetensors", "length")),
    *(Subject("hf-bare", "config.json", "any"), Subject("hf-bare", "tokenizer.json", "any")),
    *(Subject("hf-shards", "*.safetensors", "length"), Subject("hf-shards", "*.index.json", "any")),
    *(Subject("bin", "pytorch_model.bin", "equal"), Subject("bin-deflated", "pytorch_model.bin", "equal")),
    *(Subject("bin-old", "pytorch_model.bin", "any"), Subject("bin-shards", "*.bin", "equal")),
    *(Subject("bin-shards", "*.index.json", "any"), Subject("tar", "*.tar", "equal")),
    *(Subject("tar-gz", "*.tar.gz", "equal"), Subject("tar-zst", "*.tar.zst", "equal")),
    *(Subject("records", "?.tfrecords", "part"), Subject("records", ".*.offsets", "equal")),
    *(Subject("records-zstd", "*.tfrecords", "part"), Subject("records-index", "*.index", "any")),
]


# --- What is read ---


def read_all(place: Path) -> dict[str, Any]:
    """Everything that the place means, in values that can be compared."""
    if place.name.startswith("records"):
        spec = str(place / "all.index") if place.name == "records-index" else str(place)
        source = open_source(spec, sequence_length=SEQUENCE_LENGTH, n_vocab=VOCABULARY)
        return {"sequences": [source[i].tolist() for i in range(len(source))]}
    archives = [path for path in place.iterdir() if ".tar" in path.name]
    weights = open_weights(archives[0] if archives else place)
    tokenizer = tokenizer_of(weights)
    return {
        "model": weights.cfg.to_dict(),
        "step": weights.step,
        "counters": weights.counters,
        "extras": dict(weights.extras),
        "digest": fingerprint(weights).digest,
        "values": _values(weights),
        "tokenizer": tokenizer.sha256 if tokenizer else None,
    }


def _values(weights: Weights) -> str:
    """sha256 of the bits of every piece, the moments among them."""
    sha256 = hashlib.sha256()
    for kind in weights.kinds():
        for piece in weights.order():
            values = weights.read(piece, kind)
            assert values.shape == piece_shape(weights.cfg, piece), f"{kind} {piece} has shape {values.shape}"
            assert values.dtype == weights.dtype_of(piece.path, kind), f"{kind} {piece} is {values.dtype}"
            sha256.update(values.tobytes())
    return sha256.hexdigest()


# --- One case ---


@dataclasses.dataclass(frozen=True)
class Case:
    number: int
    subject: Subject
    file: Path
    operation: str
    data: bytes
    rule: Rule


def case_of(seed: int, number: int, root: Path) -> Case:
    """The subjects take turns; file and damage are drawn."""
    rng = random.Random(f"{seed} {number}")
    subject = SUBJECTS[number % len(SUBJECTS)]
    place = root / subject.model
    if ".offsets" in subject.files:
        read_all(place)  # which makes them
    # By size first: Orbax gives its files random names.
    files = sorted((path for path in place.glob(subject.files) if path.is_file()), key=lambda p: (p.stat().st_size, p))
    file = rng.choice(files)
    original = file.read_bytes()
    operation, data = damaged(original, rng)
    rule = subject.rule
    listed = (place / "conversion.json").exists() or (rule == "equal" and subject.model in ("native", "run"))
    if operation == "inside" and not listed and ".tar" not in file.name:
        rule = "any"  # the checksums were made to fit
    if rule == "length" and (len(data) == len(original) or operation == "json value"):
        rule = "any"
    return Case(number, subject, file, operation, data, rule)


def fault_of(case: Case, place: Path, sound: dict[str, Any]) -> tuple[str, str | None]:
    """What came of it ("raised", "equal" or "other"), and what is wrong with that."""
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    try:
        found = read_all(place)
    except UserError as error:
        return "raised", _fault_of_error(error, place)
    except MemoryError:
        return "escaped", "MemoryError"
    except BaseException as error:
        return "escaped", "".join(traceback.format_exception(error)[-12:])
    finally:
        faulthandler.cancel_dump_traceback_later()
    if found == sound:
        return "equal", None if case.rule != "length" else "a file of another length was not noticed"
    if case.rule == "part" and all(sequence in sound["sequences"] for sequence in found["sequences"]):
        return "other", None
    return "other", None if case.rule == "any" else f"damage went by unseen: {_what_differs(found, sound)}"


def _fault_of_error(error: UserError, place: Path) -> str | None:
    message = str(error)
    if str(place) not in message and "tokenizer tokenizer.json" not in message:
        return f"the message does not name the place: {message!r}"
    if message.count("\n") > 1 or len(message) > LONGEST_MESSAGE + len(str(place)):
        return f"the message is too long: {message[:2000]!r}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"huge allocation: {message!r}"
        cause = cause.__cause__ or cause.__context__
    return None


def _what_differs(found: dict[str, Any], sound: dict[str, Any]) -> str:
    return ", ".join(f"{key} {found[key]!r:.200}" for key in sound if found[key] != sound[key])


@contextlib.contextmanager
def replaced(case: Case, place: Path) -> Iterator[None]:
    """The damaged file in its place; another inode, as the sound one may still be mapped into memory."""
    kept = place.parent / f"{case.file.name}.kept"
    other = [path for path in place.glob(".*.offsets") if path != case.file]
    for path in other if place.name.startswith("records") else []:
        path.unlink()  # the damage is to be seen anew, not what was noted before
    os.rename(case.file, kept)
    case.file.write_bytes(case.data)
    if case.subject.anew:
        manifests = list(place.rglob("manifest.json"))
        before = {path: path.read_bytes() for path in manifests}
        for path in manifests:
            write_manifest(path.parent)
    try:
        yield
    finally:
        os.replace(kept, case.file)
        if case.subject.anew:
            for path, data in before.items():
                path.write_bytes(data)


def limit_memory() -> None:
    """From now on a large allocation fails."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_ADDRESSES, resource.RLIM_INFINITY))


def run(root: Path, seed: int, first: int, count: int) -> None:
    if not root.exists():
        fuzz_models.make(root)
    cases = range(first, first + count)
    models = {SUBJECTS[number % len(SUBJECTS)].model for number in cases}
    sound = {name: read_all(root / name) for name in sorted(models)}
    limit_memory()
    gc.collect()
    gc.freeze()  # so that collecting after every case is quick
    warnings.simplefilter("error")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in cases:
        case = case_of(seed, number, root)
        place = root / case.subject.model
        about = {"case": number, "file": str(case.file.relative_to(root)), "operation": case.operation}
        print(json.dumps(about), flush=True)
        with replaced(case, place):
            outcome, fault = fault_of(case, place, sound[case.subject.model])
        gc.collect()
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if 1024 * (now - most) > MOST_MEMORY:
            fault = f"took {(now - most) / 1024:.0f} MiB"
        most = max(most, now)
        print(json.dumps({**about, "outcome": outcome, "rule": case.rule, "fault": fault}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the sound models are, or are to be made")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    arguments = parser.parse_args()
    run(arguments.directory.absolute(), arguments.seed, arguments.first, arguments.count)
    sys.stdout.flush()
    os._exit(0)  # the libraries' threads would take their time
