"""Prompts with completions and conversations: only the answers are learned, and each example is a record."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mesh_transformer.config.errors import DataError
from mesh_transformer.data.prepare import PrepareReport, prepare
from mesh_transformer.data.showing import read_rows
from mesh_transformer.data.supervised import Template, load_template
from mesh_transformer.data.tokenizer import load_tokenizer

T = 31
END = 256
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "two"},
    ]
}


def template(tmp_path: Path, text: str) -> Template:
    path = tmp_path / "template.toml"
    path.write_text(text, encoding="utf-8")
    return load_template(str(path))


def run(path: Path, lines: list[Any], **options: Any) -> tuple[PrepareReport, list[list[int]]]:
    path.mkdir(exist_ok=True)
    (path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"template": "plain", "sequence_length": T, "preserve_order": True} | options
    report = prepare([path / "in.jsonl"], path / "set", tokenizer=load_tokenizer("bytes"), **options)
    return report, [row.tolist() for _, row in read_rows(str(report.index))]


def read_only(text: str) -> list[int]:
    return [~byte for byte in text.encode()]


def filled(ids: list[int]) -> list[int]:
    return ids + [~END] * (T + 1 - len(ids))


def test_a_prompt_and_its_completion(tmp_path: Path) -> None:
    lines = [{"prompt": "Hé?", "completion": " yes"}, {"prompt": "", "completion": "<|endoftext|>"}]
    report, rows = run(tmp_path, lines)
    assert rows == [filled([*read_only("Hé?"), *b" yes", END]), filled([*b"<|endoftext|>", END])]
    assert (report.documents, report.sequences, report.tokens) == (2, 2, 9 + 14)
    assert report.first_sequence.startswith("Hé? yes<|endoftext|><|endoftext|>")


def test_a_conversation(tmp_path: Path) -> None:
    _, (row,) = run(tmp_path, [CHAT], sequence_length=63)
    before, between = "Be brief.\n\nUser: 1+1\nAssistant: ", "User: ?\nAssistant: "
    expected = [*read_only(before), *b"2", END, *read_only(between), *b"two", END]
    assert row == expected + [~END] * (64 - len(expected))


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    own = template(
        tmp_path,
        'prompt = "Q {{{question}}}: {hint}{end_of_text}"\n'
        'completion = "A: {answer}, because {reason}{end_of_text}!\\n"\n',
    )
    line = {"question": "why", "hint": "", "answer": "so", "reason": "it is"}
    assert own.segments("here", line) == [
        ("Q {why}: ", False),
        (None, False),
        ("A: ", False),
        ("so, because it is", True),
        (None, True),
        ("!\n", False),
    ]
    report, (row,) = run(tmp_path / "set", [line], template=str(tmp_path / "template.toml"), sequence_length=63)
    expected = [*read_only("Q {why}: "), ~END, *read_only("A: "), *b"so, because it is", END, *read_only("!\n")]
    assert row == expected + [~END] * (64 - len(expected))
    assert report.tokens == len(expected)


def test_what_is_left_out_and_what_is_cut(tmp_path: Path) -> None:
    lines = [
        {"prompt": "fits", "completion": "x" * (T + 1 - 5)},
        {"prompt": "long", "completion": "x" * (T + 2 - 5)},
        {"prompt": "p" * (T + 1), "completion": "only the prompt is left"},
        {"messages": [{"role": "user", "content": "nobody answers"}]},
    ]
    report, rows = run(tmp_path, lines)
    assert rows == [[*read_only("fits"), *b"x" * (T - 4), END]]
    assert (report.too_long_examples, report.unlearned_examples, report.documents) == (2, 1, 1)
    report, rows = run(tmp_path, lines, cut_long=True, overwrite=True)
    assert rows[1:] == [[*read_only("long"), *b"x" * (T + 1 - 4)]]
    assert (report.too_long_examples, report.unlearned_examples, report.documents) == (0, 2, 2)
    with pytest.raises(DataError, match=r"no example in .*in\.jsonl can be used: 1 are longer .*, 1 have nothing"):
        run(tmp_path / "none", [lines[1], lines[3]])


def test_the_first_id_is_never_predicted(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('prompt = "{prompt}"\ncompletion = "{completion}"\n')
    lines = [{"prompt": "", "completion": "x"}, {"prompt": "", "completion": "xy"}]
    report, rows = run(tmp_path, lines, template=str(tmp_path / "own.toml"))
    assert rows == [filled([*b"xy"])]
    assert report.unlearned_examples == 1


def test_epochs_are_shuffled_anew(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "completion": chr(97 + i)} for i in range(20)]
    report, rows = run(tmp_path, lines, preserve_order=False, seed=3, n_repack_epochs=3, validation_fraction=0.25)
    assert (report.documents, report.validation_documents, report.sequences) == (15, 5, 45)
    assert report.validation_index is not None
    held = {row[1] for _, row in read_rows(str(report.validation_index))}
    letters = [row[1] for row in rows]
    order = [ord(line["completion"]) for line in lines if ord(line["completion"]) not in held]
    generator, expected = random.Random(3), []
    generator.shuffle(["the only file"])
    for _ in range(3):
        generator.shuffle(order)
        expected += order
    assert letters == expected


def test_workers_make_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"prompt": f"p{i}", "completion": "x" * (i % 60)} for i in range(100)]
    one = run(tmp_path / "1", lines)
    monkeypatch.setattr("mesh_transformer.data.encoding._BATCH", 800)
    two = run(tmp_path / "2", lines, workers=2)
    assert two[1] == one[1] and two[0].too_long_examples == one[0].too_long_examples > 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("text", r"line 1: expected an object"),
        ({"text": "x"}, "line 1: the field 'prompt', which template plain names, must be a string"),
        ({"prompt": "x", "completion": 3}, "the field 'completion'"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": ["x"]}, "a message must be an object"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "role 'tool' is not in template plain; its roles are a",
        ),
        ({"messages": [{"role": "prompt", "content": "x"}]}, "role 'prompt' is not"),
        ({"prompt": "\ud800", "completion": "x"}, "surrogate"),
    ],
)
def test_lines_that_are_no_examples(tmp_path: Path, line: Any, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        run(tmp_path, [line])
    assert str(tmp_path / "in.jsonl") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt = 3\ncompletion = '{x}'", "prompt: 3 is not a string"),
        ("prompt = '{x}'", "neither 'completion' nor 'assistant'"),
        ("assistant = '{content}'\nprompt = '{x}'", "belong together"),
        ("assistant = 'no field'", "has no field"),
        ("assistant = '{end_of_text}'", "has no field"),
        ("assistant = '{content'", "write {{ and }}"),
        ("assistant = '{content!r}'", "not a plain name"),
        ("assistant = '{0}'", "not a plain name"),
        ("assistant = ", "not TOML"),
    ],
)
def test_templates_that_are_wrong(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        template(tmp_path, text)


def test_a_template_that_is_not_there() -> None:
    with pytest.raises(DataError, match="template 'lost' is neither plain nor question"):
        load_template("lost")
