"""A model in figures, from shapes alone."""

from __future__ import annotations

import json

import jax.numpy as jnp

from mesh_transformer.checkpoint.weights import InMemory
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.evaluate.describe import describe
from mesh_transformer.model.params import abstract_params


def test_gpt_j_6b() -> None:
    cfg = preset("gpt-j-6b")
    facts = describe(InMemory(cfg, abstract_params(cfg, jnp.bfloat16)))
    # Hugging Face counts the second, the original's announcement the third.
    assert facts["parameters"] == 6_050_886_880
    assert facts["parameters_without_embedding_bias"] == 6_050_882_784
    assert facts["parameters_in_8_shards_replicas_counted"] == 6_053_381_344
    assert facts["bytes"] == 2 * 6_050_886_880
    assert facts["family"] == "gptj" and facts["model"] == cfg.to_dict()
    assert facts["tensors"]["layers/attn/q"] == {
        "axes": ["layers", "embed", "heads", "head_dim"],
        "shape": [28, 4096, 16, 256],
        "dtype": "bfloat16",
    }
    assert json.loads(json.dumps(facts)) == facts


def test_a_shape_that_eight_shards_do_not_divide() -> None:
    cfg = ModelConfig(n_layers=1, d_model=12, n_heads=3, n_vocab=10, n_ctx=8, norm="scalenorm", position="t5")
    facts = describe(InMemory(cfg, abstract_params(cfg)))
    assert not [name for name in facts if "shards" in name]
    assert facts["tensors"]["relative/bias"]["shape"] == [3, 32]
    assert facts["tensors"]["head/ln/scale"] == {"axes": [], "shape": [], "dtype": "float32"}


def test_v2_has_no_count_in_shards() -> None:
    cfg = ModelConfig(n_layers=1, d_model=16, n_heads=8, d_head=2, n_vocab=16, n_ctx=8, architecture="v2", n_shards=8)
    facts = describe(InMemory(cfg, abstract_params(cfg)))
    assert not [name for name in facts if "shards" in name]
    assert facts["tensors"]["layers/attn/b_q"]["shape"] == [1, 8, 2]
