"""`mesh-transformer prepare`."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mesh_transformer.data.options import PrepareReport

_SHOWN = 300  # characters of the first sequence


def prepare(
    inputs: list[str] = typer.Argument(
        None,
        help="Text (.txt, .jsonl; with .gz, .xz or .zst), .tar.gz, .tar.xz, .parquet, directories of these, or URLs.",
    ),
    out: str | None = typer.Option(None, "--out", metavar="DIR/NAME", help="What is written begins with this."),
    tokenizer: str | None = typer.Option(None, help="gpt2, bytes or a tokenizer.json.  [default: gpt2]"),
    sequence_length: int = typer.Option(2048, help="Tokens that the model sees at once; a record holds one more."),
    validation_fraction: float = typer.Option(0.0, help="Part of the documents kept apart as NAME.val.index."),
    seed: int = typer.Option(10, help="Of the shuffles."),
    min_unique_tokens: int = typer.Option(0, help="Drop sequences with fewer distinct tokens; 0 keeps all."),
    n_repack_epochs: int = typer.Option(1, help="Epochs written one after the other, each packed anew."),
    preserve_data_order: bool = typer.Option(False, "--preserve-data-order", help="No shuffling."),
    treat_eot_as_text: bool = typer.Option(
        False, "--treat-eot-as-text", help="<|endoftext|> in the text does not divide documents."
    ),
    keep_tail: bool = typer.Option(
        False, "--keep-tail", help="Keep what does not fill the last sequence, filled up with tokens not learned."
    ),
    ftfy: bool = typer.Option(False, "--normalize-with-ftfy", help="Mend the text of each document (NFKC)."),
    detokenize: bool = typer.Option(
        False, "--normalize-with-wikitext-detokenize", help="Undo WikiText's tokenization of each document."
    ),
    invalid_utf8: str = typer.Option("refuse", help="Bytes that are not UTF-8: refuse, replace (by U+FFFD) or skip."),
    template: str | None = typer.Option(
        None, help="The .jsonl holds examples: plain, question or a TOML file. Only the answers are learned."
    ),
    cut_long: bool = typer.Option(False, "--cut-long", help="Cut examples that are too long; else they are left out."),
    workers: int = typer.Option(
        0, min=0, show_default=False, help="Threads or processes that tokenize.  [default: one for each core]"
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a data set of this name."),
    verbose: bool = typer.Option(False, "--verbose", help="Print the sequences that --min-unique-tokens drops."),
    inspect: str | None = typer.Option(None, metavar="FILE", help="Show the records of an index or file, and no more."),
    limit: int = typer.Option(5, min=0, help="Records that --inspect shows."),
) -> None:
    """Turn text into TFRecords of token ids and an index that `train` reads."""
    from mesh_transformer.config.errors import UserError

    if inspect is not None:
        if inputs or out:
            raise UserError("--inspect only reads; leave the inputs and --out away, or --inspect")
        _inspect(inspect, tokenizer, limit)
        return
    if not inputs:
        raise UserError("no input given; expected files of text or directories of them")
    if not out:
        raise UserError("--out is missing; expected DIR/NAME, such as --out data/notes")
    from mesh_transformer.cli.console import StageDisplay, note
    from mesh_transformer.data.prepare import prepare as prepare_data
    from mesh_transformer.data.tokenizer import load_tokenizer

    if workers:
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # read when the tokenizers library first starts its threads
    with _ended_by_terminate(), StageDisplay(in_bytes=True) as display:
        report = prepare_data(
            inputs,
            out,
            tokenizer=load_tokenizer(tokenizer or "gpt2"),
            progress=display.progress,
            show_dropped=(lambda text: note(f"dropped: {text}")) if verbose else None,
            sequence_length=sequence_length,
            validation_fraction=validation_fraction,
            seed=seed,
            preserve_order=preserve_data_order,
            treat_eot_as_text=treat_eot_as_text,
            min_unique_tokens=min_unique_tokens,
            n_repack_epochs=n_repack_epochs,
            keep_tail=keep_tail,
            ftfy=ftfy,
            detokenize=detokenize,
            invalid_utf8=invalid_utf8,
            template=template,
            cut_long=cut_long,
            workers=workers or _cores(),
            overwrite=overwrite,
        )
    _print(report)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _ended_by_terminate() -> Iterator[None]:
    """While it lasts, SIGTERM ends the process as an error does: temporary files go, workers end."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is told of signals
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(report: PrepareReport) -> None:
    typer.echo(f"{report.documents + report.validation_documents:,} documents, {report.tokens:,} tokens")
    typer.echo(f"{report.sequences:,} sequences in {report.records}, listed in {report.index}")
    if report.validation_index is not None:
        typer.echo(
            f"{report.validation_sequences:,} sequences of {report.validation_documents:,} documents in "
            f"{report.validation_records}, listed in {report.validation_index}"
        )
    typer.echo(
        f"dropped: {report.trailing_tokens:,} tokens that did not fill a last sequence, "
        f"{report.filtered_sequences:,} sequences with too few distinct tokens"
    )
    more = {
        "empty documents": report.empty_documents,
        "examples longer than a sequence": report.too_long_examples,
        "examples with nothing to learn": report.unlearned_examples,
        "bytes that are not UTF-8": report.invalid_bytes,
    }
    if any(more.values()):
        typer.echo(f"also dropped or mended: {', '.join(f'{n:,} {what}' for what, n in more.items() if n)}")
    if report.skipped:
        typer.echo(f"not text, skipped: {', '.join(report.skipped)}")
    rate = report.input_bytes / max(report.seconds, 1e-3)
    typer.echo(f"read {report.input_bytes / 1e6:,.1f} MB in {report.seconds:,.1f} s, {rate / 1e6:,.1f} MB/s")
    shown = report.first_sequence[:_SHOWN] + ("..." if len(report.first_sequence) > _SHOWN else "")
    typer.echo(f"first sequence: {shown!r}")


def _inspect(spec: str, tokenizer: str | None, limit: int) -> None:
    from mesh_transformer.data.record import data_record
    from mesh_transformer.data.showing import RecordCounts, show_records
    from mesh_transformer.data.tokenizer import load_tokenizer

    if tokenizer is None:
        record = data_record(spec)
        tokenizer = record.tokenizer if record is not None else "gpt2"
    counts = RecordCounts()
    for line in show_records(spec, load_tokenizer(tokenizer), limit, counts):
        typer.echo(line)
    typer.echo(
        f"{counts.records:,} records, {counts.ids:,} ids, {counts.learned:,} of them learned, "
        f"{counts.ends:,} ends of text; tokenizer {tokenizer}"
    )
