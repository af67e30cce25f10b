"""The original's JSON: every key is mapped, noted or refused."""

from __future__ import annotations

import json
import math
import os

import pytest

from mesh_transformer.config import legacy
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.legacy import from_legacy
from mesh_transformer.config.load import load_run_config, model_config_from_legacy
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import DataConfig, LogConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.config.tuning import EvaluateConfig

# The original's six, as lm-evaluation-harness calls them today.
TASKS = ("lambada_openai", "piqa", "hellaswag", "winogrande", "mathqa", "pubmedqa")
# The two configurations that the original shipped: GPT-J-6B's own, and the example for fine-tuning it.
ARCHITECTURE = {
    "layers": 28,
    "d_model": 4096,
    "n_heads": 16,
    "n_vocab": 50400,
    "norm": "layernorm",
    "pe": "rotary",
    "pe_rotary_dims": 64,
    "seq": 2048,
}
GPT_J = ARCHITECTURE | {
    "cores_per_replica": 8,
    "per_replica_batch": 1,
    "gradient_accumulation_steps": 16,
    "warmup_steps": 3000,
    "anneal_steps": 300000,
    "lr": 1.2e-4,
    "end_lr": 1.2e-5,
    "weight_decay": 0.1,
    "total_steps": 350000,
    "tpu_size": 256,
    "bucket": "neo-models",
    "model_dir": "mesh_jax_pile_6B_rotary",
    "train_set": "pile.train.index",
    "val_set": {"pile": "pile.val.index", "owt": "openwebtext2_new_inputs.val.index"},
    "eval_harness_tasks": ["lambada", "piqa", "hellaswag", "winogrande", "mathqa", "pubmedqa"],
    "val_batches": 100,
    "val_every": 500,
    "ckpt_every": 500,
    "keep_every": 10000,
    "name": "GPT3_6B_pile_rotary",
    "comment": "",
}
EXAMPLE = GPT_J | {
    "warmup_steps": 7,
    "anneal_steps": 65,
    "lr": 5e-5,
    "end_lr": 1e-5,
    "total_steps": 72,
    "tpu_size": 8,
    "bucket": "your-bucket",
    "model_dir": "finetune_dir",
    "train_set": "example.train.index",
    "val_set": {},
    "eval_harness_tasks": [],
    "val_batches": 0,
    "val_every": 80,
    "ckpt_every": 72,
    "keep_every": 72,
    "name": "example_model",
    "wandb_project": "mesh-transformer-jax",
}
LOCAL = ["log.directory=runs"]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a JSON file into `configs/`, while the working directory is `work/`."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def write(raw: dict, name: str = "6B.json") -> str:
        path = tmp_path / "configs" / name
        path.write_text(json.dumps(raw))
        return str(path)

    return write


def refusal(path, overrides=LOCAL) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides)
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


def notes_on(raw: dict, overridden=("log.directory",), **kwargs) -> list[str]:
    return from_legacy(raw, overridden=overridden, **kwargs)[1]


@pytest.mark.parametrize("name", ["6B.json", "6B.txt"])  # known by its content as well
def test_gpt_j_6b(write, name):
    config, notes = load_run_config(write(GPT_J, name), LOCAL)
    here = os.getcwd()  # the original read data/ under the working directory
    assert config == RunConfig(
        name="GPT3_6B_pile_rotary",
        seed=0,
        model=preset("gpt-j-6b"),
        data=DataConfig(
            train=f"{here}/data/pile.train.index",
            validation={
                "pile": f"{here}/data/pile.val.index",
                "owt": f"{here}/data/openwebtext2_new_inputs.val.index",
            },
            tokenizer="gpt2",
            shuffle=False,
            sequence_length=2048,
        ),
        train=TrainConfig(
            steps=350000,
            batch_size=512,  # 16 x 1 x 256 / 8: 1,048,576 tokens a step
            gradient_accumulation=16,
            learning_rate=1.2e-4,
            end_learning_rate=1.2e-5,
            warmup_steps=3000,
            anneal_steps=300000,
            weight_decay=0.1,
            clip_norm=1.0,
            z_loss=1e-4,
            z_loss_kind="legacy",
            compute_dtype="bfloat16",
            param_dtype="float32",
            moment_dtype="float32",
            remat="full",
            validate_every=500,
            validation_batches=100,
            checkpoint_every=500,
            keep_every=10000,
            keep_last=3,
        ),
        mesh=MeshConfig(tensor=1),
        evaluate=EvaluateConfig(tasks=TASKS, every=500),
        log=LogConfig(directory=f"{here}/runs"),
    )
    assert notes == [
        "cores_per_replica = 8: mesh.tensor = 1, its largest divisor for 1 device",
        "tpu_size = 256: ignored for devices, it only sets train.batch_size = 16 x 1 x 256 / 8",
        'bucket = "neo-models", model_dir = "mesh_jax_pile_6B_rotary": not used, as log.directory is set beside the '
        "file",
        'train.compute_dtype = "bfloat16", as the original trained; --set train.compute_dtype=float32 is more exact',
        "eval_harness_tasks = ['lambada', 'piqa', 'hellaswag', 'winogrande', 'mathqa', 'pubmedqa']: evaluated every "
        "500 steps, for which lm-eval and the tasks' data are needed; --set evaluate.every=0 leaves it out",
    ]


def test_shipped_example(write):
    config, notes = load_run_config(write(EXAMPLE), LOCAL)
    assert (config.name, config.model, config.data.validation) == ("example_model", preset("gpt-j-6b"), {})
    assert config.data.train == os.path.abspath("data/example.train.index")
    assert config.train == TrainConfig(
        steps=72,
        batch_size=16,
        gradient_accumulation=16,
        learning_rate=5e-5,
        end_learning_rate=1e-5,
        warmup_steps=7,
        anneal_steps=65,
        z_loss_kind="legacy",
        compute_dtype="bfloat16",
        remat="full",
        validate_every=80,
        validation_batches=0,
        checkpoint_every=72,
        keep_every=72,
    )
    assert (
        'wandb_project = "mesh-transformer-jax": not used; --set log.wandb_project=... logs to Weights & Biases'
        in notes
    )
    assert not any(note.startswith("eval_harness_tasks") for note in notes)


def test_run_directory_is_asked_for(write):
    message = refusal(write(GPT_J), [])
    assert "the run would be written to gs://neo-models/mesh_jax_pile_6B_rotary, and this version writes" in message
    assert message.endswith("choose a directory with --set log.directory=runs")
    no_bucket = {key: value for key, value in GPT_J.items() if key not in ("bucket", "model_dir")}
    config = load_run_config(write(no_bucket))[0]
    assert config.log.directory == os.path.abspath("runs")
    whole_section = load_run_config(write(GPT_J), ['log={directory="here"}'])[0]
    assert whole_section.log.directory == os.path.abspath("here")


@pytest.mark.parametrize(
    ("tpu_size", "cores", "n_devices", "batch_size"),
    [
        (256, 8, 1, 512),
        (256, 8, 4, 512),
        (8, 1, 1, 128),
        (8, 8, 8, 16),
        (None, 8, 1, 16),
        (None, 8, 16, 32),
        (None, 8, 12, 48),
    ],
)
def test_batch_size(write, tpu_size, cores, n_devices, batch_size):
    raw = GPT_J | {"cores_per_replica": cores}
    raw.pop("tpu_size") if tpu_size is None else raw.update(tpu_size=tpu_size)
    config, notes = load_run_config(write(raw), LOCAL, n_devices=lambda: n_devices)
    assert config.train.batch_size == batch_size
    assert config.mesh == MeshConfig(tensor=math.gcd(cores, n_devices))
    fewer = f"cores_per_replica = {cores}: mesh.tensor = {config.mesh.tensor}, its largest divisor for "
    assert any(note.startswith(fewer) for note in notes) == (config.mesh.tensor != cores)
    assert any("train.batch_size = 16 x 1 x " in note for note in notes)


def test_missing_accumulation_is_one(write):
    raw = {key: value for key, value in GPT_J.items() if key != "gradient_accumulation_steps"}
    train = load_run_config(write(raw | {"per_replica_batch": 3}), LOCAL)[0].train
    assert (train.batch_size, train.gradient_accumulation) == (96, 1)


def test_overrides_use_our_names(write):
    flags = [*LOCAL, "train.compute_dtype=float32", "train.batch_size=32", "train.remat=none", "mesh.data=1"]
    flags += ["train.z_loss_kind=log_partition", "data.tokenizer=bytes", "train.param_dtype=f32"]
    config, notes = load_run_config(write(GPT_J | {"early_cast": True}), flags)
    assert (config.train.compute_dtype, config.train.batch_size, config.train.remat) == ("float32", 32, "none")
    assert (config.train.z_loss_kind, config.train.param_dtype) == ("log_partition", "float32")
    assert (config.data.tokenizer, config.mesh.data) == ("bytes", 1)
    assert "tpu_size = 256: not used, as train.batch_size is set beside the file" in notes
    assert not any("dtype" in note for note in notes)


@pytest.mark.parametrize("value", [True, False])
def test_early_cast_counts_by_presence(write, value):
    config, notes = load_run_config(write(GPT_J | {"early_cast": value}), LOCAL)
    assert config.train.param_dtype == "bfloat16"
    (note,) = [note for note in notes if "early_cast" in note]
    assert note.startswith(f"warning: early_cast = {str(value).lower()}: by its mere presence, as in the original, ")


def test_bf16_optimizer(write):
    def moments(value) -> str:
        return load_run_config(write(GPT_J | {"bf16_optimizer": value}), LOCAL)[0].train.moment_dtype

    assert (moments(True), moments(False)) == ("bfloat16", "float32")
    assert "bf16_optimizer = 1 is of type integer; expected a boolean" in refusal(write(GPT_J | {"bf16_optimizer": 1}))


def test_one_validation_set_may_be_a_string(write):
    data = load_run_config(write(GPT_J | {"val_set": "pile.val.index"}), LOCAL)[0].data
    assert data.validation == {"validation": os.path.abspath("data/pile.val.index")}
    paths = load_run_config(write(GPT_J | {"train_set": "/d/t.index", "val_set": {"v": "gs://b/v.index"}}), LOCAL)[
        0
    ].data
    assert (paths.train, paths.validation) == ("/d/t.index", {"v": "gs://b/v.index"})


def test_architecture(write):
    def model(**changes):
        raw = GPT_J | changes
        return load_run_config(write({key: value for key, value in raw.items() if value is not None}), LOCAL)[0].model

    assert model(pe_rotary_dims=None).d_rotary == 256
    assert model(pe_rotary_dims=32).d_rotary == 32
    fixed = model(pe="fixed", norm="rmsnorm-bias")
    assert (fixed.position, fixed.norm, fixed.d_rotary) == ("fixed", "rmsnorm-bias", 0)
    assert any("pe_rotary_dims = 64: ignored" in note for note in notes_on(GPT_J | {"pe": "t5"}))
    desync = {"norm": "layernorm-desync", "cores_per_replica": 1, "tpu_size": 8}
    assert model(**desync).norm == "layernorm-desync"


def test_small_vocabulary_has_no_known_tokenizer(write):
    assert load_run_config(write(GPT_J | {"n_vocab": 50256}), LOCAL)[0].data.tokenizer is None
    assert load_run_config(write(GPT_J | {"n_vocab": 50257}), LOCAL)[0].data.tokenizer == "gpt2"


@pytest.mark.parametrize(
    ("key", "value", "start"),
    [
        ("val_batch_multiplier", 4, "val_batch_multiplier = 4: ignored; multiply train.validation_batches instead"),
        ("wandb_project", "mine", 'wandb_project = "mine": not used'),
        ("comment", "first try", 'comment = "first try": ignored'),
        ("early_collect", True, "early_collect = true: ignored"),
        ("eval_only", False, "eval_only = false: ignored"),
        ("gen_length", 256, "gen_length = 256: ignored"),
    ],
)
def test_keys_without_meaning_are_noted(write, key, value, start):
    without = {k: v for k, v in GPT_J.items() if k != key}
    assert not any(note.startswith(start) for note in notes_on(without))
    assert len([note for note in notes_on(GPT_J | {key: value}) if note.startswith(start)]) == 1
    plain, noted = (load_run_config(write(raw), LOCAL)[0] for raw in (without, GPT_J | {key: value}))
    assert plain == noted


def test_values_that_ask_for_nothing_are_not_noted():
    idle = {"eval_harness_tasks": [], "val_batch_multiplier": 1, "wandb_project": "", "comment": ""}
    assert len(notes_on(GPT_J | idle)) == 4  # the replicas, the batch size, the run directory, the dtype


# A changed value for every key, so that each can be seen to have an effect.
CHANGED = {
    "layers": 2, "d_model": 2048, "n_heads": 32, "n_vocab": 50000, "seq": 1024, "norm": "scalenorm", "pe": "t5",
    "pe_rotary_dims": 32, "gradient_accumulation_steps": 8, "total_steps": 7, "lr": 1.0, "end_lr": 1.0,
    "warmup_steps": 1, "anneal_steps": 1, "weight_decay": 0.0, "val_every": 1, "val_batches": 1, "ckpt_every": 1,
    "keep_every": 1, "name": "n", "cores_per_replica": 4, "per_replica_batch": 2, "tpu_size": 8, "bucket": "b",
    "model_dir": "m", "train_set": "t", "val_set": {}, "early_cast": True, "bf16_optimizer": True,
    "early_collect": True, "eval_only": True, "d_head": 256, "gen_length": 1, "eval_harness_tasks": ["a"],
    "val_batch_multiplier": 2, "noise_scale_alpha": 0.1, "wandb_project": "w", "comment": "c",
}  # fmt: skip


@pytest.mark.parametrize("key", legacy.KNOWN)
def test_every_key_has_an_effect(key):
    before = from_legacy(GPT_J, overridden=LOCAL[0].split("=")[:1])
    assert from_legacy(GPT_J | {key: CHANGED[key]}, overridden=LOCAL[0].split("=")[:1]) != before


def test_known_keys_are_the_documented_ones():
    assert set(CHANGED) == set(legacy.KNOWN) and len(legacy.KNOWN) == len(set(legacy.KNOWN))


def test_required_keys(write):
    assert refusal(write({})).endswith(
        "missing: layers, d_model, n_heads, n_vocab, seq, norm, pe, cores_per_replica, per_replica_batch, total_steps, "
        "lr, end_lr, warmup_steps, anneal_steps, weight_decay, train_set, val_set, val_batches, val_every, ckpt_every, "
        "keep_every, name"
    )
    optional = {"pe_rotary_dims", "gradient_accumulation_steps", "tpu_size", "bucket", "model_dir", "comment"}
    for key in GPT_J.keys() - optional - {"eval_harness_tasks"}:
        without = {k: v for k, v in GPT_J.items() if k != key}
        with pytest.raises(ConfigError, match=f"^missing: {key}$"):
            from_legacy(without, overridden=["log.directory"])
    for key in [*optional, "eval_harness_tasks"]:
        from_legacy({k: v for k, v in GPT_J.items() if k != key}, overridden=["log.directory"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"total_step": 5},
            ": unknown key total_step (did you mean total_steps?); JSON holds the original's flat keys",
        ),
        ({"modle": 5, "zzzzz": 1}, ": unknown keys modle"),
        ({"train": {"steps": 5}}, ": unknown key train (did you mean"),
        ({f"zzzz{i}": 1 for i in range(6)}, ", and 2 more; JSON holds"),
        ({"tpu_size": 12}, ": tpu_size = 12 must be divisible by cores_per_replica = 8; 16 would do"),
        ({"tpu_size": 0}, ": tpu_size = 0 is too small; expected at least 1"),
        ({"tpu_size": "8"}, ': tpu_size = "8" is of type string; expected an integer'),
        ({"cores_per_replica": 0}, ": cores_per_replica = 0 is too small"),
        ({"per_replica_batch": 1.5}, ": per_replica_batch = 1.5 is of type number; expected an integer"),
        ({"gradient_accumulation_steps": 0}, ": gradient_accumulation_steps = 0 is too small"),
        ({"norm": "layernorm-desync"}, ': norm = "layernorm-desync" with cores_per_replica = 8 is not supported: each'),
        ({"val_set": ["a"]}, ": val_set = ['a'] is of type array; expected a table, such as {\"pile\": "),
        ({"val_set": {"a": 1}}, ": val_set.a = 1 is of type integer"),
        ({"val_set": {"a": ""}}, ': val_set.a = "" is empty'),
        ({"val_set": ""}, ': val_set = "" is empty'),
        ({"train_set": ""}, ': train_set = "" is empty; expected a string such as "pile.train.index"'),
        ({"train_set": None}, ": train_set = null is of type null"),
        ({"val_batches": 0}, ": train.validation_batches = 0 is too small where data.validation names a set"),
        (
            {"ckpt_every": 0},
            ": train.checkpoint_every = 0 is too small; expected at least 1 (train.checkpoint_every is ckpt_",
        ),
        ({"lr": "1e-4"}, "expected a number, such as 1.2e-4 (train.learning_rate is lr here)"),
        (
            {"lr": float("nan")},
            ": train.learning_rate = nan cannot be used; expected a finite number at least 0 (train.",
        ),
        (
            {"total_steps": 1e3},
            ": train.steps = 1000.0 is of type number; expected an integer, such as 1000 (train.steps",
        ),
        ({"layers": 0}, ": model.n_layers = 0 must be at least 1 (model.n_layers is layers here)"),
        ({"seq": "2048"}, '= "2048" is of type string; expected an integer, such as 8 (model.n_ctx is seq here)'),
        ({"n_vocab": None}, ": model.n_vocab = null is of type null"),
        ({"pe": "alibi"}, ": model.position = 'alibi' is not supported; expected one of: rotary, fixed, t5 (model.pos"),
        ({"pe": 5}, ": model.position = 5 is of type integer"),
        ({"pe_rotary_dims": 63}, "; 62 would do (model.d_rotary is pe_rotary_dims here)"),
        ({"pe_rotary_dims": 0}, ": pe_rotary_dims = 0 is too small; expected at least 2"),
        ({"name": "a/b"}, ': name = "a/b" cannot be the name of a run directory'),
    ],
)
def test_refused(write, change, message):
    path = write(GPT_J | change)
    found = refusal(path)
    assert message in found and found.startswith(path)


def test_architecture_alone():
    assert model_config_from_legacy(ARCHITECTURE) == preset("gpt-j-6b")
    assert model_config_from_legacy(GPT_J | {"a fork's own key": 1}) == preset("gpt-j-6b")
    with pytest.raises(ConfigError, match=r"^missing: layers, n_vocab$"):
        model_config_from_legacy({k: v for k, v in ARCHITECTURE.items() if k not in ("layers", "n_vocab")})
    with pytest.raises(ConfigError, match=r"^model.n_layers = 0 must be at least 1 \(model.n_layers is layers here\)$"):
        model_config_from_legacy(ARCHITECTURE | {"layers": 0})
