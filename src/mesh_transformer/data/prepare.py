"""Text to TFRecords: the pipeline of docs/formats.md, section 10, in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.config.errors import DataError
from mesh_transformer.data.documents import TextFile, Utf8, find_text_files, read_documents, read_objects
from mesh_transformer.data.encoding import (
    Divider,
    Encoded,
    EncodeExamples,
    EncodeText,
    batched,
    cut_pieces,
    encode_batches,
    may_cut,
)
from mesh_transformer.data.files import late_writer, make_directory, write_atomic
from mesh_transformer.data.options import PrepareOptions, PrepareReport
from mesh_transformer.data.pack import Packing, Tally, one_each, pack
from mesh_transformer.data.record import DataRecord, data_record, write_data_record
from mesh_transformer.data.spool import Spool
from mesh_transformer.data.supervised import load_template
from mesh_transformer.data.tfrecord import write_records
from mesh_transformer.data.tokenizer import BUILT_IN, END_OF_TEXT, Tokenizer

__all__ = ["DataRecord", "PrepareOptions", "PrepareReport", "data_record", "prepare"]

_REPORTED_ROWS = 256
_ID_BYTES = 4  # as which the progress of writing counts ids

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class _Counts:
    """What happened to the text on its way into the spool."""

    empty: int = 0
    too_long: int = 0
    nothing_learned: int = 0
    invalid_bytes: int = 0


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer,
    progress: Progress | None = None,
    show_dropped: Callable[[str], None] | None = None,
    **options: Any,
) -> PrepareReport:
    """Packs text into `out_{count}.tfrecords`, and writes `out.index` and the data's record `out.json`.

    The tokens wait in a file without a name beside `out`; memory holds some batches of text, the largest document where
    it is normalized, and sixteen bytes for each document and sequence.

    Args:
        inputs: text files and directories of them (not their subdirectories), local or URLs.
        out: directory and base name of what is written.
        progress: called as progress(stage, done, total), in bytes: of the files, then of the ids at four each.
        show_dropped: called with the text of each sequence that is dropped for its few distinct ids.
        options: the fields of `PrepareOptions`.

    Raises:
        DataError: an input is missing, malformed, or holds too little text; `out` exists already.
        ConfigError: an option's value is impossible.
        RunError: a worker process was killed.
    """
    out, asked, begun = Path(out), PrepareOptions(**options), time.monotonic()
    old = _check_target(out, asked, tokenizer)
    report = progress or (lambda stage, done, total: None)
    generator = random.Random(asked.seed)
    files, skipped = find_text_files(inputs)
    if asked.preserve_order:
        files.sort(key=lambda file: file.path)
    else:
        generator.shuffle(files)
    # Complements need a sign; two bytes an id are enough for most vocabularies.
    narrow = asked.template is None and tokenizer.n_vocab <= 1 << 16
    with Spool(out.parent, np.dtype(np.uint16 if narrow else np.int32)) as spool:
        counts = _fill(spool, files, tokenizer, asked, report)
        n_parts = spool.ends().size
        if not n_parts:
            _raise_no_text(files, counts)
        held_out = _held_out(n_parts, asked)
        training = array("q", (i for i in range(n_parts) if i not in held_out))
        if not asked.preserve_order:
            generator.shuffle(training)
        _check_enough(spool, training, asked, "the text")
        validation = array("q", sorted(held_out))
        if held_out:
            _check_enough(spool, validation, asked, f"the validation part ({len(held_out)} documents)")
        writer = _Writer(out, tokenizer, asked, report, show_dropped)
        written = writer.write(spool, training, validation, None if asked.preserve_order else generator)
        tokens = spool.size
    for path in old:
        if path not in written.values():
            path.unlink(missing_ok=True)
    return PrepareReport(
        index=written["index"],
        records=written["records"],
        validation_index=written.get("validation_index"),
        validation_records=written.get("validation_records"),
        data_record=written["data_record"],
        documents=n_parts - len(held_out),
        validation_documents=len(held_out),
        tokens=tokens,
        sequences=writer.tally.rows,
        validation_sequences=writer.validation_tally.rows,
        trailing_tokens=writer.tally.trailing + writer.validation_tally.trailing,
        filtered_sequences=writer.tally.filtered + writer.validation_tally.filtered,
        empty_documents=counts.empty,
        too_long_examples=counts.too_long,
        unlearned_examples=counts.nothing_learned,
        invalid_bytes=counts.invalid_bytes,
        skipped=tuple(skipped),
        first_sequence=writer.first,
        input_bytes=sum(file.size for file in files),
        seconds=time.monotonic() - begun,
    )


def _check_target(out: Path, asked: PrepareOptions, tokenizer: Tokenizer) -> list[Path]:
    """What of an earlier data set of this name is to go; raises DataError where `out` or the tokenizer will not do."""
    if "://" in os.fspath(out) or re.match(r"[a-z0-9]+:/", os.fspath(out)):
        raise DataError(f"--out {out} is a URL; expected a local DIR/NAME, copy the files there afterwards")
    if not out.name or out.name in (".", ".."):
        raise DataError(f"--out {out} has no name; expected DIR/NAME, such as data/notes")
    if tokenizer.end_of_text is None:
        raise DataError(f"tokenizer {tokenizer.name} has no end-of-text token to put after each document")
    old = _existing(out)
    if old and not asked.overwrite:
        raise DataError(f"{old[0]} exists already; choose another name or pass --overwrite")
    return old


# ------------------------------------------------------------------------------------------------------- text to tokens


def _fill(
    spool: Spool, files: list[TextFile], tokenizer: Tokenizer, asked: PrepareOptions, report: Progress
) -> _Counts:
    """Every document's ids into the spool, in order: with end-of-text appended, or as examples."""
    utf8, divider = Utf8(asked.invalid_utf8), Divider(not asked.treat_eot_as_text)
    total = sum(file.size for file in files)

    def read(reader: Callable[..., Iterator[Any]]) -> Iterator[Any]:
        before = 0
        for file in files:

            def progress(n: int, before: int = before, size: int = file.size) -> None:
                report("tokenizing", before + min(n, size), total)

            yield from reader(file, utf8, progress)
            before += file.size

    encoded: Iterable[Encoded]
    report("tokenizing", 0, total)
    if asked.template is not None:
        template = load_template(asked.template)
        examples = (template.segments(where, line) for where, line in read(read_objects))
        batches = batched(examples, lambda example: sum(len(text or "") for text, _ in example))
        encoded = encode_batches(EncodeExamples(tokenizer, asked.width, asked.cut_long), batches, asked.workers)
    else:
        whole = asked.ftfy or asked.detokenize
        pieces = cut_pieces(divider(read(read_documents)), cut=not whole and may_cut(tokenizer))
        work = EncodeText(tokenizer, asked.ftfy, asked.detokenize)
        encoded = encode_batches(work, batched(pieces, lambda piece: len(piece[0])), asked.workers)
    counts = _Counts()
    # Closed here: the workers end before an error is told.
    with contextlib.closing(encoded):  # type: ignore[type-var]
        for batch in encoded:
            spool.append(batch.ids, batch.ends)
            counts.too_long += batch.too_long
            counts.nothing_learned += batch.nothing_learned
    spool.finish()
    report("tokenizing", total, total)
    counts.empty, counts.invalid_bytes = divider.empty, utf8.invalid_bytes
    return counts


def _raise_no_text(files: list[TextFile], counts: _Counts) -> None:
    names = ", ".join(file.path for file in files[:3]) + (", ..." if len(files) > 3 else "")
    if counts.too_long or counts.nothing_learned:
        raise DataError(
            f"no example in {names} can be used: {counts.too_long} are longer than a sequence, "
            f"{counts.nothing_learned} have nothing to learn; raise --sequence-length or pass --cut-long"
        )
    raise DataError(f"no text in {names}: all empty")


def _held_out(n_parts: int, asked: PrepareOptions) -> set[int]:
    """The parts that are for validation."""
    if asked.validation_fraction == 0:
        return set()
    if n_parts < 2:
        raise DataError(
            "--validation-fraction needs at least two documents, but there is one; "
            f"divide the text with {END_OF_TEXT} or into files"
        )
    count = min(max(round(asked.validation_fraction * n_parts), 1), n_parts - 1)
    # A generator of its own: the training shuffles stay those of the original's sequence of calls.
    return set(random.Random(f"validation {asked.seed}").sample(range(n_parts), count))


def _check_enough(spool: Spool, parts: array[int], asked: PrepareOptions, what: str) -> None:
    if asked.template is not None:
        return
    chosen = np.frombuffer(parts, np.int64)
    tokens = int((spool.ends()[chosen] - spool.starts()[chosen]).sum())
    needed = 2 if asked.keep_tail else asked.width + 1
    if tokens < needed:
        raise DataError(
            f"{what} makes only {tokens} tokens, but one sequence needs {needed} at least; "
            f"give more text, lower --sequence-length {asked.sequence_length} or pass --keep-tail"
        )


# ------------------------------------------------------------------------------------------------------------- writing


def _named(out: Path, suffix: str) -> Path:
    # Not with_suffix: NAME may hold dots of its own.
    return out.with_name(out.name + suffix)


def _existing(out: Path) -> list[Path]:
    """What an earlier run left under this name, records first."""
    pattern = re.compile(re.escape(out.name) + r"(\.val)?_\d+\.tfrecords")
    records = sorted(path for path in out.parent.glob("*.tfrecords") if pattern.fullmatch(path.name))
    suffixes = (".index", ".val.index", ".json", ".tokenizer.json")
    return records + [path for path in (_named(out, suffix) for suffix in suffixes) if path.exists()]


class _Writer:
    """Writes every file of a data set, the indexes after their records."""

    def __init__(
        self,
        out: Path,
        tokenizer: Tokenizer,
        asked: PrepareOptions,
        report: Progress,
        show_dropped: Callable[[str], None] | None,
    ) -> None:
        self._out, self._tokenizer, self._asked, self._report = out, tokenizer, asked, report
        self._show_dropped = show_dropped
        self.tally, self.validation_tally = Tally(), Tally()
        self.first = ""

    def write(
        self, spool: Spool, training: array[int], validation: array[int], generator: random.Random | None
    ) -> dict[str, Path]:
        """The paths of what was written, by what they are. Raises DataError; then nothing new is left."""
        made, old = not self._out.parent.exists(), _existing(self._out)
        make_directory(self._out.parent)
        written: dict[str, Path] = {}
        try:
            self._write(written, spool, training, validation, generator)
        except BaseException:
            with contextlib.suppress(OSError):
                for path in written.values():
                    if path not in old:
                        path.unlink(missing_ok=True)
                if made:
                    self._out.parent.rmdir()
            raise
        return written

    def _write(
        self,
        written: dict[str, Path],
        spool: Spool,
        training: array[int],
        validation: array[int],
        generator: random.Random | None,
    ) -> None:
        """Puts each path into `written` when it is there."""
        asked, tokenizer = self._asked, self._tokenizer
        packing = self._packing(asked.n_repack_epochs, generator)
        written["records"] = self._rows("", spool, training, packing, self.tally)
        if validation:
            held = self._rows(".val", spool, validation, self._packing(1, None), self.validation_tally)
            written["validation_records"] = held
            written["validation_index"] = self._index(".val", held)
        if tokenizer.name not in BUILT_IN:
            written["tokenizer"] = _named(self._out, ".tokenizer.json")
            write_atomic(written["tokenizer"], tokenizer.to_bytes())
        written["data_record"] = _named(self._out, ".json")
        record = DataRecord(
            tokenizer=str(written.get("tokenizer", tokenizer.name)),
            tokenizer_sha256=tokenizer.sha256,
            n_vocab=tokenizer.n_vocab,
            sequence_length=asked.sequence_length,
            sequences=self.tally.rows,
            validation_sequences=self.validation_tally.rows,
        )
        write_data_record(written["data_record"], record)
        written["index"] = self._index("", written["records"])

    def _packing(self, n_epochs: int, generator: random.Random | None) -> Packing:
        asked, show = self._asked, self._show_dropped
        return Packing(
            width=asked.width,
            min_unique=asked.min_unique_tokens,
            n_epochs=n_epochs,
            generator=generator,
            pad=self._tokenizer.end_of_text if asked.keep_tail or asked.template is not None else None,
            dropped=(lambda row: show(self._tokenizer.decode(row.tolist()))) if show else None,
        )

    def _rows(self, kind: str, spool: Spool, parts: array[int], packing: Packing, tally: Tally) -> Path:
        stage = "writing validation" if kind else "writing"
        chosen = np.frombuffer(parts, np.int64)
        if self._asked.template is not None:
            rows, expected = one_each(spool, parts, packing, tally), len(parts) * packing.width
        else:
            rows, expected = pack(spool, parts, packing, tally), int((spool.ends() - spool.starts())[chosen].sum())
        total = expected * packing.n_epochs * _ID_BYTES

        def counted() -> Iterator[np.ndarray]:
            for i, row in enumerate(rows):
                if i == 0 and not kind:
                    self.first = self._tokenizer.decode(np.where(row < 0, ~row, row).tolist())
                if i % _REPORTED_ROWS == 0:
                    self._report(stage, min(i * packing.width * _ID_BYTES, total), total)
                yield row

        with late_writer(self._out.parent, f"{self._out.name}{kind}.tfrecords") as late:
            write_records(late.file, counted())
            if not tally.rows:
                raise DataError(
                    f"{'the validation part' if kind else 'the text'}: --min-unique-tokens drops all "
                    f"{tally.filtered} sequences; lower it"
                )
            late.path = _named(self._out, f"{kind}_{tally.rows}.tfrecords")
        self._report(stage, total, total)
        return late.path

    def _index(self, kind: str, records: Path) -> Path:
        index = _named(self._out, f"{kind}.index")
        write_atomic(index, f"{records.name}\n".encode())
        return index
