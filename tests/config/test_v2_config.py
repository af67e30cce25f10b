"""The v2 architecture as a configuration: constructor, `[model]` section, and the original's JSON with d_head."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mesh_transformer.config import legacy
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.legacy import from_legacy
from mesh_transformer.config.load import load_run_config, model_config_from_dict, model_config_from_legacy, to_toml
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset

SIZES: dict[str, Any] = {"n_layers": 2, "d_model": 16, "n_heads": 8, "d_head": 6, "n_vocab": 23, "n_ctx": 12}
V2 = ModelConfig(architecture="v2", n_shards=4, **SIZES)
ARCHITECTURE = {
    "layers": 2, "d_model": 16, "n_heads": 8, "d_head": 6, "n_vocab": 23, "seq": 12, "cores_per_replica": 4,
}  # fmt: skip
JSON = ARCHITECTURE | {
    "norm": "layernorm", "pe": "rotary", "pe_rotary_dims": 4,
    "per_replica_batch": 2, "gradient_accumulation_steps": 3, "warmup_steps": 1, "anneal_steps": 2, "lr": 1e-3,
    "end_lr": 1e-4, "weight_decay": 0.1, "total_steps": 9, "tpu_size": 8, "train_set": "t.index", "val_set": {},
    "val_batches": 0, "val_every": 5, "ckpt_every": 5, "keep_every": 5, "name": "v2-run",
}  # fmt: skip


def test_what_is_filled_in() -> None:
    assert (V2.feed_forward, V2.d_ff, V2.d_rotary, V2.n_kv_heads) == ("glu_gelu_tanh", 64, 6, 8)
    assert ModelConfig(n_layers=1, d_model=8, n_heads=1, n_vocab=9, n_ctx=4).feed_forward == "gelu_tanh"
    sizes = V2.axis_sizes
    assert (sizes["heads"], sizes["kv_heads"], sizes["head_dim"]) == (4, 4, 12)  # 8 x 6 / 4
    assert ModelConfig(architecture="v2", n_shards=1, **SIZES | {"d_rotary": 48}).axis_sizes["head_dim"] == 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_shards": 0}, "model.n_shards is missing: it is the number of attention heads of the v2 architecture"),
        ({"n_shards": -1}, "model.n_shards = -1 must not be negative"),
        ({"n_shards": 5}, "(the original's cores_per_replica) must divide model.n_heads * model.d_head = 48; 4 would"),
        ({"d_ff": 54}, "model.n_shards = 4 (the original's cores_per_replica) must divide model.d_ff = 54; 3 would"),
        ({"d_rotary": 14}, "at most model.n_heads * model.d_head / model.n_shards = 12; 12 would do"),
        ({"d_rotary": 3}, "model.d_rotary = 3 must be even"),
        ({"n_shards": 16}, "model.d_rotary = 6 must be even and at most"),  # a head is 3 wide
        ({"norm": "rmsnorm"}, "model.norm = 'rmsnorm' is not supported in the v2 architecture; expected 'layernorm'"),
        ({"position": "t5"}, "model.position = 't5' is not supported in the v2 architecture; expected 'rotary'"),
        (
            {"feed_forward": "gelu_tanh"},
            "is not that of the v2 architecture; expected 'glu_gelu_tanh', or leave it out",
        ),
        ({"feed_forward": "relu"}, "expected one of: gelu_tanh, glu_gelu_tanh"),
        ({"architecture": "v3"}, "model.architecture = 'v3' is not supported; expected one of: v1, v2"),
        ({"architecture": "v1"}, "model.n_shards = 4 belongs to the v2 architecture, and model.architecture is 'v1'"),
        ({"architecture": "v1", "n_shards": 0, "feed_forward": "glu_gelu_tanh"}, "is not that of the v1 architecture"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{"architecture": "v2", "n_shards": 4, **SIZES, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_section() -> None:
    assert model_config_from_dict(json.loads(json.dumps(V2.to_dict()))) == V2
    # The number of shards alone says which architecture it is.
    assert model_config_from_dict(SIZES | {"n_shards": 4}) == V2
    assert model_config_from_dict(preset("gpt-j-tiny").to_dict() | {"n_shards": 0}) == preset("gpt-j-tiny")
    derived = model_config_from_dict({"preset": "gpt-j-tiny", "n_shards": 2})
    assert (derived.architecture, derived.feed_forward, derived.axis_sizes["head_dim"]) == ("v2", "glu_gelu_tanh", 32)
    with pytest.raises(ConfigError, match=r"^model.n_shards is missing"):
        model_config_from_dict({"preset": "gpt-j-tiny", "architecture": "v2"})
    with pytest.raises(ConfigError, match=r'^model.n_shards = "4" is of type string; expected an integer'):
        model_config_from_dict(SIZES | {"n_shards": "4"})


def test_toml_round_trip(tmp_path) -> None:
    source = tmp_path / "run.toml"
    fields = "\n".join(f"{name} = {value}" for name, value in SIZES.items())
    source.write_text(
        f'[model]\n{fields}\nn_shards = 4\n[data]\ntrain = "t"\n[train]\nsteps = 1\nlearning_rate = 1e-3\n'
    )
    config, notes = load_run_config(source)
    assert config.model == V2 and notes == []
    written = tmp_path / "config.toml"
    written.write_text(to_toml(config))
    assert load_run_config(written)[0].model == V2


# ------------------------------------------------------------------------------------ the original's JSON


@pytest.fixture
def write(tmp_path):
    def write(raw: dict[str, Any]) -> str:
        path = tmp_path / "v2.json"
        path.write_text(json.dumps(raw))
        return str(path)

    return write


def notes_on(raw: dict[str, Any]) -> list[str]:
    return from_legacy(raw)[1]


def test_the_original_s_v2(write) -> None:
    config, notes = load_run_config(write(JSON))
    assert config.model == ModelConfig(architecture="v2", n_shards=4, **SIZES | {"d_rotary": 4})
    assert (config.train.batch_size, config.train.z_loss_kind) == (12, "legacy")  # 3 x 2 x 8 / 4
    assert (config.train.param_dtype, config.train.moment_dtype) == ("float32", "float32")
    assert notes == [
        "cores_per_replica = 4: model.n_shards, the number of v2's attention heads",
        "cores_per_replica = 4: mesh.tensor = 1, its largest divisor for 1 device",
        "tpu_size = 8: ignored for devices, it only sets train.batch_size = 3 x 2 x 8 / 4",
        'train.compute_dtype = "bfloat16", as the original trained; --set train.compute_dtype=float32 is more exact',
    ]
    without = {key: value for key, value in JSON.items() if key != "pe_rotary_dims"}
    assert load_run_config(write(without))[0].model == V2  # d_rotary is d_head


@pytest.mark.parametrize(("n_devices", "tensor", "fsdp"), [(1, 1, 1), (8, 4, 2), (6, 2, 3)])
def test_parameters_rest_divided_over_all_devices(n_devices: int, tensor: int, fsdp: int) -> None:
    assert from_legacy(JSON, n_devices=n_devices)[0]["mesh"] == {"tensor": tensor, "data": 1, "fsdp": fsdp, "zero": 3}


def test_norm_and_position_are_not_looked_at() -> None:
    plain = from_legacy(JSON)[0]
    other, notes = from_legacy(JSON | {"norm": "rmsnorm", "pe": "t5"})
    assert other == plain
    assert 'norm = "rmsnorm": not looked at, v2 always has "layernorm"' in notes
    assert 'pe = "t5": not looked at, v2 always has "rotary"' in notes
    without = {key: value for key, value in JSON.items() if key not in ("norm", "pe")}
    assert from_legacy(without) == from_legacy(JSON)
    # Of v1's layernorms that differ from shard to shard there are none.
    assert from_legacy(JSON | {"norm": "layernorm-desync"})[0] == plain


@pytest.mark.parametrize(
    ("key", "value", "field", "becomes"),
    [
        ("early_cast", True, "param_dtype", "bfloat16"),
        ("early_cast", False, "param_dtype", None),  # here the value counts, not the presence
        ("bf16_optimizer", True, "moment_dtype", "bfloat16"),
        ("bf16_optimizer", False, "moment_dtype", None),
    ],
)
def test_dtypes(key: str, value: bool, field: str, becomes: str | None) -> None:
    nested, notes = from_legacy(JSON | {key: value})
    assert nested["train"].get(field) == becomes
    assert any(note.startswith("warning: early_cast = true: train.param_dtype") for note in notes) == (
        key == "early_cast" and value
    )


def test_switches() -> None:
    quiet = notes_on(JSON)
    for value, gather in ((True, "per_step"), (False, "per_layer")):
        nested, notes = from_legacy(JSON | {"early_collect": value})
        assert nested["train"]["gather"] == gather and notes == quiet
    assert from_legacy(JSON)[0]["train"]["gather"] == "per_step"
    assert notes_on(JSON | {"eval_only": False}) == quiet
    with pytest.raises(ConfigError, match=r"^eval_only = true: the original loaded .*; remove the key to train$"):
        from_legacy(JSON | {"eval_only": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_head": None}, "d_head = null is of type null; expected an integer"),
        ({"d_head": 0}, "d_head = 0 is too small; expected at least 1"),
        ({"cores_per_replica": 0}, "cores_per_replica = 0 is too small"),
        ({"cores_per_replica": 5, "tpu_size": 10}, "model.n_shards = 5 (the original's cores_per_replica) must divide"),
        ({"n_heads": "8"}, 'model.n_heads = "8" is of type string'),
        ({"pe_rotary_dims": 14}, "model.d_rotary = 14 must be even and at most"),
        ({"early_cast": 1}, "early_cast = 1 is of type integer; expected a boolean"),
        ({"early_collect": "yes"}, 'early_collect = "yes" is of type string; expected a boolean'),
        ({"eval_only": 1}, "eval_only = 1 is of type integer; expected a boolean"),
    ],
)
def test_refused_json(write, change: dict[str, Any], message: str) -> None:
    path = write(JSON | change)
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert str(caught.value).startswith(path) and message in str(caught.value)
    assert str(caught.value).count("\n") <= 1


def test_required_keys() -> None:
    sizes = "layers, d_model, n_heads, n_vocab, seq"
    with pytest.raises(ConfigError, match=f"^missing: {sizes}, cores_per_replica, per_replica_batch, total_steps, "):
        from_legacy({"d_head": 6})
    for key in legacy.KNOWN:
        if key in JSON and key not in (
            "norm",
            "pe",
            "pe_rotary_dims",
            "gradient_accumulation_steps",
            "tpu_size",
            "d_head",
        ):
            with pytest.raises(ConfigError, match=f"^missing: {key}$"):
                from_legacy({k: v for k, v in JSON.items() if k != key})


def test_the_architecture_of_a_checkpoint() -> None:
    assert model_config_from_legacy(ARCHITECTURE | {"a fork's own key": 1, "norm": 5, "eval_only": True}) == V2
    with pytest.raises(ConfigError, match=r"^missing: cores_per_replica$"):
        model_config_from_legacy({k: v for k, v in ARCHITECTURE.items() if k != "cores_per_replica"})
    with pytest.raises(ConfigError, match=r"^cores_per_replica = true is of type boolean"):
        model_config_from_legacy(ARCHITECTURE | {"cores_per_replica": True})
