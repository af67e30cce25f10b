"""Which tokenizer a run has where its configuration and its data say none."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from run_cases import MODEL, Listener, T, Toy

import mesh_transformer as mt
from mesh_transformer.config.run import RunConfig
from mesh_transformer.data.record import DataRecord, write_data_record
from mesh_transformer.data.tokenizer import FILE_NAME, Tokenizer, from_bytes, load_tokenizer, train_bpe
from mesh_transformer.model.params import abstract_params
from mesh_transformer.train.init_from import InitFrom
from mesh_transformer.train.run import train

pytestmark = pytest.mark.usefixtures("quick_compile")

CFG = dataclasses.replace(MODEL, n_vocab=264)
OWN = train_bpe(["the geese and the sea " * 20], 262)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InitFrom:
    """With a tokenizer that nobody would take by its size."""
    place = tmp_path_factory.mktemp("model") / "own"
    params: Any = jax.tree.map(lambda a: jnp.full(a.shape, 0.02, a.dtype), abstract_params(CFG))
    mt.Model(CFG, params, OWN).save(place)
    return InitFrom(model=str(place))


def kept(run: RunConfig, step: int) -> Tokenizer:
    return from_bytes((run.run_directory / "checkpoints" / str(step) / FILE_NAME).read_bytes())


def run_to(toy: Toy, where: Path, steps: int, **data: Any) -> RunConfig:
    return toy.run(where, model=CFG, steps=steps, checkpoint_every=1, validate_every=0, data=data)


def test_data_that_do_not_say_theirs_have_the_model_s(tmp_path: Path, toy: Toy, model: InitFrom) -> None:
    run, first = run_to(toy, tmp_path / "run", 1), Listener()
    train(run, first, init_from=model)
    assert kept(run, 1).sha256 == OWN.sha256 != load_tokenizer("bytes").sha256
    assert len([note for note in first.notes if "the data do not say what tokenizer made them" in note]) == 1
    # Going on, the run's own is taken, and nobody need name the model again.
    later = run_to(toy, tmp_path / "run", 2)
    again = Listener()
    train(later, again)
    assert kept(later, 2).sha256 == OWN.sha256 and not [note for note in again.notes if "tokenizer" in note]


def test_data_that_name_the_model_s_are_not_said_to_be_silent(tmp_path: Path, toy: Toy) -> None:
    """The same tokenizer from two places is one object."""
    params: Any = jax.tree.map(lambda a: jnp.full(a.shape, 0.02, a.dtype), abstract_params(CFG))
    tokenizer = load_tokenizer("bytes")
    mt.Model(CFG, params, tokenizer).save(tmp_path / "model")
    data = tmp_path / "data"
    shutil.copytree(toy.directory, data)
    record = DataRecord(
        tokenizer="bytes",
        tokenizer_sha256=tokenizer.sha256,
        n_vocab=tokenizer.n_vocab,
        sequence_length=T,
        sequences=1,
        validation_sequences=0,
    )
    write_data_record(data / "train.json", record)
    run, listener = run_to(toy, tmp_path / "run", 1, train=str(data / "train.index")), Listener()
    train(run, listener, init_from=InitFrom(model=str(tmp_path / "model")))
    assert kept(run, 1).sha256 == tokenizer.sha256
    assert not [note for note in listener.notes if "tokenizer" in note]


def test_begun_again_the_earlier_run_s_is_forgotten(tmp_path: Path, toy: Toy, model: InitFrom) -> None:
    run = run_to(toy, tmp_path / "run", 1)
    train(run, Listener(), init_from=model)
    train(run, Listener(), new=True)
    assert kept(run, 1).sha256 == load_tokenizer("bytes").sha256


def test_what_the_configuration_names_goes_before(tmp_path: Path, toy: Toy, model: InitFrom) -> None:
    run, listener = run_to(toy, tmp_path / "run", 1, tokenizer="bytes"), Listener()
    train(run, listener, init_from=model)
    assert kept(run, 1).sha256 == load_tokenizer("bytes").sha256
    assert not [note for note in listener.notes if "tokenizer" in note]


def test_in_epochs_nothing_is_asked_of_the_tokenizer_first(tmp_path: Path, toy: Toy, model: InitFrom) -> None:
    """Steps are counted before the model is opened."""
    run = run_to(toy, tmp_path / "run", 1)
    asked = dataclasses.replace(run.train, steps=None, epochs=0.1)
    run = dataclasses.replace(run, train=asked)
    assert train(run, Listener(), init_from=model).step == 1 and kept(run, 1).sha256 == OWN.sha256
