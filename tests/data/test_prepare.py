from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mesh_transformer.config.errors import ConfigError, DataError
from mesh_transformer.data import prepare as prepare_module
from mesh_transformer.data.prepare import PrepareReport, data_record, prepare
from mesh_transformer.data.source import open_source
from mesh_transformer.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

T = 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_TRANSFORMER_CACHE", str(tmp_path / "user-cache"))


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


def words(seed: int, count: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(["alpha", "beta", "gamma", "delta", "the", "a\n"]) for _ in range(count))


def read(path: Path, length: int = T) -> list[list[int]]:
    source = open_source(str(path), sequence_length=length, n_vocab=50400)
    return [source[i].tolist() for i in range(len(source))]


@pytest.mark.parametrize(("tokens", "sequences", "trailing"), [(18, 1, 1), (33, 1, 16), (34, 1, 17), (35, 2, 1)])
def test_trailing_tokens_are_dropped_even_when_they_would_fill_a_row(
    tmp_path: Path, tokens: int, sequences: int, trailing: int
) -> None:
    (tmp_path / "in.txt").write_text("a" * (tokens - 1))  # one byte a token, and the end
    report = prepare([tmp_path / "in.txt"], tmp_path / "set", tokenizer=load_tokenizer("bytes"), sequence_length=T)
    assert (report.tokens, report.sequences, report.trailing_tokens) == (tokens, sequences, trailing)


def test_inputs_of_every_kind(tmp_path: Path) -> None:
    directory = tmp_path / "texts"
    (directory / "below").mkdir(parents=True)
    (directory / "below" / "not.txt").write_text("not read")
    (directory / "b.txt").write_bytes(b"one\r\ntwo\rthree")
    (directory / "a.jsonl").write_text('"plain"\n\n{"text": ["x", "y"], "meta": {}}\n{"text": ""}')
    (directory / "notes.md").write_text("skipped")
    report = prepare(
        [directory],
        tmp_path / "set",
        tokenizer=load_tokenizer("bytes"),
        sequence_length=1,
        preserve_order=True,
    )
    ids = list(itertools.chain.from_iterable(read(report.index, 1)))
    expected = [*b"plain", 256, *b"x\n\ny", 256, *b"one\ntwo\nthree", 256]
    assert ids == expected[: len(ids)]
    assert len(expected) - len(ids) == report.trailing_tokens == 1
    assert report.documents == 3
    assert report.skipped == (str(directory / "notes.md"),)


def test_validation_is_by_document(tmp_path: Path) -> None:
    texts = [f"{chr(ord('a') + i)}" * 40 for i in range(20)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))

    def run(name: str, seed: int) -> tuple[PrepareReport, set[int], set[int]]:
        tokenizer = load_tokenizer("bytes")
        out = tmp_path / name
        report = prepare(
            [tmp_path / "in.jsonl"], out, tokenizer=tokenizer, sequence_length=T, validation_fraction=0.2, seed=seed
        )
        assert report.validation_index == tmp_path / f"{name}.val.index"
        train, validation = read(report.index), read(report.validation_index)
        assert (len(train), len(validation)) == (report.sequences, report.validation_sequences)
        assert report.validation_records == tmp_path / f"{name}.val_{len(validation)}.tfrecords"
        return report, set(itertools.chain(*train)) - {256}, set(itertools.chain(*validation)) - {256}

    report, train, validation = run("one", 1)
    assert (report.documents, report.validation_documents) == (16, 4)
    assert len(validation) == 4
    assert not train & validation
    assert run("again", 1)[1:] == (train, validation)
    assert run("other", 2)[2] != validation
    for spec in (report.index, report.validation_index, report.records, report.validation_records):
        record = data_record(str(spec))
        assert record is not None
        assert record.validation_sequences == report.validation_sequences


def test_the_data_says_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text(words(1, 400))
    trained = train_bpe([words(1, 400)], 300)
    for name, tokenizer in (("b.x", load_tokenizer("bytes")), ("t", trained)):
        directory = tmp_path / name
        report = prepare([tmp_path / "in.txt"], directory / name, tokenizer=tokenizer, sequence_length=T)
        for spec in (report.index, report.records, directory, directory / "*.tfrecords"):
            record = data_record(str(spec))
            assert record is not None, spec
            assert (record.sequence_length, record.sequences) == (T, report.sequences)
            again = load_tokenizer(record.tokenizer)
            assert again.sha256 == record.tokenizer_sha256 == tokenizer.sha256
            assert again.encode("alpha") == tokenizer.encode("alpha")
    assert (tmp_path / "t" / "t.tokenizer.json").exists()
    assert not (tmp_path / "b.x" / "b.x.tokenizer.json").exists()

    # An index of one's own has the record that its files share.
    mixed = tmp_path / "mixed.index"
    files = {name: next((tmp_path / name).glob("*.tfrecords")) for name in ("b.x", "t")}
    mixed.write_text(f"{files['t']}\n{files['t']}\n")
    assert data_record(str(mixed)) is not None
    mixed.write_text(f"{files['t']}\n{files['b.x']}\n")
    assert data_record(str(mixed)) is None
    (tmp_path / "mixed.json").write_text('{"somebody": "else"}')
    assert data_record(str(mixed)) is None
    for content in ("{", '{"format": "mesh-transformer data", "tokenizer": "gpt2"}'):
        (tmp_path / "t" / "t.json").write_text(content)
        with pytest.raises(DataError, match=r"t\.json: the data's record"):
            data_record(str(tmp_path / "t"))


def test_an_existing_set_is_kept_unless_told(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    bytes_tokenizer = load_tokenizer("bytes")

    def run(text: str, tokenizer: Tokenizer = bytes_tokenizer, **options: bool) -> PrepareReport:
        source.write_text(text)
        return prepare([source], tmp_path / "d" / "set", tokenizer=tokenizer, sequence_length=T, **options)

    first = run("a" * 100, train_bpe(["other"], 260))
    (tmp_path / "d" / "set_more_1.tfrecords").write_bytes(b"another set's")
    before = {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()}
    with pytest.raises(DataError, match=r"set_\d+\.tfrecords exists already.*--overwrite"):
        run("b" * 300)
    assert {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()} == before
    second = run("b" * 300, overwrite=True)
    assert second.records != first.records
    assert sorted(os.listdir(tmp_path / "d")) == ["set.index", "set.json", "set_17.tfrecords", "set_more_1.tfrecords"]
    assert {token for row in read(second.index) for token in row} == {ord("b")}


def test_a_failure_writes_nothing(tmp_path: Path) -> None:
    cases: list[tuple[str, bytes, str]] = [
        ("a.txt", b"abc\xffdef", r"a\.txt: byte 3 \(0xff\) is not UTF-8"),
        ("a.jsonl", b'"fine"\n{"text": "\xc3("}\n', r"a\.jsonl: byte 17 \(0xc3\) is not UTF-8"),
        ("a.jsonl", b'"fine"\n{"text": "torn', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"body": "text"}', r"a\.jsonl, line 1: no text"),
        ("a.jsonl", b'\n{"text": ["a", 3]}', r"a\.jsonl, line 2: no text"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: .*surrogate"),
        ("a.txt", b"", "no text in .*all empty"),
        ("a.txt", b"<|endoftext|><|endoftext|>", "no text in .*all empty"),
        ("a.txt", b"short", "makes only 6 tokens, but one sequence needs 18"),
        ("a.md", b"text", r"a\.md: not a supported kind of text; expected a file ending in \.txt or \.jsonl"),
        ("a.jsonl.bz2", b"text", r"not a supported kind of text"),
    ]
    for name, content, says in cases:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=says):
            prepare([tmp_path / name], tmp_path / "new" / "set", tokenizer=load_tokenizer("bytes"), sequence_length=T)
    (tmp_path / "empty").mkdir()
    for given, says in (([tmp_path / "empty"], "no text in this directory"), ([tmp_path / "no"], "does not exist")):
        with pytest.raises(DataError, match=says):
            prepare(given, tmp_path / "new" / "set", tokenizer=load_tokenizer("bytes"))
    assert not (tmp_path / "new").exists()


def test_impossible_options(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 200)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"sequence_length": 0}, ConfigError, "--sequence-length 0"),
        ({"validation_fraction": 1.0}, ConfigError, "--validation-fraction 1.0"),
        ({"n_repack_epochs": 0}, ConfigError, "--n-repack-epochs 0"),
        ({"workers": 0}, ConfigError, "--workers 0"),
        ({"invalid_utf8": "ignore"}, ConfigError, "--invalid-utf8 ignore.*refuse, replace, skip"),
        ({"cut_long": True}, ConfigError, "--cut-long.*--template"),
        ({"template": "plain", "keep_tail": True}, ConfigError, "--keep-tail.*--template"),
        ({"template": "plain", "ftfy": True}, ConfigError, "--normalize-with-ftfy.*--template"),
        ({"validation_fraction": 0.1}, DataError, "at least two documents"),
        ({"min_unique_tokens": 3}, DataError, "--min-unique-tokens drops all 11 sequences"),
    ]
    for options, kind, says in bad:
        arguments = {"tokenizer": load_tokenizer("bytes"), "sequence_length": T} | options
        with pytest.raises(kind, match=says):
            prepare([tmp_path / "a.txt"], tmp_path / "set", **arguments)


def test_progress_counts_up_to_the_total(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 200)
    calls: list[tuple[str, int, int]] = []
    prepare(
        [tmp_path / "a.txt"],
        tmp_path / "set",
        tokenizer=load_tokenizer("bytes"),
        sequence_length=T,
        progress=lambda *call: calls.append(call),
    )
    # In bytes: those of the file, then four for each id, of which one is left over.
    n_ids = 201
    assert calls[0] == ("tokenizing", 0, 200)
    assert [call for call in calls if call[0] == "tokenizing"][-1] == ("tokenizing", 200, 200)
    assert [call for call in calls if call[0] == "writing"] == [
        ("writing", 0, 4 * n_ids),
        ("writing", 4 * n_ids, 4 * n_ids),
    ]
    assert [stage for stage, _ in itertools.groupby(call[0] for call in calls)] == ["tokenizing", "writing"]


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 200)
    for out, says in (("s3://bucket/set", "is a URL"), (tmp_path / "a.txt" / "set", "a.txt")):
        with pytest.raises(DataError, match=says):
            prepare([tmp_path / "a.txt"], out, tokenizer=load_tokenizer("bytes"), sequence_length=T)
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("step", ["write_records", "write_data_record"])
def test_a_late_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(["x" * 200] * 4))
    real = getattr(prepare_module, step)

    def full(*arguments: Any) -> None:
        real(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, step, full)
    with pytest.raises((DataError, OSError), match="No space left"):
        prepare(
            [tmp_path / "a.txt"],
            tmp_path / "new" / "set",
            tokenizer=load_tokenizer("bytes"),
            sequence_length=T,
            validation_fraction=0.3,
        )
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 200)
    # No process has this number: it is the greatest that the kernel could give, and more.
    (tmp_path / ".set.tfrecords.tmp-4194305").write_bytes(b"half")
    (tmp_path / ".other.tfrecords.tmp-4194305").write_bytes(b"of another data set")
    report = prepare([tmp_path / "a.txt"], tmp_path / "set", tokenizer=load_tokenizer("bytes"), sequence_length=T)
    assert sorted(os.listdir(tmp_path)) == [
        ".other.tfrecords.tmp-4194305", "a.txt", "set.index", "set.json", report.records.name
    ]  # fmt: skip


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_transformer.data.encoding._BATCH", 1 << 13)
    monkeypatch.setattr("mesh_transformer.data.encoding._PIECE", 1 << 11)
    monkeypatch.setattr("mesh_transformer.data.documents._PIECE_BYTES", 1 << 12)

    monkeypatch.setattr("mesh_transformer.data.pack._ROWS_AT_ONCE", 8)

    def peak(n_lines: int) -> int:
        with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
            for i in range(n_lines):
                file.write(f"{i} is a number, and this is text. " * 50 + "<|endoftext|>" * (i % 3 == 0))
        tracemalloc.start()
        try:
            options = {"tokenizer": load_tokenizer("bytes"), "min_unique_tokens": 1, "overwrite": True}
            report = prepare([tmp_path / "a.txt.gz"], tmp_path / "set", **options)
            assert report.tokens > 1600 * n_lines
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is made once
    assert peak(500) < 1.2 * peak(100)
