"""Directories of every family: in shards there and back, and each way in which one may be wrong, named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint import hf_cases
from mesh_transformer.checkpoint.families import FAMILIES, Family
from mesh_transformer.checkpoint.names import hf_family, hf_table
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.model import ModelConfig
from small_families import NAMES, params_of, small

INDEX = "model.safetensors.index.json"
ALL = ("gptj", *NAMES)
# Buffers of old exports, {i} for the layer: nothing is read from them.
IDLE = {
    "gptj": ["transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"],
    "gpt2": ["transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"],
    "gpt_neo": ["transformer.h.{i}.attn.attention.bias", "transformer.h.{i}.attn.attention.masked_bias"],
    "gpt_neox": [
        *("gpt_neox.layers.{i}.attention.bias", "gpt_neox.layers.{i}.attention.masked_bias"),
        *("gpt_neox.layers.{i}.attention.rotary_emb.inv_freq", "gpt_neox.rotary_emb.inv_freq"),
    ],
}
LLAMA_IDLE = ["model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]


def model(name: str) -> tuple[ModelConfig, Any]:
    if name == "gptj":
        cfg = ModelConfig(n_layers=2, d_model=32, n_heads=4, d_ff=48, n_vocab=40, n_ctx=16, d_rotary=4)
        params = params_of(cfg)
        params["embed"]["bias"][:] = 0  # which the family has not
        return cfg, params
    cfg = small(name)
    return cfg, params_of(cfg)


def family(name: str) -> Family:
    found = hf_family(model(name)[0])
    assert found is FAMILIES[name]
    return found


@pytest.fixture(params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sharded(name: str, tmp_path: Path) -> Path:
    cfg, params = model(name)
    hf_cases.write(tmp_path / "model", cfg, params, {}, None, max_shard_bytes=9000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


@pytest.fixture
def whole(name: str, tmp_path: Path) -> Path:
    hf_cases.write(tmp_path / "model", *model(name), {}, None)
    return tmp_path / "model"


def edit_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        hf_cases.read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def matrix_of(name: str) -> str:
    """The tensor of a feed-forward's second matrix, in layer 1."""
    found = family(name).name("layers/mlp/w_out")
    assert found is not None
    return found.format(i=1)


def test_in_shards_there_and_back(sharded: Path, name: str) -> None:
    cfg, params = model(name)
    back, found, _ = hf_cases.read(sharded)
    assert back == cfg
    hf_cases.same(found, params)


def test_missing_tensors_are_named(whole: Path, name: str) -> None:
    lost = matrix_of(name)
    edit_tensors(whole, lambda tensors: tensors.pop(lost))
    assert f"lacks the tensor {lost} (1 missing in all)" in refused(whole)


def test_tensors_too_many_are_named_and_idle_ones_passed_over(whole: Path, name: str) -> None:
    idle = [each.format(i=i) for each in IDLE.get(name, LLAMA_IDLE) for i in range(2)]
    for each in dict.fromkeys(idle):
        edit_tensors(whole, lambda tensors, each=each: tensors.update({each: np.ones((1, 1, 4, 4), np.uint8)}))
    hf_cases.same(hf_cases.read(whole)[1], model(name)[1])
    # A third layer, and a projection that the family has not.
    stranger = matrix_of(name).replace(".1.", ".2.")
    edit_tensors(whole, lambda tensors: tensors.update({stranger: np.zeros((2, 2), np.float32)}))
    assert f"holds the tensor {stranger} (1 such in all)" in refused(whole)
    beside = matrix_of(name).replace(".weight", ".extra")
    edit_tensors(whole, lambda tensors: tensors.update({beside: tensors.pop(stranger)}))
    assert f"holds the tensor {beside} (1 such in all)" in refused(whole)


def test_wrong_shapes_and_dtypes_are_named(whole: Path, name: str) -> None:
    changed = matrix_of(name)
    right = load_file(whole / "model.safetensors")[changed]
    edit_tensors(whole, lambda tensors: tensors.update({changed: np.ascontiguousarray(right[:, 1:])}))
    message = refused(whole)
    assert f"{changed}: shape {(right.shape[0], right.shape[1] - 1)}, but the configuration" in message
    assert str(right.shape) in message
    edit_tensors(whole, lambda tensors: tensors.update({changed: right.astype(np.int8)}))
    assert f"{changed}: dtype I8; expected float32, bfloat16 or float16" in refused(whole)
    edit_tensors(whole, lambda tensors: tensors.update({changed: right.astype(np.float64)}))
    assert f"{changed}: dtype F64; expected" in refused(whole)


def test_shards_cut_off_lost_or_misnamed(sharded: Path, name: str) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    data, index = shard.read_bytes(), json.loads((sharded / INDEX).read_text())
    shard.write_bytes(data[:-5])
    assert f"{shard}: not a whole safetensors file" in refused(sharded)
    shard.unlink()
    assert f"{shard}: missing, though {INDEX} names it" in refused(sharded)
    shard.write_bytes(data)
    changed = matrix_of(name)
    there = index["weight_map"][changed]
    other = next(file.name for file in sharded.glob("*.safetensors") if file.name != there)
    (sharded / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {changed: other}}))
    assert f"{sharded / other}: lacks the tensor {changed}, though {INDEX} says that it is there" in refused(sharded)
    (sharded / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {changed: "../else.safetensors"}}))
    assert "'../else.safetensors'; expected one in the same directory" in refused(sharded)


@pytest.mark.parametrize("name", [each for each in ALL if model(each)[0].tied_head])
def test_a_tied_head_in_the_file_must_be_the_table(whole: Path, name: str) -> None:
    head, table = f"{family(name).names['head']}.weight", family(name).name("embed/tokens")
    assert table is not None and head not in hf_table(model(name)[0])
    edit_tensors(whole, lambda tensors: tensors.update({head: tensors[table].copy()}))
    hf_cases.same(hf_cases.read(whole)[1], model(name)[1])

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[head][-1, -1] += 1e-3

    edit_tensors(whole, spoil)
    message = refused(whole)
    assert f"{head} differs from {table}" in message and "tie_word_embeddings" in message
    edit_tensors(whole, lambda tensors: tensors.update({head: tensors[table][1:].copy()}))
    assert f"{head} differs from {table}" in refused(whole)


def test_what_config_json_says_and_nobody_knows(whole: Path, name: str) -> None:
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"residual_multiplier": 0.5}))
    assert "residual_multiplier = 0.5 is not known for this model_type and may change its arithmetic" in refused(whole)
    # What changes nothing, and what is off, passes.
    (whole / "config.json").write_text(json.dumps(config | {"residual_multiplier": None, "bos_token_id": 1}))
    assert hf_cases.read(whole)[0] == model(name)[0]


# ------------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt_neox", {"rotary_pct": 0.0, "rope_parameters": None}, "rotary_pct is 0.0; the share .* no channel"),
        ("gpt_neox", {"rotary_pct": "x", "rope_parameters": None}, "rotary_pct is 'x'; expected the share"),
        ("gpt_neo", {"attention_types": [[[["global"]], 2]]}, "attention_types is .*; only global, local"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": None},
            "expected a whole number",
        ),
        ("qwen2", {"layer_types": 3}, "layer_types is 3; expected a list"),
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}}, "'yarn' lacks factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor .* is '2'; expected a number"),
    ],
)
def test_values_that_cannot_be(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    cfg, params = model(name)
    hf_cases.write(tmp_path / "model", cfg, params, {}, None)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_scaling": None} | change))
    with pytest.raises(CheckpointError, match=message) as raised:
        hf_cases.read(tmp_path / "model")
    assert str(raised.value).startswith(f"{file}: ")


def test_yarn_without_a_factor_is_of_the_two_contexts(tmp_path: Path) -> None:
    cfg, params = model("llama")
    cfg = dataclasses.replace(cfg, rope_scaling=None)
    hf_cases.write(tmp_path / "model", cfg, params, {}, None)
    file = tmp_path / "model" / "config.json"
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": cfg.n_ctx // 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_scaling": yarn}))
    scaling = hf_cases.read(tmp_path / "model")[0].rope_scaling
    assert scaling is not None and scaling.factor == 4


@pytest.mark.parametrize("key", ["_num_labels", "is_llama_config", "unsloth_version", "auto_map"])
def test_keys_of_tools_change_nothing(key: str, tmp_path: Path) -> None:
    cfg, params = model("llama")
    hf_cases.write(tmp_path / "model", cfg, params, {}, None)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "1"}))
    assert hf_cases.read(tmp_path / "model")[0] == cfg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_rotary": 2}, r"model\.d_rotary = 2: the config.json of Hugging Face's llama would say 8"),
        ({"n_heads": 5, "n_kv_heads": 5}, r"model\.n_heads = 5 does not divide model\.d_model"),
    ],
)
def test_what_config_json_cannot_say_is_not_written(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    cfg = dataclasses.replace(model("llama")[0], **change)
    with pytest.raises(ConfigError, match=message):
        hf_cases.write(tmp_path / "model", cfg, params_of(cfg), {}, None)
    assert not list(tmp_path.glob("*/*.safetensors"))
