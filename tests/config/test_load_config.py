"""TOML files: what is read, and what is refused in which words."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.load import load_run_config, to_toml
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import DataConfig, LogConfig, RunConfig, TrainConfig

MINIMAL = """
[model]
preset = "gpt-j-tiny"
[data]
train = "train.index"
[train]
steps = 100
learning_rate = 1e-3
"""

EXAMPLE = """
name = "gpt-j-6b-finetune"
seed = 0
[model]
preset = "gpt-j-6b"            # or every field by name
[data]
train = "data/pile.train.index"
validation = { pile = "data/pile.val.index" }
tokenizer = "gpt2"
sequence_length = 2048
[train]
steps = 350000
batch_size = 256
gradient_accumulation = 1
learning_rate = 1.2e-4
end_learning_rate = 1.2e-5
warmup_steps = 3000
anneal_steps = 300000
weight_decay = 0.1
clip_norm = 1.0
z_loss = 1.0e-4
z_loss_kind = "legacy"
compute_dtype = "bfloat16"
remat = "full"
validate_every = 500
validation_batches = 100
checkpoint_every = 500
keep_every = 10000
keep_last = 3
[mesh]
data = -1
fsdp = 1
tensor = 1
pipeline = 1
[evaluate]
tasks = []
every = 0
[log]
directory = "runs"
wandb_project = ""
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into `configs/`, while the working directory is `work/`."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def write(content: str | bytes, name: str = "small.toml") -> str:
        path = tmp_path / "configs" / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def refusal(path, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides)
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


def test_minimal_file_gets_the_defaults(write, tmp_path):
    config, notes = load_run_config(write(MINIMAL))
    assert notes == []
    assert config == RunConfig(
        name="small",  # the file's own name
        seed=0,
        model=preset("gpt-j-tiny"),
        data=DataConfig(train=str(tmp_path / "configs/train.index"), sequence_length=128),
        train=TrainConfig(steps=100, learning_rate=1e-3, warmup_steps=5, anneal_steps=95, end_learning_rate=1e-4),
        log=LogConfig(directory=str(tmp_path / "work/runs")),
    )
    assert config.run_directory == tmp_path / "work/runs/small"


def test_documented_example(write, tmp_path):
    config, notes = load_run_config(write(EXAMPLE))
    here = tmp_path / "configs"
    assert notes == []
    assert config == RunConfig(
        name="gpt-j-6b-finetune",
        model=preset("gpt-j-6b"),
        data=DataConfig(
            train=str(here / "data/pile.train.index"),
            validation={"pile": str(here / "data/pile.val.index")},
            tokenizer="gpt2",
            sequence_length=2048,
        ),
        train=TrainConfig(
            steps=350000,
            batch_size=256,
            learning_rate=1.2e-4,
            end_learning_rate=1.2e-5,
            warmup_steps=3000,
            anneal_steps=300000,
            z_loss_kind="legacy",
            compute_dtype="bfloat16",
            remat="full",
            validate_every=500,
            keep_every=10000,
        ),
        log=LogConfig(directory=str(here / "runs")),
    )


def test_integer_for_a_number_becomes_a_float(write):
    train = load_run_config(write(MINIMAL.replace("1e-3", "1") + "clip_norm = 2"))[0].train
    assert (type(train.learning_rate), train.learning_rate) == (float, 1.0)
    assert (type(train.clip_norm), train.clip_norm) == (float, 2.0)


def test_paths(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    text = MINIMAL.replace(
        '"train.index"',
        '"../t/*.tfrecords"\nvalidation = { a = "/abs/v.index", b = "gs://bucket/v.index", c = "~/v.index" }\n'
        'tokenizer = "tok/tokenizer.json"',
    )
    path = write(text)
    data = load_run_config(path)[0].data
    assert data.train == str(tmp_path / "t/*.tfrecords")
    assert data.validation == {"a": "/abs/v.index", "b": "gs://bucket/v.index", "c": "/home/someone/v.index"}
    assert data.tokenizer == str(tmp_path / "configs/tok/tokenizer.json")
    # What is typed on the command line is relative to where it is typed.
    flags = ["data.train=x.index", "data.tokenizer=bytes", "data.validation={}", "log.directory=out"]
    config = load_run_config(path, flags)[0]
    assert config.data.train == str(tmp_path / "work/x.index")
    assert config.data.tokenizer == "bytes" and config.data.validation == {}
    assert config.log.directory == str(tmp_path / "work/out")
    assert load_run_config(write(MINIMAL + '[log]\ndirectory = "r"'))[0].log.directory == str(tmp_path / "configs/r")


def test_preset_with_overriding_fields(write):
    def model(fields: str):
        return load_run_config(write(MINIMAL.replace('preset = "gpt-j-tiny"', fields)))[0].model

    assert model('preset = "gpt-j-6b"\nn_layers = 2') == dataclasses.replace(preset("gpt-j-6b"), n_layers=2)
    narrow = model('preset = "gpt-j-6b"\nd_model = 1024')  # derived sizes follow
    assert (narrow.d_head, narrow.d_ff, narrow.n_heads, narrow.d_rotary) == (64, 4096, 16, 64)
    heads = model('preset = "gpt-j-6b"\nn_heads = 32')
    assert (heads.d_head, heads.d_ff, heads.n_kv_heads) == (128, 16384, 32)
    kept = model('preset = "gpt-j-6b"\nd_model = 1024\nd_head = 256\nd_ff = 100')
    assert (kept.d_head, kept.d_ff) == (256, 100)
    assert narrow.d_rotary == preset("gpt-j-6b").d_rotary
    turned = model('preset = "llama-2-7b"\nn_heads = 16')  # whole heads are turned, as in the preset
    assert turned.d_rotary == turned.d_head == 256
    in_full = model("n_layers = 2\nd_model = 64\nn_heads = 4\nn_vocab = 512\nn_ctx = 128\nd_rotary = 8")
    assert in_full == preset("gpt-j-tiny")


def test_overrides(write):
    flags = ["train.steps=7", "train.remat = full", "name=other", "seed=5", "train.end_learning_rate=1e-5"]
    flags += ['data.validation={"a.b"="v"}', 'data.validation."c.d"=/w', "model.preset=gpt-j-demo", "model.n_ctx=64"]
    config = load_run_config(write(MINIMAL), flags)[0]
    assert (config.train.steps, config.train.remat, config.name, config.seed) == (7, "full", "other", 5)
    assert config.train.end_learning_rate == 1e-5 and config.train.anneal_steps == 7
    assert config.data.validation == {"a.b": os.path.abspath("v"), "c.d": "/w"}
    assert config.model == dataclasses.replace(preset("gpt-j-demo"), n_ctx=64)
    assert config.data.sequence_length == 64
    last = load_run_config(write(MINIMAL), ["train.steps=7", "train.steps=8", "log.wandb_project="])[0]
    assert last.train.steps == 8 and last.log.wandb_project == ""
    section = ["model={n_layers=1, d_model=8, n_heads=1, n_vocab=9, n_ctx=5}", "name=a=b # c"]
    replaced = load_run_config(write(MINIMAL), section)[0]
    assert replaced.model.d_model == 8 and replaced.name == "a=b # c"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", '--set "train.steps" is not key=value; expected for example --set train.steps=1000'),
        ("=5", '--set "=5" is not key=value'),
        ("train..steps=5", '--set "train..steps=5" is not key=value'),
        ("a=1\nb=2", "unknown key a ("),
        ("a = 1\nb=2", "unknown key a ("),
        ("train.steps=[1", "--set train.steps=[1 is not TOML; close its brackets and quotes, or give a string: "),
        ('name="x', '--set name="x is not TOML;'),
        ("train.steps=many", 'train.steps = "many" is of type string; expected an integer, such as 1000 '),
        ("train.steps=1e3", "train.steps = 1000.0 is of type number; expected an integer, such as 1000 (train.steps"),
        ("train.learning_rate=nan", "(train.learning_rate given with --set)"),
        ("name=7", 'name = 7 is of type integer; expected a string, such as "7", in quotes (name given with --set)'),
        ("name=2024-01-01", 'name = 2024-01-01 is of type date or time; expected a string, such as "2024-01-01"'),
        ("train.lr=1", "unknown key train.lr (here it is train.learning_rate) (train.lr given with --set)"),
        ("train=5", "train = 5 is of type integer; expected a table, such as a section [train] with keys of its own"),
        ("data.train.x=5", '--set data.train.x: data.train = "'),
        ("train.steps.x=5", "--set train.steps.x: train.steps = 100 is no section"),
        ("data.tokenizer=", 'data.tokenizer = "" is empty'),
    ],
)
def test_refused_overrides(write, override, message):
    assert message in refusal(write(MINIMAL), [override])


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("lerning_rate = 1", "unknown key train.lerning_rate (did you mean train.learning_rate?)"),
        ("n_ctx = 1", "unknown key train.n_ctx (did you mean model.n_ctx?)"),
        ("end_lr = 1", "unknown key train.end_lr (here it is train.end_learning_rate)"),
        ("total_steps = 1", "unknown key train.total_steps ("),
        (
            "zzz = 1",
            "unknown key train.zzz (known here: steps, epochs, batch_size, gradient_accumulation, learning_rate, ",
        ),
        ('"a\\nb" = 1', 'unknown key train."a\\nb" ('),
        ("[trian]\nsteps = 1", "unknown key trian (did you mean [train]?)"),
        (
            "[optimizer]\nlr = 1",
            "unknown key optimizer (the sections are data, evaluate, log, lora, mesh, model, train)",
        ),
        ("[mesh]\ntensr = 1\ndat = 2", "unknown keys mesh.tensr (did you mean mesh.tensor?), mesh.dat (did you mean"),
        ("[log]\n" + "\n".join(f"k{i} = 1" for i in range(6)), ", and 2 more"),
        ("[model.preset]\na = 1", "Cannot"),
        ('batch_size = "8"', 'train.batch_size = "8" is of type string; expected an integer, such as 8'),
        ("batch_size = true", "train.batch_size = true is of type boolean; expected an integer, such as 8"),
        ("batch_size = 8.5", "train.batch_size = 8.5 is of type number; expected an integer, such as 8"),
        ("weight_decay = true", "train.weight_decay = true is of type boolean; expected a number, such as 1.2e-4"),
        ("weight_decay = '0.1'", 'train.weight_decay = "0.1" is of type string; expected a number'),
        ("weight_decay = inf", "train.weight_decay = inf cannot be used; expected a finite number at least 0"),
        ("remat = true", 'train.remat = true is of type boolean; expected a string, such as "true", in quotes'),
        ("remat = []", 'train.remat = [] is of type array; expected a string, such as "full"'),
        ("compute_dtype = 16", "train.compute_dtype = 16 is of type integer; expected a string"),
        ("compute_dtype = 'f16'", 'train.compute_dtype = "f16" is not supported in training'),
        ("gradient_accumulation = 3", "train.batch_size = 6 or 9 would do"),
        ("gather = 'always'", 'train.gather = "always" is not known; expected one of: "per_layer", "per_step"'),
        ("pipeline_microbatches = -4", "train.pipeline_microbatches = -4 is too small; expected at least 0"),
        ("step_timeout = -1", "train.step_timeout = -1.0 cannot be used; expected a finite number at least 0"),
        ("[mesh]\ntensor = 0", "mesh.tensor = 0 is too small; expected at least 1"),
        ("[mesh]\nshard_sequence = 1", "mesh.shard_sequence = 1 is of type integer; expected a boolean"),
        ("[log]\nwandb_project = 1", "log.wandb_project = 1 is of type integer; expected a string"),
        ("[log]\ntensorboard = 'no'", 'log.tensorboard = "no" is of type string; expected a boolean, such as true'),
        ("[lora]\nalpha = 1", "missing: lora.rank"),
        ("[lora]\nrank = 0", "lora.rank = 0 is too small; expected at least 1"),
        ("[lora]\nrank = 2\nalpha = 0", "lora.alpha = 0.0 cannot be used; expected a finite number above 0"),
        ("[lora]\nrank = 2\ntargets = []", "lora.targets = [] names no matrix"),
        ("[lora]\nrank = 2\ntargets = ['q', 'q']", "lora.targets = ['q', 'q'] holds \"q\" twice; remove one"),
        ("[lora]\nrank = 2\ntargets = [3]", "an entry of lora.targets = 3 is of type integer; expected a string"),
        ("[log]\ndirectory = 'gs://b/r'", 'log.directory = "gs://b/r" is a URL'),
        ("[log]\ndirectory = ''", 'log.directory = "" is empty'),
        (
            "[evaluate]\ntasks = 'piqa'",
            'evaluate.tasks = "piqa" is of type string; expected an array, such as ["lambada',
        ),
        ("[evaluate]\nevery = 5", "evaluate.every = 5 has nothing to evaluate: evaluate.tasks is empty"),
        ("[evaluate]\nlimit = 0", "evaluate.limit = 0 is too small; expected at least 1"),
        ("[evaluate]\nevry = 1", "unknown key evaluate.evry (did you mean evaluate.every?)"),
    ],
)
def test_refused_content(write, added, message):
    path = write(MINIMAL + added)
    found = refusal(path)
    assert message in found and found.startswith(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('preset = "gpt-j-tiny"', "", "missing: model.preset ("),
        ('preset = "gpt-j-tiny"', "n_layers = 2\nn_ctx = 2", "missing: model.d_model, model.n_heads, model.n_vocab"),
        ('train = "train.index"', "", "missing: data.train"),
        ("steps = 100\nlearning_rate = 1e-3", "", "missing: train.steps (or train.epochs), train.learning_rate"),
        ('"gpt-j-tiny"', '"gpt-j-tiny"\nn_layer = 2', "unknown key model.n_layer (did you mean model.n_layers?)"),
        ('"gpt-j-tiny"', '"gpt-j-tiny"\narchitecture = "v2"', "model.n_shards is missing: it is the number of "),
        ('"gpt-j-tiny"', '"gpt-j-tiny"\narchitecture = "v3"', "model.architecture = 'v3' is not supported"),
        ('"gpt-j-tiny"', '"gpt-j-tiny"\ntied_head = 0', "model.tied_head = 0 is of type integer; expected a boolean"),
        ('"gpt-j-tiny"', '"gpt-j-tiny"\nresidual = "post"', "model.residual = 'post' is not supported"),
        (
            '"gpt-j-tiny"',
            '"gpt-j-tiny"\nbiases = ["q"]',
            "model.biases: 'q' is not known; expected some of: embed",
        ),
        ('"gpt-j-tiny"', '"gpt-j-tiny"\nn_kv_heads = 3', "model.n_kv_heads = 3 must divide model.n_heads = 4; 2 would"),
        ('"gpt-j-tiny"', '"gpt-j-tiny"\nwindowed_layers = "odd"', "model.windowed_layers = 'odd' needs model.window"),
        (
            '"gpt-j-tiny"',
            '"gpt-j-tiny"\nrope_scaling = 2',
            "model.rope_scaling = 2 is of type integer; expected a",
        ),
        (
            '"gpt-j-tiny"',
            '"gpt-j-tiny"\nrope_scaling = { kind = "linear", factors = 2 }',
            "unknown key model.rope_scaling.factors (did you mean model.rope_scaling.factor?)",
        ),
        (
            '"gpt-j-tiny"',
            '"gpt-j-tiny"\nrope_scaling = { kind = "linear", factor = 2.0, beta_fast = 64.0 }',
            "model.rope_scaling.beta_fast = 64.0 is not read by kind 'linear'",
        ),
        (
            '"gpt-j-tiny"',
            '"gpt-j-tiny"\nrope_scaling = { kind = "yarn", factor = 2.0 }',
            "model.rope_scaling.original_ctx = 0 must be the context",
        ),
        ('"gpt-j-tiny"', '"gpt-j-tiny"\nnorm_eps = nan', "model.norm_eps = nan must be positive"),
        ('"gpt-j-tiny"', "6", 'model.preset = 6 is of type integer; expected a string, such as "6", in quotes'),
        ('"gpt-j-tiny"', '"gpt-k"', "model.preset = 'gpt-k' is not known; expected one of: gpt-j-6b, "),
        ('"train.index"', '["a", "b"]', "data.train = ['a', 'b'] is of type array; expected a string, such as \"data/"),
        (
            '"train.index"',
            '"t"\nsequence_length = 256',
            "data.sequence_length = 256 is longer than the model's context",
        ),
        ('"train.index"', '"t"\nvalidation = "v"', 'expected a table, such as { validation = "v" }'),
        ('"train.index"', '"t"\nvalidation = {v = 1}', "data.validation.v = 1 is of type integer; expected a string"),
        ("[data]", "name = 'x'\n[data]", "unknown key model.name (name stands above the first section)"),
    ],
)
def test_refused_sections(write, old, new, message):
    assert message in refusal(write(MINIMAL.replace(old, new)))


def test_missing_keys_are_listed_at_once(write):
    assert "missing: model.preset (such as" in refusal(write(""))
    assert refusal(write("")).endswith("data.train, train.steps (or train.epochs), train.learning_rate")
    assert "missing: train.steps" not in refusal(write("trian = 1"))  # first what is misspelt


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("[train]\nsteps = \n", "c.toml", ", line 2, column 9: not valid TOML: "),
        ("a = 1\na = 2", "c.toml", ", line 2, at the end: not valid TOML: "),
        ("[train]\n[train]", "c.toml", ", line 2, column 7: not valid TOML: "),
        ("a = [1,\n", "c.toml", ", line 2, at the end: not valid TOML: "),
        ('{"layers": 28,\n "d_model" 5}', "c.json", ", line 2, column 12: not valid JSON: Expecting ':' delimiter"),
        ('{"layers": 28', "c.toml", ", line 1, column 14: not valid JSON"),
        ("layers = 28", "c.json", ", line 1, column 1: not valid JSON"),
        ("", "c.json", ", line 1, column 1: not valid JSON"),
        ("[1, 2]", "c.json", ': holds no keys but one array; expected {"layers": 28, ...}'),
        ('{"layers": 1, "layers": 2}', "c.json", ": layers stands twice; remove one"),
        (b"# fine\nname = '\xff'", "c.toml", ", line 2: byte 15 is not UTF-8; expected a text file"),
        ("a = " + "[" * 100_000, "c.toml", ": not a configuration: "),
        ("[" * 100_000, "c.json", ": not a configuration: "),
        ("[train]\nsteps = " + "9" * 5000, "c.toml", ": not a configuration: "),
        (b"#" * (2**22 + 1), "c.toml", ": is longer than 4 MiB; expected a configuration"),
    ],
)
def test_refused_files(write, content, name, message):
    path = write(content, name)
    assert refusal(path).startswith(path + message)


def test_missing_file_and_directory(write, tmp_path):
    missing = str(tmp_path / "none.toml")
    assert refusal(missing) == f"{missing}: there is no such file; expected a configuration in TOML or JSON"
    assert refusal("") == ": there is no such file; expected a configuration in TOML or JSON"
    assert refusal(str(tmp_path)) == f"{tmp_path}: is a directory; expected a configuration in TOML or JSON"
    write(MINIMAL, "config.toml")
    assert refusal(str(tmp_path / "configs")).endswith(f"did you mean {tmp_path}/configs/config.toml?")
    assert "cannot be read: embedded null byte" in refusal("a\0b")


def test_byte_order_mark_and_windows_lines(write):
    plain = load_run_config(write(MINIMAL))[0]
    assert load_run_config(write(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()))[0] == plain


def test_configuration_at_a_url(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.chdir(tmp_path)
    with fsspec.open("memory://configs/far.toml", "w") as file:
        file.write(MINIMAL)
    config = load_run_config("memory://configs/far.toml")[0]
    assert (config.name, config.data.train) == ("far", "memory://configs/train.index")
    assert config.log.directory == str(tmp_path / "runs")
    assert "there is no such file" in refusal("memory://configs/none.toml")
    assert refusal("nowhere://a.toml").startswith('"nowhere://a.toml": cannot be read: Protocol not known: nowhere')
    (tmp_path / "near.toml").write_text(MINIMAL)
    assert load_run_config(f"file://{tmp_path}/near.toml")[0].data.train == str(tmp_path / "train.index")


def test_written_paths_are_absolute(write, tmp_path):
    config = RunConfig(
        name="r",
        model=preset("gpt-j-tiny"),
        data=DataConfig(train="t.index", validation={"v": "v.index"}, tokenizer="tok.json", sequence_length=8),
        train=TrainConfig(steps=1, learning_rate=1),
    )
    read = load_run_config(write(to_toml(config), "config.toml"))[0]
    here = tmp_path / "work"
    assert (read.data.train, read.data.tokenizer) == (str(here / "t.index"), str(here / "tok.json"))
    assert read.data.validation == {"v": str(here / "v.index")}
    assert read.run_directory == here / "runs/r"
    assert config.data.train == "t.index"  # the configuration itself is left alone


def test_loading_a_configuration_imports_nothing_heavy(write):
    path = write(MINIMAL)
    program = (
        "import sys; from mesh_transformer.config.load import load_run_config; load_run_config(sys.argv[1]);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "mesh_transformer" in loaded
    third_party = {
        "jax",
        "numpy",
        "fsspec",
        "optax",
        "orbax",
        "grain",
        "tokenizers",
        "safetensors",
        "matplotlib",
        "typer",
    }
    assert not loaded & third_party
