"""Runs with [lora]: what they train and save, how they go on, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from run_cases import (
    MODEL,
    Listener,
    T,
    Toy,
    checkpoints,
    command,
    lines,
    state_of,
    terminate,
    timeless,
    trained_steps,
)

import mesh_transformer as mt
from mesh_transformer.checkpoint.convert import Conversion, convert
from mesh_transformer.checkpoint.logical import fingerprint
from mesh_transformer.checkpoint.lora import LoraWeights
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.weights import InMemory, assemble
from mesh_transformer.cli.main import main
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.run import MeshConfig, RunConfig
from mesh_transformer.config.tuning import LoraConfig
from mesh_transformer.model.params import init_params
from mesh_transformer.train.init_from import InitFrom
from mesh_transformer.train.run import train

pytestmark = pytest.mark.usefixtures("quick_compile")

BF16 = np.dtype(jax.numpy.bfloat16)
LORA = LoraConfig(rank=2, targets=("q", "v", "fc_out"))
TARGETS = ["layers/attn/q", "layers/attn/v", "layers/mlp/w_out"]
Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in Hugging Face's form; not to be changed."""
    path = tmp_path_factory.mktemp("models") / "base"
    convert(InMemory(MODEL, init_params(MODEL, jax.random.key(8))), path, Conversion(to="huggingface"))
    return path


def run_of(toy: Toy, where: Path, lora: LoraConfig | None = LORA, **changes: Any) -> RunConfig:
    return dataclasses.replace(toy.run(where, **changes), lora=lora)


@pytest.fixture(scope="module")
def whole(toy: Toy, base: Path, quick_compile: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Twelve steps that nothing disturbed; not to be changed."""
    run = run_of(toy, tmp_path_factory.mktemp("whole") / "run")
    train(run, Listener(), init_from=InitFrom(model=str(base)))
    return run


def document(run: RunConfig, step: int) -> dict[str, Any]:
    return json.loads((run.run_directory / f"checkpoints/{step}/checkpoint.json").read_bytes())


def test_checkpoints_hold_the_adapter_alone_and_say_where_the_base_is(whole: RunConfig, base: Path) -> None:
    record = document(whole, 12)
    names = set(record["arrays"])
    factors = {f"{path}/{name}" for path in TARGETS for name in "ab"}
    trees = ("params", "opt_state/2/mu", "opt_state/2/nu")
    counters = {"step", "key", "opt_state/2/count", "opt_state/5/count"}
    assert names == counters | {f"{tree}/{factor}" for tree in trees for factor in factors}
    assert record["lora"] == {"rank": 2, "alpha": 4.0, "targets": TARGETS}
    origin = record["init_from"]
    assert (origin["given"], origin["path"], origin["format"]) == (str(base), str(base), "huggingface")
    assert origin["digest"] == fingerprint(open_weights(base)).digest


def test_it_learns_and_opens_as_the_model_that_was_validated(whole: RunConfig, base: Path, toy: Toy) -> None:
    losses = [line["loss"] for line in lines(whole) if line.get("validation") == "near"]
    assert losses[-1] < losses[0]
    tuned, before = mt.load(whole.run_directory, dtype="float32"), mt.load(base, dtype="float32")
    rows = np.random.default_rng(5).integers(0, 64, (2, T))
    assert np.abs(tuned.logits(rows) - before.logits(rows)).max() > 1e-2
    unchanged = {path for path in ("embed", "head") if _same(tuned.params[path], before.params[path])}
    assert unchanged == {"embed", "head"} and _same(tuned.params["layers"]["ln_1"], before.params["layers"]["ln_1"])
    assert not _same(tuned.params["layers"]["attn"]["q"], before.params["layers"]["attn"]["q"])
    assert _same(tuned.params["layers"]["attn"]["k"], before.params["layers"]["attn"]["k"])


def _same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_validated_loss_is_that_of_the_merged_model(toy: Toy, whole: RunConfig, tmp_path: Path) -> None:
    last = [line["loss"] for line in lines(whole) if line.get("validation") == "far"][-1]
    merged = toy.run(tmp_path / "merged", steps=1, validate_every=1, learning_rate=0.0, end_learning_rate=0.0)
    heard = Listener()
    train(merged, heard, init_from=InitFrom(model=str(whole.run_directory)))
    (loss,) = [m.loss for m in heard.validations if m.validation == "far"]
    assert loss == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize("stop_after", [3, 5, 9])
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(
    toy: Toy, base: Path, whole: RunConfig, tmp_path: Path, stop_after: int
) -> None:
    run = run_of(toy, tmp_path / "run")
    stopped = train(run, Listener(on_step={stop_after: terminate}), init_from=InitFrom(model=str(base)))
    assert stopped.step == stop_after and stopped.stopped_by is not None
    heard = Listener()
    train(run, heard)  # the base is known by the checkpoint
    assert heard.steps[0].step == stop_after + 1
    assert state_of(run, 12) == state_of(whole, 12)
    assert timeless(run) == timeless(whole)
    assert document(run, 12)["init_from"] == document(whole, 12)["init_from"]


def test_going_on_says_that_init_from_has_no_effect(toy: Toy, base: Path, tmp_path: Path) -> None:
    run = run_of(toy, tmp_path / "run", steps=5)
    train(run, Listener(), init_from=InitFrom(model=str(base)))
    heard = Listener()
    train(run_of(toy, tmp_path / "run", steps=6), heard, init_from=InitFrom(model="/nowhere/at/all"))
    assert any("--init-from /nowhere/at/all acts only while a run has no checkpoint" in note for note in heard.notes)
    assert trained_steps(run) == [1, 2, 3, 4, 5, 6]


def test_a_base_elsewhere_is_found_by_init_from_and_remembered(toy: Toy, base: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(base, here)
    run, longer = run_of(toy, tmp_path / "run", steps=5), run_of(toy, tmp_path / "run", steps=10)
    train(run, Listener(), init_from=InitFrom(model=str(here)))
    here.rename(there)
    with pytest.raises(CheckpointError, match="is gone"):
        train(longer, Listener())
    # Another model in its place is no base.
    other = tmp_path / "other"
    convert(InMemory(MODEL, init_params(MODEL, jax.random.key(9))), other, Conversion(to="native"))
    with pytest.raises(CheckpointError, match="trained on a model with digest"):
        train(longer, Listener(), init_from=InitFrom(model=str(other)))
    assert checkpoints(run) == ["5"]
    train(longer, Listener(), init_from=InitFrom(model=str(there)))
    assert document(run, 10)["init_from"]["path"] == str(there)
    assert isinstance(open_weights(run.run_directory), LoraWeights)


def test_a_base_stored_in_16_bits_stays_so(toy: Toy, tmp_path: Path) -> None:
    path = tmp_path / "narrow"
    convert(InMemory(MODEL, init_params(MODEL, jax.random.key(8))), path, Conversion(to="native", dtype=BF16))
    heard = Listener()
    run = run_of(toy, tmp_path / "run", steps=5)
    train(run, heard, init_from=InitFrom(model=str(path)))
    assert any("the base stays in bfloat16" in note for note in heard.notes)
    weights = open_weights(run.run_directory)
    assert {dtype.name for dtype in weights.dtypes.values()} == {"bfloat16"}
    assert assemble(weights)["layers"]["attn"]["q"].dtype.name == "bfloat16"
    assert {entry["dtype"] for name, entry in document(run, 5)["arrays"].items() if "params" in name} == {"float32"}


def test_what_an_adapter_cannot_do_is_refused_before_anything_is_written(toy: Toy, base: Path, tmp_path: Path) -> None:
    run = run_of(toy, tmp_path / "run")
    from_base = InitFrom(model=str(base))
    with pytest.raises(ConfigError, match=r"\[lora\] adapts a model that is there, and none is given\nadd --init-from"):
        train(run, Listener())
    with pytest.raises(ConfigError, match="--keep-schedule"):
        train(run, Listener(), init_from=InitFrom(model=str(base), keep_schedule=True))
    with pytest.raises(ConfigError, match=r'"wte" is no matrix of this model; it has .*q or q_proj'):
        train(run_of(toy, tmp_path / "run", LoraConfig(rank=2, targets=("wte",))), Listener(), init_from=from_base)
    pipeline = dataclasses.replace(run, mesh=MeshConfig(data=1, pipeline=2))
    with pytest.raises(ConfigError, match=r"mesh\.pipeline = 2: \[lora\] is not supported in a pipeline"):
        train(pipeline, Listener(), init_from=from_base)
    assert not run.run_directory.exists()
    with pytest.raises(ConfigError, match=r"train\.param_dtype = bfloat16 would round the base"):
        train(run_of(toy, tmp_path / "run", param_dtype="bfloat16"), Listener(), init_from=from_base)
    assert not (run.run_directory / "checkpoints").exists()


@pytest.mark.parametrize(
    "lora", [None, LoraConfig(rank=3, targets=LORA.targets), LoraConfig(rank=2), LoraConfig(rank=2, alpha=1.0)]
)
def test_another_adapter_is_another_run(toy: Toy, whole: RunConfig, tmp_path: Path, lora: LoraConfig | None) -> None:
    shutil.copytree(whole.run_directory, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"was trained with another \[lora\] .*\n.*--new"):
        train(run_of(toy, tmp_path / "run", lora, steps=13), Listener())


def test_the_command_trains_resumes_and_exports(
    toy: Toy, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(toy, tmp_path / "run", steps=5)
    assert command(run, tmp_path, monkeypatch) == 2
    told = capsys.readouterr().err
    assert "--init-from" in told and len(told.strip().splitlines()) == 2
    assert command(run, tmp_path, monkeypatch, "--init-from", str(base)) == 0
    told = capsys.readouterr().err
    assert re.search(r"adapting .*base \(huggingface\), which rests as it is: rank 2, alpha 4, targets q, v, w", told)
    assert "train.learning_rate = 0.01; usual in fine-tuning with [lora] is 0.0001 to 0.0005" in told
    to_peft = f"mesh-transformer convert {run.run_directory} {tmp_path / 'peft'} --to peft --base owner/base"
    monkeypatch.setattr(sys, "argv", to_peft.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert "224 parameters, peft" in capsys.readouterr().err
    config = json.loads((tmp_path / "peft/adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["target_modules"] == ["fc_out", "q_proj", "v_proj"]
