"""`prepare` against the pipeline told over again (prepare_oracle.py), token for token, for every option."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare_oracle import detokenized, rows_of

from mesh_transformer.data import encoding, spool
from mesh_transformer.data.prepare import PrepareReport, prepare
from mesh_transformer.data.showing import read_rows
from mesh_transformer.data.tokenizer import Tokenizer, load_tokenizer

T = 16
WORDS = ["alpha", "beta", "gamma 's", "the", "a\n", " , ", "@-@", "( x )", '" y "', "ﬁne", "= =", "N", "1 °", "dogs '"]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


def text(generator: random.Random, count: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(count))


def documents(seed: int, count: int = 12) -> list[str]:
    generator = random.Random(seed)
    made = [text(generator, 5 + 7 * i) for i in range(count)]
    made[3] = ""
    made[5] = f"<|endoftext|>{text(generator, 30)}<|endoftext|><|endoftext|>  <|endoftext|>{text(generator, 9)}"
    made[7] = "x " * 80  # few distinct tokens
    return made


def run(path: Path, made: list[str], tokenizer: Tokenizer, **options: Any) -> tuple[PrepareReport, list[list[int]]]:
    path.mkdir(exist_ok=True)
    (path / "in.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in made))
    report = prepare([path / "in.jsonl"], path / "set", tokenizer=tokenizer, sequence_length=T, **options)
    return report, [row.tolist() for _, row in read_rows(str(report.index))]


def check(path: Path, made: list[str], tokenizer: Tokenizer, **options: Any) -> PrepareReport:
    report, found = run(path, made, tokenizer, **options)
    change: list[Callable[[str], str]] = []
    if options.get("ftfy"):
        import ftfy

        change.append(lambda each: ftfy.fix_text(each, normalization="NFKC"))
    if options.get("detokenize"):
        change.append(detokenized)

    def changed(each: str) -> str:
        for step in change:
            each = step(each)
        return each

    assert tokenizer.end_of_text is not None
    eot_text = options.get("treat_eot_as_text", False)
    rows, trailing = rows_of(
        made,
        tokenizer.encode,
        tokenizer.end_of_text,
        width=T + 1,
        seed=options.get("seed", 10),
        preserve=options.get("preserve_order", False),
        min_unique=options.get("min_unique_tokens", 0),
        epochs=options.get("n_repack_epochs", 1),
        eot_text=eot_text,
        keep_tail=options.get("keep_tail", False),
        change=changed,
    )
    assert found == rows
    assert len(rows) > 20
    assert (report.sequences, report.trailing_tokens) == (len(rows), trailing)
    assert (report.filtered_sequences > 0) == (options.get("min_unique_tokens", 0) > 0)
    parts = [part for each in made for part in ([each] if eot_text else each.split("<|endoftext|>"))]
    assert report.tokens == sum(len(tokenizer.encode(changed(part))) + 1 for part in parts if part)
    assert (report.documents, report.empty_documents) == (len(list(filter(None, parts))), parts.count(""))
    return report


@pytest.mark.parametrize(
    ("preserve", "min_unique", "epochs", "eot_text", "keep_tail"),
    list(itertools.product([False, True], [0, 5], [1, 2, 3], [False, True], [False, True])),
)
def test_the_pipeline_told_over_again(
    tmp_path: Path, gpt2: Tokenizer, preserve: bool, min_unique: int, epochs: int, eot_text: bool, keep_tail: bool
) -> None:
    report = check(
        tmp_path,
        documents(1),
        gpt2,
        seed=4,
        preserve_order=preserve,
        min_unique_tokens=min_unique,
        n_repack_epochs=epochs,
        treat_eot_as_text=eot_text,
        keep_tail=keep_tail,
    )
    assert report.records.name == f"set_{report.sequences}.tfrecords"


@pytest.mark.parametrize(("ftfy", "detokenize"), [(True, False), (False, True), (True, True)])
def test_normalized_text(tmp_path: Path, gpt2: Tokenizer, ftfy: bool, detokenize: bool) -> None:
    made = documents(2)
    made[2] += " &amp; schÃ¶n"
    check(tmp_path, made, gpt2, ftfy=ftfy, detokenize=detokenize, n_repack_epochs=2)
    plain = run(tmp_path, made, gpt2, overwrite=True)[1]
    assert run(tmp_path, made, gpt2, ftfy=ftfy, detokenize=detokenize, overwrite=True)[1] != plain


@pytest.mark.parametrize("seed", range(8))
def test_options_by_chance(tmp_path: Path, seed: int) -> None:
    by_chance(tmp_path, seed)


@pytest.mark.long
def test_many_options_by_chance(tmp_path: Path) -> None:
    for seed in range(8, 300):
        by_chance(tmp_path / str(seed), seed)


def by_chance(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    check(
        path,
        documents(seed, chance.randrange(10, 30)),
        load_tokenizer("bytes"),
        seed=chance.randrange(1000),
        preserve_order=chance.random() < 0.5,
        min_unique_tokens=chance.choice([0, 4, 9]),
        n_repack_epochs=chance.randrange(1, 5),
        treat_eot_as_text=chance.random() < 0.5,
        keep_tail=chance.random() < 0.5,
        detokenize=chance.random() < 0.5,
    )


def test_keeping_the_tail_changes_no_other_sequence(tmp_path: Path, gpt2: Tokenizer) -> None:
    plain = run(tmp_path, documents(1), gpt2)
    kept = run(tmp_path, documents(1), gpt2, keep_tail=True, overwrite=True)
    assert kept[1][:-1] == plain[1]
    tail = kept[1][-1]
    assert len(tail) == T + 1 and tail.count(~50256) == T + 1 - plain[0].trailing_tokens > 0
    assert kept[0].trailing_tokens == 0


@pytest.mark.parametrize(("tokens", "rows"), [(17, 1), (18, 1), (19, 2), (34, 2)])
def test_a_tail_that_is_full_or_has_nothing_to_learn(tmp_path: Path, tokens: int, rows: int) -> None:
    # 18 ids are a row and one id more, which nothing predicts.
    report, found = run(tmp_path, ["a" * (tokens - 1)], load_tokenizer("bytes"), keep_tail=True)
    assert (report.sequences, len(found)) == (rows, rows)
    assert report.trailing_tokens == (tokens == 18)
    assert all(len(row) == T + 1 for row in found)


@pytest.mark.parametrize(("name", "detokenize"), [("gpt2", False), ("gpt2", True), ("bytes", False)])
def test_workers_and_pieces_do_not_change_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, detokenize: bool
) -> None:
    tokenizer = load_tokenizer(name)
    generator = random.Random(5)
    made = [
        *documents(3),
        *documents(4),
        *documents(5),
        *documents(6),
        text(generator, 3000),
        "no place to cut it" + "x" * 5000,
    ]
    options: dict[str, Any] = {"min_unique_tokens": 3, "n_repack_epochs": 2, "validation_fraction": 0.2}
    options["detokenize"] = detokenize
    whole = run(tmp_path / "whole", made, tokenizer, **options)
    monkeypatch.setattr(encoding, "_PIECE", 300)
    monkeypatch.setattr(encoding, "_BATCH", 900)
    batches = []
    monkeypatch.setattr(spool.Spool, "append", counted(spool.Spool.append, batches))
    for workers in (1, 2):
        batches.clear()
        again = run(tmp_path / str(workers), made, tokenizer, workers=workers, **options)
        assert again[1] == whole[1]
        assert len(batches) > 10
        assert again[0].validation_records is not None
        for file in ("set.index", "set.val.index", again[0].records.name, again[0].validation_records.name):
            assert (tmp_path / str(workers) / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def counted(function: Callable[..., None], calls: list[int]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        calls.append(1)
        function(*arguments)

    return call


def test_dropped_sequences_are_shown(tmp_path: Path) -> None:
    shown: list[str] = []
    report, rows = run(
        tmp_path,
        ["ab" * 20, "x" * 40, "some words of text, of which no letter comes often"],
        load_tokenizer("bytes"),
        min_unique_tokens=5,
        show_dropped=shown.append,
        preserve_order=True,
    )
    assert len(shown) == report.filtered_sequences > 2
    assert shown[0] == "ab" * 8 + "a"
    assert report.first_sequence == load_tokenizer("bytes").decode(rows[0]) == "x" * 13 + "<|endoftext|>som"
