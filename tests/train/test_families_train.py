"""Models of other families than GPT-J through the training loop: stopped and gone on bit for bit, whole and adapted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from run_cases import Listener, Toy, state_of, terminate, timeless

import mesh_transformer as mt
from mesh_transformer.checkpoint.convert import Conversion, convert
from mesh_transformer.checkpoint.families import family_of
from mesh_transformer.checkpoint.lora import hf_modules, target_paths
from mesh_transformer.checkpoint.weights import InMemory
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import RunConfig
from mesh_transformer.config.tuning import LoraConfig
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.lora import adaptable
from mesh_transformer.model.params import map_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.train.init_from import InitFrom
from mesh_transformer.train.run import train
from small_families import NAMES, params_of, small

pytestmark = pytest.mark.usefixtures("quick_compile")

STEPS = 3


def config(name: str) -> ModelConfig:
    return small(name, n_layers=1, d_model=16, n_vocab=64, d_ff=32)


def stopped_and_gone_on(run: RunConfig, apart: RunConfig, init_from: InitFrom | None) -> Listener:
    """The same run twice, the second in two parts; returns who listened to the first."""
    heard = Listener()
    train(run, heard, init_from=init_from)
    stopped = train(apart, Listener(on_step={2: terminate}), init_from=init_from)
    assert stopped.step == 2 and stopped.stopped_by is not None
    train(apart, Listener())
    assert state_of(apart, STEPS) == state_of(run, STEPS)
    assert timeless(apart) == timeless(run)
    return heard


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(toy: Toy, tmp_path: Path, name: str) -> None:
    cfg = config(name)
    whole, apart = (
        toy.run(tmp_path / part, model=cfg, steps=STEPS, validate_every=0, checkpoint_every=1)
        for part in ("whole", "apart")
    )
    heard = stopped_and_gone_on(whole, apart, None)
    assert [metrics.step for metrics in heard.steps] == [1, 2, 3]
    # What was trained is a model of its family.
    opened = mt.load(whole.run_directory)
    assert opened.config == cfg and family_of(opened.config).model_type == name  # type: ignore[union-attr]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ("q", "v")), ("llama", ("gate_proj", "k", "w_out")), ("gpt2", ("c_attn",))]
)
def test_an_adapter_is_trained_and_merged(toy: Toy, tmp_path: Path, name: str, targets: tuple[str, ...]) -> None:
    cfg = config(name)
    params = jax.tree.map(np.asarray, params_of(cfg, weight=0.5))
    convert(InMemory(cfg, params), tmp_path / "base", Conversion(to="huggingface"))
    whole, apart = (
        dataclasses.replace(
            toy.run(tmp_path / part, model=cfg, steps=STEPS, validate_every=0, checkpoint_every=1),
            lora=LoraConfig(rank=2, targets=targets),
        )
        for part in ("whole", "apart")
    )
    stopped_and_gone_on(whole, apart, InitFrom(model=str(tmp_path / "base")))
    tuned, adapted = mt.load(whole.run_directory), set(target_paths(targets, cfg))
    changed = map_table(lambda s, a, b: not np.array_equal(a, b), cfg, tuned.params, params)
    names = {"/".join(key.key for key in path) for path, leaf in jax.tree.leaves_with_path(changed) if leaf}
    assert names == adapted
    # Its Hugging Face form is the merged model.
    tuned.save(tmp_path / "merged", format="huggingface")
    rows = np.arange(12, dtype=np.int32)[None] % cfg.n_vocab
    expected = np.asarray(forward(tuned.params, jax.numpy.asarray(rows), cfg, ComputePolicy()))
    found = mt.load(tmp_path / "merged").logits(rows)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_targets_go_by_the_names_of_the_family() -> None:
    attn, mlp = "layers/attn/", "layers/mlp/"
    for name, target, paths in (
        ("gpt2", "c_attn", (f"{attn}k", f"{attn}q", f"{attn}v")),
        ("gpt2", "c_proj", (f"{attn}o", f"{mlp}w_out")),
        ("gpt2", "attn.c_proj", (f"{attn}o",)),
        ("gpt_neo", "out_proj", (f"{attn}o",)),
        ("gpt_neox", "dense", (f"{attn}o",)),
        ("gpt_neox", "embed_out", ("head/w",)),
        ("llama", "gate_proj", (f"{mlp}w_gate",)),
        ("qwen3", "o_proj", (f"{attn}o",)),
    ):
        assert target_paths([target], small(name)) == paths, (name, target)
    for name in NAMES:
        assert target_paths(["q", "v"], small(name)) == (f"{attn}q", f"{attn}v")
        assert hf_modules(small(name)).keys() == adaptable(small(name)).keys()
    with pytest.raises(ConfigError, match=r'"lm_head" is no matrix of this model; it has k or k_proj'):
        target_paths(["lm_head"], small("qwen2"))  # its head is the token table
