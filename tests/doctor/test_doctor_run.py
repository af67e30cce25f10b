"""Planted faults of a run's configuration, data, checkpoints and needs, each named with its mend."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from doctor_cases import Case, check, everything, named

from mesh_transformer.checkpoint.opening import read_metadata
from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.config.load import load_run_config
from mesh_transformer.doctor import faults_of_run, space
from mesh_transformer.doctor.devices import Devices
from mesh_transformer.doctor.space import checkpoint_bytes, needs_of
from mesh_transformer.sharding.layout import layout_for
from mesh_transformer.train import wandb
from mesh_transformer.train.init_from import InitFrom
from mesh_transformer.train.optimizer import moments_of
from mesh_transformer.train.state import abstract_state

GIB = 2**30


def test_a_sound_run_and_nothing_is_changed(case: Case, own_cache: Path, tmp_path: Path) -> None:
    before = everything(tmp_path)
    found = case.findings()
    assert not [each for each in found if each.status == "failed"], found
    told = {each.name: each.message for each in found}
    assert "32 sequences of 16 + 1 ids in 2 files" in told["data.train"]
    assert "go 1 times through the data" in told["train.batch_size"]
    assert "5 sequences" in told["data.validation.held"]
    assert "bytes, 257 ids; model.n_vocab has 43 more" in told["tokenizer"]
    assert "will be made" in told["run directory"]
    after = everything(tmp_path)
    assert after.keys() == before.keys()  # no offsets of records, no cache, no run
    assert {k: v[1] for k, v in after.items()} == {k: v[1] for k, v in before.items()}
    assert not own_cache.exists()


def test_a_run_that_goes_on(begun: Case, tmp_path: Path) -> None:
    before = everything(tmp_path)
    found = begun.findings()
    assert not [each for each in found if each.status == "failed"], found
    assert "goes on from checkpoint 4" in named(found, "checkpoints").message
    assert "used by nobody" in named(found, "run directory").message
    assert [each.name for each in found].count("storage") == 2  # the run, and its checkpoints
    assert everything(tmp_path).keys() == before.keys()


# ------------------------------------------------------------------------------------------------------ configuration


def test_a_configuration_that_cannot_be_read(case: Case) -> None:
    case.config.write_text(case.config.read_text().replace("d_model", "d_modell"))
    found = case.findings()
    check(named(found, "configuration"), "failed", "d_modell", "d_model", mend="docs/configuration.md")
    assert found[-1].name == "configuration" and named(found, "jax")  # the environment is looked at all the same
    case.config.unlink()
    check(case.one("configuration"), "failed", str(case.config), "no such file", mend="configuration")


def test_a_mesh_that_does_not_divide(case: Case) -> None:
    eight = Devices(platform="cpu", kinds=("cpu",) * 8)
    found = case.findings("mesh.data=-1", "mesh.tensor=3", devices=eight)
    check(named(found, "mesh"), "failed", "must divide the 8 devices", "mesh.tensor = ", mend="[mesh]")
    check(named(found, "memory"), "warning", "not looked at", mend="mend mesh first")
    check(case.one("mesh", "mesh.tensor=4", devices=eight), "failed", "n_heads = 2", mend="[mesh]")
    assert "7 of 8 devices are not used" in case.one("mesh", devices=eight).message


def test_a_package_that_is_missing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "is_installed", lambda: False)
    check(case.one("packages", "log.wandb_project=mine"), "failed", "wandb", mend="mesh-transformer[wandb]")


def test_a_file_where_the_run_would_be(case: Case) -> None:
    (case.path / "runs").touch()
    check(case.one("storage"), "failed", "is a file", mend="log.directory")
    check(case.one("disk"), "failed", "is a file", mend="out of the way")


# --------------------------------------------------------------------------------------------------------------- data


def test_an_index_line_without_a_file(case: Case) -> None:
    (case.path / "data" / "train.index").write_text("a.tfrecords\nlost.tfrecords\n")
    found = case.findings()
    check(named(found, "data.train"), "failed", "line 2 names 'lost.tfrecords'", mend="mesh-transformer prepare")
    for name in ("train.batch_size", "tokenizer"):
        check(named(found, name), "warning", "not looked at", mend="mend data.train first")


def test_records_of_another_length(case: Case) -> None:
    case.write_data("a.tfrecords", 20, length=12)
    check(case.one("data.train"), "failed", "13 ids", "needs 17", "sequence_length = 12", mend="prepare")
    case.write_data("a.tfrecords", 20)
    case.write_data("held.tfrecords", 5, length=20)
    check(case.one("data.validation.held"), "failed", "21 ids", mend="leave data.validation.held out")


def test_fewer_records_than_a_batch(case: Case) -> None:
    found = case.one("train.batch_size", "train.batch_size=33")
    check(found, "failed", "32 sequences, less than one batch of 33", mend="lower train.batch_size")
    found = case.one("data.validation.held", "train.batch_size=6")
    check(found, "failed", "5 sequences, less than one batch of 6", mend="leave data.validation.held out")


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_record_whose_checksum_is_wrong(case: Case, where: str) -> None:
    path = case.path / "data" / "b.tfrecords"
    damaged = bytearray(path.read_bytes())
    damaged[30 if where == "first" else len(damaged) - 10] ^= 1
    path.write_bytes(damaged)
    check(case.one("data.train"), "failed", str(path), mend="prepare")


def test_ids_outside_the_vocabulary(case: Case) -> None:
    case.write_data("a.tfrecords", 20, largest=300)
    check(case.one("data.train"), "failed", "token id 300", "n_vocab = 300", mend="prepare")


def test_a_file_that_is_named_twice(case: Case) -> None:
    (case.path / "data" / "train.index").write_text("a.tfrecords\na.tfrecords\n")
    check(case.one("data.train"), "warning", "a.tfrecords (2 times)", mend="second mention")


def test_compressed_data_are_not_expanded(case: Case, own_cache: Path) -> None:
    import zlib

    plain = case.path / "data" / "a.tfrecords"
    packed = case.path / "data" / "a.zstd.tfrecords"
    packed.write_bytes(zlib.compress(plain.read_bytes()))
    found = case.one("data.train", f"data.train={packed}")
    check(found, "warning", "compressed", "not looked into", mend="room")
    assert not own_cache.exists()


def test_a_tokenizer_with_more_ids_than_the_model(case: Case) -> None:
    found = case.one("tokenizer", "data.tokenizer=gpt2")
    check(found, "failed", "50257 ids", "model.n_vocab is 300", mend="set model.n_vocab")


def test_a_tokenizer_that_is_not_there(case: Case) -> None:
    found = case.one("tokenizer", "data.tokenizer=lost/tokenizer.json")
    check(found, "failed", "lost/tokenizer.json", "cannot be read", mend="data.tokenizer")


# -------------------------------------------------------------------------------------------------------- checkpoints


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def damage(step: Path) -> Path:
    path = largest_file(step)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_a_checkpoint_of_another_shape(begun: Case) -> None:
    found = begun.one("checkpoints", "model.d_ff=64")
    check(found, "failed", "another architecture", "d_ff is 32 there, 64 here", mend="another name")


@pytest.mark.parametrize(
    ("override", "message"), [("seed=5", "seed: 0, now 5"), ("data.train=data/a.tfrecords", "list of data files")]
)
def test_a_checkpoint_of_another_run(begun: Case, override: str, message: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(begun.path)
    check(begun.one("checkpoints", override), "failed", "was trained with another", message, mend="--new")


def test_the_newest_checkpoint_is_damaged(begun: Case) -> None:
    path = damage(begun.run / "checkpoints" / "4")
    found = [each for each in begun.findings() if each.name == "checkpoints"]
    check(found[0], "warning", str(path), "sha256", mend="goes on from checkpoint 2")
    assert found[1].status == "ok" and "from checkpoint 2" in found[1].message


def test_every_checkpoint_is_damaged(begun: Case) -> None:
    for step in (2, 4):
        damage(begun.run / "checkpoints" / str(step))
    check(begun.one("checkpoints"), "failed", "none of 2, 4 is intact", "sha256", mend="restore one")


def test_a_run_that_is_complete(begun: Case) -> None:
    check(begun.one("checkpoints", "train.steps=4"), "warning", "complete at step 4", mend="raise train.steps above 4")


def test_a_run_in_use(begun: Case) -> None:
    with RunDirectory(begun.run).lock():
        found = begun.one("run directory")
    check(found, "failed", f"in use by process {os.getpid()}", mend="wait for that process")
    assert begun.one("run directory").status == "ok"


def test_a_model_to_begin_from(case: Case, sound: Case) -> None:
    model = str(sound.run)
    assert case.one("--init-from", init_from=InitFrom(model=model)).status == "ok"
    found = case.one("checkpoints", "model.n_layers=2", init_from=InitFrom(model=model))
    check(found, "failed", "n_layers is 1 there, 2 here", mend="--init-from another model")
    found = case.one("checkpoints", init_from=InitFrom(model="/lost"))
    check(found, "failed", "/lost", mend="another name")
    found = case.one("--init-from", init_from=InitFrom(model="owner/model"))
    check(found, "warning", "Hugging Face Hub", mend="write it as it is")


def test_an_adapter_without_a_model(case: Case) -> None:
    check(case.one("checkpoints", "lora.rank=2"), "failed", "[lora] adapts a model", mend="add --init-from MODEL")


# ------------------------------------------------------------------------------------------------------ disk, memory

Statvfs = collections.namedtuple("Statvfs", ["f_bavail", "f_frsize"])


def test_a_full_disk(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = load_run_config(case.config)
    one = checkpoint_bytes(run)
    monkeypatch.setattr(os, "statvfs", lambda path: Statvfs(4 * one - 1, 1))
    found = case.one("disk")  # 8 steps, one every 2, 3 kept and one being written
    check(found, "failed", "checkpoints at one time: 4 of", mend="lower train.keep_last")
    monkeypatch.setattr(os, "statvfs", lambda path: Statvfs(4 * one, 1))
    assert case.one("disk").status == "ok"
    found = case.one("disk", "train.steps=80", "train.keep_every=2")
    check(found, "warning", "checkpoints in the end: 40 of", mend="train.keep_every")
    assert case.one("disk", "train.keep_last=1", "train.checkpoint_every=8").status == "ok"


def test_what_is_on_the_disk_already_is_not_needed_again(begun: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = load_run_config(begun.config)
    monkeypatch.setattr(os, "statvfs", lambda path: Statvfs(2 * checkpoint_bytes(run), 1))
    assert begun.one("disk").status == "ok"  # two are there, and larger than their arrays


def test_little_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "memory", lambda: (64 * GIB, 32 * GIB))
    big = ("model.n_layers=28", "model.d_model=4096", "model.d_ff=16384", "model.n_heads=16", "model.d_rotary=64")
    check(case.one("memory", *big), "failed", "this machine has 64.0 GiB", mend="smaller model")
    monkeypatch.setattr(space, "memory", lambda: (1024 * GIB, 32 * GIB))
    check(case.one("memory", *big), "warning", "32.0 GiB of this machine's", mend="end what else runs")
    gpu = Devices(platform="cuda", kinds=("H200",), memory=141 * GIB)
    assert case.one("memory", *big, devices=gpu).status == "warning"  # three floats a parameter for the checkpoint
    assert case.one("device memory", *big, devices=gpu).status == "ok"
    gpu = Devices(platform="cuda", kinds=("A100",), memory=80 * GIB)
    check(case.one("device memory", *big, devices=gpu), "failed", "a device has 80.0 GiB", mend="mesh.fsdp")


LORA = ("lora.rank=2", 'lora.targets=["q","v"]')


@pytest.mark.parametrize(
    "overrides",
    [(), ("train.param_dtype=bfloat16", "train.moment_dtype=bfloat16"), ("train.moment_dtype=bfloat16",), LORA],
    ids=["float32", "bfloat16", "bfloat16 moments", "lora"],
)
def test_the_bytes_of_a_checkpoint_are_those_of_the_state(case: Case, overrides: tuple[str, ...]) -> None:
    run, _ = load_run_config(case.config, overrides)
    state = abstract_state(run)
    trees = (state.params, *moments_of(state.opt_state))
    n_bytes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees)]
    assert checkpoint_bytes(run) == sum(n_bytes)


def test_the_bytes_of_a_checkpoint_are_those_on_the_disk(sound: Case) -> None:
    run, _ = load_run_config(sound.config)
    arrays = read_metadata(sound.run / "checkpoints" / "4")["arrays"]
    stored = sum(int(np.prod(each["shape"])) * np.dtype(each["dtype"]).itemsize for each in arrays.values())
    assert 0 <= stored - checkpoint_bytes(run) <= 64  # step, key and the optimizer's counts


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2,zero=3"])
def test_what_rests_on_a_device(case: Case, mesh: str) -> None:
    overrides = ["mesh.data=1", *(f"mesh.{size}" for size in mesh.split(",")), "train.batch_size=8"]
    run, _ = load_run_config(case.config, overrides)
    layout = layout_for(run)
    assert layout.sizes.n_devices == 8
    state = abstract_state(run, layout)
    resting = (state.params, *moments_of(state.opt_state))
    gradients = moments_of(state.opt_state)[0]  # laid as the moments are, float32 too
    expected = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * 4 for leaf in jax.tree.leaves((resting, gradients))
    )
    assert needs_of(run, layout.sizes).device == expected


def test_what_train_asks_of_a_run(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = load_run_config(case.config)
    assert faults_of_run(run) == []
    monkeypatch.setattr(space, "memory", lambda: (1000, 1000))
    monkeypatch.setattr(os, "statvfs", lambda path: Statvfs(0, 1))
    assert [fault.name for fault in faults_of_run(run)] == ["disk", "memory"]


def test_what_train_refuses_by_itself_is_said_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "memory", lambda: (1000, 1000))
    run, _ = load_run_config(case.config, ["mesh.data=-1", "mesh.tensor=3"])
    assert faults_of_run(run) == []
    (case.path / "runs").touch()
    run, _ = load_run_config(case.config)
    assert faults_of_run(run) == []
