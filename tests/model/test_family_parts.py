"""The families beside GPT-J: counts, the block against a slow reference, the cache, meshes that do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import reference
import reference_families
from cached_reader import Reader

from mesh_transformer.checkpoint.families import FAMILIES, family_of
from mesh_transformer.checkpoint.names import hf_table
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.config.rope import RopeScaling
from mesh_transformer.config.schema import model_config_from_dict
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.params import abstract_params, count_params, named_specs
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.mesh import Sizes, check_model

POLICY = ComputePolicy(dtype="float32")

# From the published files and model cards.
COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-neo-125m": 125_198_592,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "gpt-neox-20b": 20_554_567_680,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "llama-77m": 76_784_128,  # no published one: that of the benchmarks
}
FAMILY = {
    "gpt2": "gpt2",
    "gpt-neox": "gpt_neox",
    "gpt-neo": "gpt_neo",
    "pythia": "gpt_neox",
    "llama": "llama",
    "qwen3": "qwen3",
}

_SMALL = {"d_model": 24, "n_heads": 4, "n_vocab": 40, "n_ctx": 32}
SERIAL = ModelConfig(
    **_SMALL, n_layers=3, position="fixed", residual="serial", tied_head=True, window=5, windowed_layers="odd",
    scale_scores=False, biases=("out", "mlp"),
)  # fmt: skip
SHARED = ModelConfig(
    **_SMALL, n_layers=2, d_head=8, n_kv_heads=2, d_ff=40, norm="rms", residual="serial", rotary_layout="half",
    feed_forward="glu_silu", window=7, qk_norm=True, biases=("qkv",), rope_theta=100.0,
    rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_ctx=16),
)  # fmt: skip
TWO_NORMS = ModelConfig(
    **_SMALL, n_layers=2, d_rotary=4, residual="parallel-two-norms", rotary_layout="half", feed_forward="gelu",
    biases=("qkv", "out", "mlp"),
)  # fmt: skip
SMALL = {"serial": SERIAL, "shared": SHARED, "two-norms": TWO_NORMS}
TOKENS = np.random.default_rng(3).integers(0, 40, (2, 26)).astype(np.int32)


def params_of(cfg: ModelConfig) -> Any:
    return reference.random_params(abstract_params(cfg), seed=2, weight=1.2)


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_their_published_counts(name: str) -> None:
    cfg = PRESETS[name]
    assert count_params(cfg) == COUNTS[name]
    family, expected = family_of(cfg), next(kind for part, kind in FAMILY.items() if name.startswith(part))
    assert family is not None and family.model_type == expected
    assert {path for tensor in hf_table(cfg).values() for path in tensor.paths} == set(named_specs(cfg))


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_those_of_the_reference(name: str) -> None:
    cfg, params = SMALL[name], params_of(SMALL[name])
    got = np.asarray(jax.jit(lambda p, t: forward(p, t, cfg, POLICY))(params, TOKENS))
    expected = np.stack([reference_families.forward(params, row, cfg) for row in TOKENS])
    assert expected.std() > 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_the_cache_gives_what_the_whole_text_gives(name: str) -> None:
    cfg, params = SMALL[name], params_of(SMALL[name])
    expected = np.asarray(jax.jit(lambda p, t: forward(p, t, cfg, POLICY))(params, TOKENS))
    reader = Reader(cfg, params, batch=2, n_slots=cfg.n_ctx, n_positions=cfg.n_ctx)
    lengths = np.array([9, 14])
    found = reader.read(TOKENS, lengths)
    np.testing.assert_allclose(found, expected[[0, 1], lengths - 1], rtol=0, atol=1e-4)
    for i in range(10):
        found = reader.step(TOKENS[[0, 1], lengths + i], lengths + i)
        np.testing.assert_allclose(found, expected[[0, 1], lengths + i], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cfg", [*SMALL.values(), *PRESETS.values()], ids=[*SMALL, *PRESETS])
def test_a_description_is_read_back(cfg: ModelConfig) -> None:
    assert model_config_from_dict(cfg.to_dict()) == cfg


def test_a_gpt_j_is_described_as_before_the_other_families() -> None:
    assert list(PRESETS["gpt-j-6b"].to_dict()) == [
        "n_layers", "d_model", "n_heads", "n_vocab", "n_ctx", "d_head", "d_ff", "norm", "norm_eps", "position",
        "d_rotary", "architecture", "n_shards", "residual", "n_kv_heads", "rotary_layout", "feed_forward", "tied_head",
    ]  # fmt: skip


def test_no_two_families_have_one_name() -> None:
    assert all(family.model_type == name for name, family in FAMILIES.items())
    unnamed = dataclasses.replace(SHARED, scale_scores=False)
    assert family_of(unnamed) is None
    with pytest.raises(ConfigError, match=r"model\.scale_scores = False"):
        hf_table(unnamed)


def test_more_devices_than_shared_heads() -> None:
    cfg = dataclasses.replace(SHARED, n_heads=8, n_kv_heads=2, d_ff=64)
    with pytest.raises(ConfigError, match=r"mesh\.tensor = 4 must divide model\.n_kv_heads = 2; mesh"):
        check_model(Sizes(data=1, fsdp=1, tensor=4, pipeline=1), cfg)


def test_stages_that_begin_unlike() -> None:
    cfg = dataclasses.replace(SERIAL, n_layers=6)
    with pytest.raises(ConfigError, match="an odd number"):
        check_model(Sizes(data=1, fsdp=1, tensor=1, pipeline=2), cfg)
