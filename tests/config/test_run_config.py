"""The configuration dataclasses: defaults, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mesh_transformer.config.dtypes import dtype_name
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import PRESETS, preset
from mesh_transformer.config.run import DataConfig, LogConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.config.tuning import LoraConfig

TINY = preset("gpt-j-tiny")
DATA = DataConfig(train="a.index", sequence_length=128)
TRAIN = TrainConfig(steps=100, learning_rate=1e-3)


def refusal(make, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        make(*args, **kwargs)
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


def test_train_defaults():
    assert dataclasses.asdict(TrainConfig(steps=350000, learning_rate=1.2e-4)) == {
        "steps": 350000,
        "batch_size": 8,
        "gradient_accumulation": 1,
        "learning_rate": 1.2e-4,
        "end_learning_rate": 1.2e-4 / 10,
        "warmup_steps": 3000,
        "anneal_steps": 347000,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "z_loss": 1e-4,
        "z_loss_kind": "log_partition",
        "compute_dtype": None,
        "param_dtype": "float32",
        "moment_dtype": "float32",
        "remat": "none",
        "gather": "per_layer",
        "pipeline_microbatches": 0,
        "pipeline_interleave": 1,
        "epochs": None,
        "warmup_fraction": None,
        "noise_scale_alpha": 0.01,
        "step_timeout": None,
        "validate_every": 0,
        "validation_batches": 100,
        "checkpoint_every": 500,
        "keep_every": 0,
        "keep_last": 3,
    }


@pytest.mark.parametrize(
    ("given", "warmup", "anneal"),
    [
        ({"steps": 1000}, 50, 950),
        ({"steps": 19}, 0, 19),
        ({"steps": 60000}, 3000, 57000),
        ({"steps": 60001}, 3000, 57001),
        ({"steps": 100, "warmup_steps": 0}, 0, 100),
        ({"steps": 100, "warmup_steps": 300}, 300, 0),
        ({"steps": 100, "warmup_steps": 10, "anneal_steps": 0}, 10, 0),
    ],
)
def test_schedule_lengths(given, warmup, anneal):
    train = TrainConfig(learning_rate=1.0, **given)
    assert (train.warmup_steps, train.anneal_steps) == (warmup, anneal)


def test_other_defaults_and_run_directory():
    run = RunConfig(name="a-run", model=TINY, data=DATA, train=TRAIN)
    assert run.seed == 0
    assert run.mesh == MeshConfig(data=-1, fsdp=1, tensor=1, pipeline=1, zero=1)
    assert run.log == LogConfig(directory="runs", wandb_project="")
    assert run.data.validation == {} and run.data.tokenizer is None
    assert run.run_directory == Path("runs/a-run")


def test_frozen_and_apart_from_the_callers_dict():
    sets = {"pile": "p.index"}
    data = DataConfig(train="t", validation=sets, sequence_length=4)
    sets["other"] = "o"
    assert data.validation == {"pile": "p.index"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.train = "u"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "train.steps = 0 is too small; expected at least 1"),
        ("steps", -5, "train.steps = -5 is too small; expected at least 1"),
        ("steps", 2**31, "train.steps = 2147483648 is too large; expected at most 2147483647"),
        ("steps", 10**400, "train.steps = an integer of 1329 bits is too large; expected at most 2147483647"),
        ("steps", 1000.0, "train.steps = 1000.0 is of type number; expected an integer, such as 1000"),
        ("steps", True, "train.steps = true is of type boolean; expected an integer, such as 8"),
        ("steps", None, "missing: train.steps (or train.epochs)"),
        ("batch_size", 0, "train.batch_size = 0 is too small; expected at least 1"),
        ("gradient_accumulation", 0, "train.gradient_accumulation = 0 is too small; expected at least 1"),
        ("checkpoint_every", 0, "train.checkpoint_every = 0 is too small; expected at least 1"),
        ("keep_last", 0, "train.keep_last = 0 is too small; expected at least 1"),
        ("warmup_steps", -1, "train.warmup_steps = -1 is too small; expected at least 0"),
        ("anneal_steps", -1, "train.anneal_steps = -1 is too small; expected at least 0"),
        ("validate_every", -1, "train.validate_every = -1 is too small; expected at least 0"),
        ("validation_batches", -1, "train.validation_batches = -1 is too small; expected at least 0"),
        ("keep_every", -1, "train.keep_every = -1 is too small; expected at least 0"),
        ("learning_rate", -1e-4, "train.learning_rate = -0.0001 cannot be used; expected a finite number at least 0"),
        (
            "learning_rate",
            float("nan"),
            "train.learning_rate = nan cannot be used; expected a finite number at least 0",
        ),
        ("learning_rate", 10**400, "train.learning_rate = an integer of 1329 bits cannot be used"),
        ("learning_rate", "1e-4", 'train.learning_rate = "1e-4" is of type string; expected a number, such as 1.2e-4'),
        ("learning_rate", True, "train.learning_rate = true is of type boolean; expected a number, such as 1.2e-4"),
        ("end_learning_rate", float("inf"), "train.end_learning_rate = inf cannot be used"),
        ("weight_decay", -0.1, "train.weight_decay = -0.1 cannot be used; expected a finite number at least 0"),
        ("z_loss", -1, "train.z_loss = -1 cannot be used; expected a finite number at least 0"),
        ("clip_norm", 0.0, "train.clip_norm = 0.0 cannot be used; expected a finite number above 0"),
        ("z_loss_kind", "logpartition", 'train.z_loss_kind = "logpartition" is not known; expected one of: "legacy", '),
        ("remat", "ful", 'expected one of: "none", "dots", "full"; did you mean "full"?'),
        ("remat", True, "train.remat = true is not known"),
        ("compute_dtype", "float16", 'train.compute_dtype = "float16" is not supported in training: its range needs'),
        ("param_dtype", "f16", 'train.param_dtype = "f16" is not supported in training'),
        ("moment_dtype", "float16", 'train.moment_dtype = "float16" is not supported in training'),
        ("compute_dtype", "bfloat", 'train.compute_dtype = "bfloat" is not a known dtype; expected one of: float32, '),
        ("param_dtype", None, "train.param_dtype = null is not a known dtype"),
        ("moment_dtype", 16, "train.moment_dtype = 16 is not a known dtype"),
    ],
)
def test_refused_train_values(field, value, message):
    assert message in refusal(TrainConfig, **{"steps": 10, "learning_rate": 1e-3, field: value})


@pytest.mark.parametrize(
    ("batch", "parts", "mend"),
    [(10, 4, "train.batch_size = 8 or 12 would do"), (2, 4, "train.batch_size = 4 would do")],
)
def test_batch_must_divide(batch, parts, mend):
    message = refusal(TrainConfig, steps=1, learning_rate=0.1, batch_size=batch, gradient_accumulation=parts)
    start = f"train.batch_size = {batch} must be divisible by train.gradient_accumulation = {parts}; "
    assert message == start + mend


@pytest.mark.parametrize(("short", "long"), [("f32", "float32"), ("bf16", "bfloat16"), ("f16", "float16")])
def test_dtype_names(short, long):
    assert dtype_name(short) == dtype_name(long) == long


@pytest.mark.parametrize(
    ("given", "hint"), [("fp16", "f16"), ("bfloat", "bfloat16"), ("float", "float32"), ("BF16", None), ("int8", None)]
)
def test_unknown_dtype(given, hint):
    message = refusal(dtype_name, given)
    assert message.startswith(f'dtype = "{given}" is not a known dtype; expected one of: float32, bfloat16, float16, ')
    assert message.endswith(f"did you mean {hint}?" if hint else "f16")


def test_train_dtypes_are_normalised():
    train = TrainConfig(steps=1, learning_rate=1, compute_dtype="bf16", param_dtype="f32", moment_dtype="bf16")
    assert (train.compute_dtype, train.param_dtype, train.moment_dtype) == ("bfloat16", "float32", "bfloat16")
    assert train == TrainConfig(steps=1, learning_rate=1, compute_dtype="bfloat16", moment_dtype="bfloat16")


@pytest.mark.parametrize(("axis", "size"), [("data", -2), ("data", 0), ("fsdp", -1), ("tensor", -1), ("pipeline", 0)])
def test_impossible_meshes(axis, size):
    assert refusal(MeshConfig, **{axis: size}) == f"mesh.{axis} = {size} is too small; expected at least 1"


def test_mesh_values():
    assert refusal(MeshConfig, zero=2) == "mesh.zero = 2 is not known; expected one of: 1, 3"
    assert refusal(MeshConfig, zero=True) == "mesh.zero = true is not known; expected one of: 1, 3"
    assert "of type boolean" in refusal(MeshConfig, tensor=True)
    assert "of type string" in refusal(MeshConfig, shard_sequence="yes")


def test_log_values():
    assert 'log.directory = "gs://b/runs" is a URL' in refusal(LogConfig, directory="gs://b/runs")
    assert refusal(LogConfig, directory="") == 'log.directory = "" is empty; expected a string such as "runs"'
    assert LogConfig(wandb_project="mine").wandb_project == "mine"
    assert "of type boolean" not in refusal(LogConfig, wandb_project=True).partition(";")[2]


def test_mixtures():
    sets = {"pile": "p.index", "code": "c.index"}
    data = DataConfig(train=sets, weights={"pile": 3, "code": 0.5}, sequence_length=4)
    sets["other"] = "o"
    assert data.train == {"pile": "p.index", "code": "c.index"} and data.weights == {"pile": 3, "code": 0.5}
    one = {"train": "t", "sequence_length": 4}
    assert refusal(DataConfig, **one, weights={"pile": 1}) == (
        "data.weights has pile, and data.train has no names, but one data set; give one weight to each name"
    )
    two = {"train": {"a": "a.index", "b": "b.index"}, "sequence_length": 4}
    assert "data.weights has a, and data.train has a, b" in refusal(DataConfig, **two, weights={"a": 1})
    assert refusal(DataConfig, **two, weights={"a": 1, "b": 0}).startswith("data.weights.b = 0: nothing would be read")
    assert "at least 0" in refusal(DataConfig, **two, weights={"a": 1, "b": -1})
    assert refusal(DataConfig, train={}, sequence_length=4).startswith("data.train = {} names no data")


def test_epochs_become_steps_when_the_data_is_counted():
    train = TrainConfig(epochs=1.5, learning_rate=1e-4, batch_size=8, warmup_fraction=0.1)
    assert (train.steps, train.warmup_steps, train.anneal_steps) == (None, None, None)
    counted = train.with_steps(101)  # 151.5 sequences: 18.9 batches
    assert counted == TrainConfig(steps=19, learning_rate=1e-4, batch_size=8, warmup_steps=2)
    assert (counted.epochs, counted.warmup_fraction, counted.anneal_steps) == (None, None, 17)
    assert counted.with_steps(5) is counted
    assert TrainConfig(epochs=1e-9, learning_rate=1).with_steps(8).steps == 1
    assert refusal(TrainConfig, learning_rate=1) == "missing: train.steps (or train.epochs)"
    assert "both say how long to train" in refusal(TrainConfig, steps=1, epochs=1, learning_rate=1)
    assert "both say how long the rate rises" in refusal(
        TrainConfig, steps=9, learning_rate=1, warmup_steps=1, warmup_fraction=0.1
    )
    assert "at most 1" in refusal(TrainConfig, steps=9, learning_rate=1, warmup_fraction=5)
    assert "above 0" in refusal(TrainConfig, epochs=0, learning_rate=1)


def test_adaptation():
    lora = LoraConfig(rank=4, targets=["q", "w_in"])
    assert (lora.alpha, lora.targets) == (8.0, ("q", "w_in"))
    assert LoraConfig(rank=4, alpha=1).targets == ("q", "v")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": ""}, 'data.train = "" is empty; expected a string such as "data/pile.train.index"'),
        ({"train": 5}, 'data.train = 5 is of type integer; expected a string, such as "5", in quotes'),
        ({"train": "a\0b"}, 'data.train = "a\\u0000b" holds a NUL or is not valid Unicode'),
        ({"train": "a\udc80"}, 'data.train = "a\\udc80" holds a NUL or is not valid Unicode'),
        ({"tokenizer": ""}, 'data.tokenizer = "" is empty; expected a string such as "gpt2"'),
        ({"sequence_length": 0}, "data.sequence_length = 0 is too small; expected at least 1"),
        ({"validation": "v.index"}, 'expected a table, such as { validation = "v.index" }'),
        ({"validation": {"": "v"}}, 'a name in data.validation = "" is empty'),
        ({"validation": {"p": ""}}, 'data.validation.p = "" is empty'),
        ({"validation": {"a\nb": 1}}, 'data.validation."a\\nb" = 1 is of type integer'),
    ],
)
def test_refused_data_values(given, message):
    assert message in refusal(DataConfig, **{"train": "a", "sequence_length": 8, **given})


@pytest.mark.parametrize(
    ("name", "mend"),
    [("a/b", "a-b"), ("..", "my-run"), (".", "my-run"), ("a\\b", "a-b"), ("x\ny", "x-y"), ("é" * 128, "é" * 60)],
)
def test_run_name_is_a_directory_name(name, mend):
    message = refusal(RunConfig, name=name, model=TINY, data=DATA, train=TRAIN)
    assert "cannot be the name of a run directory" in message
    assert message.endswith(f'"{mend}" would do')


def test_run_cross_checks():
    base = {"name": "r", "model": TINY, "data": DATA, "train": TRAIN}
    assert refusal(RunConfig, **{**base, "data": dataclasses.replace(DATA, sequence_length=129)}) == (
        "data.sequence_length = 129 is longer than the model's context, model.n_ctx = 128; expected at most 128"
    )
    assert refusal(RunConfig, **base, seed=-1) == "seed = -1 is too small; expected at least 0"
    assert refusal(RunConfig, **base, seed=2**32) == "seed = 4294967296 is too large; expected at most 4294967295"
    assert refusal(RunConfig, **{**base, "name": ""}) == 'name = "" is empty; expected a string such as "my-run"'
    no_batches = dataclasses.replace(TRAIN, validation_batches=0)
    RunConfig(**{**base, "train": no_batches})  # without a validation set there is nothing to refuse
    with_set = dataclasses.replace(DATA, validation={"v": "v.index"})
    assert refusal(RunConfig, **{**base, "train": no_batches, "data": with_set}).startswith(
        "train.validation_batches = 0 is too small where data.validation names a set; expected at least 1"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_dict(name):
    assert ModelConfig(**PRESETS[name].to_dict()) == preset(name)


def test_preset_names():
    assert preset("2.7b") is PRESETS["gpt-j-2.7b"]
    message = refusal(preset, "gpt-j")
    assert re.fullmatch(r"model.preset = 'gpt-j' is not known; expected one of: gpt-j-6b, .*, 40b", message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"norm_eps": float("nan")}, "model.norm_eps = nan must be positive and finite; 1e-5 is usual"),
        ({"norm_eps": float("inf")}, "model.norm_eps = inf must be positive and finite"),
        ({"n_heads": 7}, "model.n_heads = 7 must divide model.d_model = 64 (or give model.d_head); 8 would"),
        ({"d_model": 2**31, "n_heads": 3}, "must divide model.d_model = 2147483648 (or give model.d_head); 2 would"),
        ({"norm": "layer"}, "model.norm = 'layer' is not supported; expected one of: layernorm, "),
        ({"d_rotary": 7}, "model.d_rotary = 7 must be even and at most model.d_head = 16; 6 would do"),
    ],
)
def test_refused_models(given, message):
    base = {"n_layers": 1, "d_model": 64, "n_heads": 4, "n_vocab": 300, "n_ctx": 64}
    assert message in refusal(ModelConfig, **{**base, **given})
