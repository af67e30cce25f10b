"""Every mistake of the user: status 2, at most two lines that name it, no traceback, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mesh_transformer as mt
from mesh_transformer.checkpoint import models
from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tfrecord import write_records
from mesh_transformer.model.params import abstract_params


@pytest.fixture
def here(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny model's place that a test may spoil, as the working directory."""
    target = tmp_path / "place"
    shutil.copytree(place.path, target)
    monkeypatch.chdir(target)
    return target


@pytest.fixture
def refused(command: Any, snapshot: Callable[[Path], dict]) -> Callable[..., str]:
    """Runs a command that must be refused in every respect; returns its message."""

    def run(*arguments: object, names: tuple[str, ...] = ()) -> str:
        before = snapshot(Path.cwd())
        ended = command.call(*arguments)
        lines = ended.err.splitlines()
        assert ended.status == 2, ended
        assert ended.out == ""
        assert 1 <= len(lines) <= 2 and lines[0].startswith("error: "), ended.err
        assert "Traceback" not in ended.err and "--debug" not in ended.err
        for name in names:
            assert name in ended.err, f"{name!r} is not in {ended.err!r}"
        assert snapshot(Path.cwd()) == before
        return ended.err

    return run


Refused = Callable[..., str]


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["trian", "x.toml"], ["No such command 'trian'", "see: mesh-transformer --help"]),
        (["--frobnicate"], ["No such option", "--frobnicate", "see: mesh-transformer --help"]),
        (["generate", "m", "--temprature", "1"], ["--temprature", "see: mesh-transformer generate --help"]),
        (["bench", "train", "--round", "1"], ["--round", "see: mesh-transformer bench train --help"]),
        (["bench", "train", "--rounds", "0"], ["--rounds", "0"]),
        (["bench", "train", "--preset", "gpt-5"], ["gpt-5", "gpt-j-6b"]),
        (["bench", "train", "--dtypes", "float31"], ["float31", "bfloat16"]),
        (["bench", "train", "--against", "nobody"], ["nobody", "hf"]),
        (["train"], ["Missing argument", "config"]),
        (["inspect", "a", "b", "c"], ["extra argument", "c"]),
        (["generate", "m", "--seed", "one"], ["--seed", "one"]),
        (["demo", "--steps", "0"], ["--steps 0", "at least 1"]),
        (["demo", "--steps", "many"], ["--steps", "many"]),
    ],
)
def test_command_line(
    refused: Refused, arguments: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(*arguments, names=tuple(names))


@pytest.mark.parametrize("arguments", [(), ("bench",)])
def test_no_command_shows_the_help(command: Any, arguments: tuple[str, ...]) -> None:
    ended = command.call(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("Usage: mesh-transformer") and "Commands:" in ended.err


# ---------------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("train.lerning_rate=1e-3", ["train.lerning_rate", "did you mean train.learning_rate?"]),
        ("modle.n_layers=2", ["modle", "did you mean"]),
        ("train.steps=ten", ["train.steps", '"ten"', "integer"]),
        ("train.steps=1.5", ["train.steps", "1.5", "integer"]),
        ("model.n_heads=5", ["model.n_heads = 5", "model.d_model = 64", "4 would"]),
        ("model.d_rotary=32", ["model.d_rotary = 32", "model.d_head = 16"]),
        ("model.d_rotary=7", ["model.d_rotary = 7", "even", "6 would do"]),
        ("model.preset=gpt-k", ["gpt-k", "gpt-j-tiny"]),
        ("model.norm=batchnorm", ["batchnorm", "layernorm"]),
        ("train.compute_dtype=float8", ["train.compute_dtype", "float8"]),
        ("train.learning_rate=-1", ["train.learning_rate", "-1"]),
        ("train.batch_size=0", ["train.batch_size", "0"]),
        ("data.sequence_length=4096", ["data.sequence_length = 4096", "model.n_ctx = 128"]),
        ("seed=-1", ["seed", "-1"]),
        ("train.steps", ["train.steps", "key=value"]),
        ("name=a/b", ["a/b", "a-b"]),
    ],
)
def test_settings(refused: Refused, here: Path, setting: str, names: list[str]) -> None:
    refused("train", "tiny.toml", "--set", setting, names=tuple(names))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[train\nsteps = 1\n", ["wrong.toml, line 1", "not valid TOML"]),
        ("[train]\nstepz = 1\n", ["wrong.toml", "train.stepz", "did you mean train.steps?"]),
        ("", ["wrong.toml", "missing", "data.train"]),
        ("\x00\x01", ["wrong.toml"]),
        ("{", ["wrong.toml", "JSON"]),
        ('{"layers": 2, "d_modle": 64}', ["wrong.toml", "d_modle"]),
    ],
)
def test_files(refused: Refused, here: Path, text: str, names: list[str]) -> None:
    (here / "wrong.toml").write_text(text)
    refused("train", "wrong.toml", names=tuple(names))


def test_a_file_that_is_no_configuration(refused: Refused, here: Path) -> None:
    refused("train", "nothing.toml", names=("nothing.toml", "no such file"))
    refused("train", "runs/tiny", names=("runs/tiny", "is a directory", "did you mean", "config.toml"))
    refused("train", "data/tiny_275.tfrecords", names=("data/tiny_275.tfrecords",))


# ----------------------------------------------------------------------------------------------------------- the data


def test_records_of_another_length(refused: Refused, here: Path) -> None:
    refused(
        "train", "tiny.toml", "--set", "data.sequence_length=16", "--set", "name=fresh",
        names=("tiny_275.tfrecords, record 0", "33", "17", "data.sequence_length = 32"),
    )  # fmt: skip
    refused(
        "train", "tiny.toml", "--set", "data.validation.other=data/tiny.index", "--set", "data.sequence_length=64",
        names=("33", "65"),
    )  # fmt: skip


def test_data_that_is_not_there(refused: Refused, here: Path) -> None:
    refused("train", "tiny.toml", "--set", "data.train=nowhere.index", names=("nowhere.index", "does not exist"))
    refused("train", "tiny.toml", "--set", "data.train=none*.tfrecords", names=("none*.tfrecords",))
    (here / "empty").mkdir()
    refused("train", "tiny.toml", "--set", "data.train=empty", names=("empty", "without .tfrecords"))
    refused(
        "train", "tiny.toml", "--set", "data.validation.held_out=lost.index", names=("lost.index", "does not exist")
    )
    with (here / "data" / "tiny.index").open("a") as index:
        index.write("gone_9.tfrecords\n")
    refused("train", "tiny.toml", names=("data/tiny.index, line 2", "gone_9.tfrecords"))


def test_too_little_data(refused: Refused, here: Path) -> None:
    (here / "none_0.tfrecords").write_bytes(b"")
    refused("train", "tiny.toml", "--set", "data.train=none_0.tfrecords", names=("none_0.tfrecords", "empty"))
    write_records(here / "few_3.tfrecords", [np.zeros(33, np.int32)] * 3)
    refused("train", "tiny.toml", "--set", "data.train=few_3.tfrecords", names=("few_3.tfrecords", "3", "batch of 4"))


def test_damaged_records(refused: Refused, here: Path) -> None:
    name = "data/tiny_275.tfrecords"
    data = (here / name).read_bytes()
    (here / name).write_bytes(data[:-5])
    refused("train", "tiny.toml", names=(name, "record 274", "truncated"))
    (here / name).write_bytes(data[:4])
    refused("train", "tiny.toml", names=(name, "record 0", "truncated"))
    flipped = bytearray(data)
    flipped[20] ^= 4  # in the first payload
    (here / name).write_bytes(flipped)
    refused("train", "tiny.toml", names=(name, "record 0", "checksum"))
    (here / name).write_bytes(b"this is some text, not records " * 9)
    refused("train", "tiny.toml", names=(name, "record 0", "not a TFRecord file"))


def test_a_record_damaged_in_the_middle_is_found_when_it_is_read(command: Any, here: Path) -> None:
    name = "data/tiny_275.tfrecords"
    data = bytearray((here / name).read_bytes())
    record = len(data) // 275
    for i in range(1, 275):
        data[i * record + 20] ^= 4
    (here / name).write_bytes(data)
    ended = command.start("train", "tiny.toml", "--set", "name=fresh", cwd=here)
    assert ended.status == 2 and "Traceback" not in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: ") and name in last and "checksum" in last


def test_ids_outside_the_vocabulary(refused: Refused, here: Path) -> None:
    write_records(here / "other_9.tfrecords", [np.full(33, 600, np.int32)] * 9)
    refused(
        "train", "tiny.toml", "--set", "data.train=other_9.tfrecords",
        names=("other_9.tfrecords, record 0", "600", "n_vocab = 512"),
    )  # fmt: skip


def test_a_tokenizer_that_does_not_fit(refused: Refused, here: Path) -> None:
    (here / "data" / "tiny.json").unlink()
    refused("train", "tiny.toml", "--set", "data.tokenizer=gpt2", names=("gpt2", "50257", "512"))
    refused("train", "tiny.toml", "--set", "data.tokenizer=none.json", names=("none.json",))


def test_another_tokenizer_than_the_data_was_made_with(refused: Refused, here: Path) -> None:
    refused("train", "tiny.toml", "--set", "data.tokenizer=gpt2", names=("gpt2", "tiny.index", "bytes"))


# ------------------------------------------------------------------------------------------------- the run directory


def test_a_checkpoint_of_another_architecture(refused: Refused, here: Path) -> None:
    message = refused("train", "tiny.toml", "--set", "model.d_ff=128", names=("d_ff", "256", "128", "runs/tiny"))
    assert "--new" in message


@pytest.mark.parametrize("setting", ["seed=1", "data.train=data/tiny.val.index"])
def test_a_change_that_makes_it_another_run(refused: Refused, here: Path, setting: str) -> None:
    refused("train", "tiny.toml", "--set", setting, "--set", "train.steps=9", names=("runs/tiny", "--new"))


def test_a_run_in_use(refused: Refused, here: Path) -> None:
    with RunDirectory(here / "runs" / "tiny").lock():
        refused("train", "tiny.toml", names=("runs/tiny", "in use", f"process {os.getpid()}"))


def test_new_without_yes(refused: Refused, here: Path) -> None:
    refused("train", "tiny.toml", "--new", names=("runs/tiny", "--yes"))


def test_a_run_directory_that_is_a_file(refused: Refused, here: Path) -> None:
    (here / "taken").write_text("mine")
    refused("train", "tiny.toml", "--set", "log.directory=taken", names=("taken",))


def test_a_demo_directory_that_is_a_file(command: Any, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    ended = command.call("demo", "--steps", "1", "--out", tmp_path / "taken")
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith(f"error: {tmp_path / 'taken'}")
    assert (tmp_path / "taken").read_text() == "mine"


def test_every_checkpoint_damaged(refused: Refused, here: Path) -> None:
    for step in ("2", "4"):
        damage(here / "runs" / "tiny" / "checkpoints" / step)
    names = ("runs/tiny", "none of its 2 checkpoints is intact", "checkpoints/4/state", "damaged")
    refused("generate", "runs/tiny", "--prompt", "a", names=names)
    refused("inspect", "runs/tiny", names=("runs/tiny",))
    refused("inspect", "runs/tiny", "--step", "4", names=("checkpoints/4", "damaged"))
    refused("inspect", "runs/tiny/checkpoints/2", names=("checkpoints/2", "damaged"))


def damage(step: Path) -> None:
    part = max((p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(command: Any, here: Path) -> None:
    damage(here / "runs" / "tiny" / "checkpoints" / "4")
    ended = command.start("inspect", "runs/tiny", "--json", cwd=here)
    assert ended.status == 0 and json.loads(ended.out)["step"] == 2
    (line,) = ended.err.splitlines()
    assert "checkpoints/4" in line and "damaged" in line and "checkpoint 4 is passed over" in line


# ------------------------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary is too small for any tokenizer."""
    cfg = ModelConfig(n_layers=1, d_model=8, n_heads=2, n_vocab=32, n_ctx=16)
    params = jax.tree.map(lambda a: jnp.ones(a.shape), abstract_params(cfg))
    path = tmp_path_factory.mktemp("wordless") / "model"
    mt.Model(cfg, params, None).save(path)
    return path


@pytest.mark.parametrize(
    ("option", "names"),
    [
        (["--max-tokens", "-1"], ["max_tokens = -1"]),
        (["--temperature", "-0.5"], ["temperature = -0.5"]),
        (["--temperature", "nan"], ["temperature = nan"]),
        (["--temperature", "inf"], ["temperature = inf"]),
        (["--top-p", "1.5"], ["top_p = 1.5"]),
        (["--top-k", "-2"], ["top_k = -2"]),
        (["--seed", "-3"], ["seed = -3"]),
        (["--seed", str(2**32)], [f"seed = {2**32}"]),
        (["--min-tokens", "-1"], ["min_tokens = -1"]),
        (["--samples", "0"], ["samples = 0"]),
        (["--stop", ""], ["stop", "empty"]),
        (["--dtype", "float12"], ["float12", "bfloat16"]),
        (["--tokenizer", "gpt2"], ["gpt2", "50257", "512"]),
        (["--tokenizer", "lost.json"], ["lost.json"]),
        (["--step", "3"], ["no step 3", "2, 4"]),
        (["--stream", "--prompt", "b"], ["--stream", "one prompt"]),
        (["--stream", "--samples", "2"], ["--stream", "--samples"]),
        (["--stream", "--json"], ["--stream", "--json"]),
        (["--prompt-file", "lost.txt"], ["lost.txt", "No such file"]),
        (["--prompt-file", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["--prompt", "x" * 129], ["129 tokens", "128", "shorten it by 1"]),
    ],
)
def test_generate(refused: Refused, here: Path, option: list[str], names: list[str]) -> None:
    (here / "latin.txt").write_bytes("é".encode("latin-1"))
    refused("generate", "runs/tiny", "--prompt", "a", *option, names=tuple(names))


def test_generate_without_a_prompt_needs_a_terminal(refused: Refused, here: Path) -> None:
    refused("generate", "runs/tiny", names=("no prompt", "--prompt TEXT", "--prompt-file FILE"))


def test_a_text_for_a_model_without_a_tokenizer(refused: Refused, here: Path, wordless: Path) -> None:
    refused("generate", wordless, "--prompt", "a", names=("no tokenizer", "n_vocab = 32"))


@pytest.mark.parametrize("name", ["generate", "inspect"])
def test_what_is_no_model(refused: Refused, here: Path, name: str) -> None:
    more = ["--prompt", "a"] if name == "generate" else []
    refused(name, "nowhere", *more, names=("nowhere", "no such file or directory"))
    refused(name, "text.txt", *more, names=("text.txt", "holds no model"))
    refused(name, "data", *more, names=("data", "holds no model"))


def test_a_hugging_face_directory_of_another_family(refused: Refused, here: Path) -> None:
    (here / "hf").mkdir()
    (here / "hf" / "config.json").write_text('{"model_type": "bloom"}')
    refused("inspect", "hf", names=("hf/config.json", "bloom", "gptj"))


# ----------------------------------------------------------------------------------------------------------- prepare


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["lost.txt"], ["lost.txt", "does not exist"]),
        (["picture.png"], ["picture.png", ".txt"]),
        (["binary.txt"], ["binary.txt", "byte 3", "UTF-8"]),
        (["lines.jsonl"], ["lines.jsonl, line 2"]),
        (["empty"], ["empty", "no text in this directory"]),
        (["text.txt", "--sequence-length", "0"], ["--sequence-length 0"]),
        (["text.txt", "--validation-fraction", "1.5"], ["--validation-fraction 1.5"]),
        (["text.txt", "--sequence-length", "1000000"], ["1000002", "lower --sequence-length"]),
        (["text.txt", "--min-unique-tokens", "999"], ["--min-unique-tokens"]),
        (["text.txt", "--tokenizer", "lost.json"], ["lost.json"]),
        (["text.txt", "--out", "data/tiny"], ["data/tiny", "exists already", "--overwrite"]),
        (["text.txt", "--out", "text.txt/data"], ["text.txt"]),
    ],
)
def test_prepare(refused: Refused, here: Path, arguments: list[str], names: list[str]) -> None:
    (here / "picture.png").write_bytes(b"\x89PNG")
    (here / "binary.txt").write_bytes(b"abc\xff\x00")
    (here / "lines.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (here / "empty").mkdir()
    out = [] if "--out" in arguments else ["--out", "new/data"]
    more = [] if "--tokenizer" in arguments else ["--tokenizer", "bytes"]
    refused("prepare", *arguments, *out, *more, names=tuple(names))


# --------------------------------------------------------------------------------------------- what nobody foresaw


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("something\nunforeseen")

    monkeypatch.setattr(models, "open_weights", fail)
    yield


def test_an_error_of_our_own_is_one_line_and_a_hint(command: Any, bug: None) -> None:
    ended = command.call("inspect", "x")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == "error: ZeroDivisionError: something\nrun again with --debug for the traceback\n"


@pytest.mark.parametrize("arguments", [("--debug", "inspect", "x"), ("inspect", "x", "--debug")])
def test_debug_shows_the_traceback(command: Any, bug: None, arguments: tuple[str, ...]) -> None:
    ended = command.call(*arguments)
    assert ended.status == 1
    assert ended.err.startswith("Traceback") and ended.err.endswith("ZeroDivisionError: something\nunforeseen\n")


def test_debug_shows_the_traceback_of_a_users_error_too(command: Any, tmp_path: Path) -> None:
    ended = command.start("inspect", tmp_path / "nowhere", "--debug")
    assert ended.status == 2
    assert ended.err.startswith("Traceback") and "nowhere: there is no such file" in ended.err.splitlines()[-1]


def test_ctrl_c(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "open_weights", interrupt)
    assert command.call("inspect", "x").status == 130
