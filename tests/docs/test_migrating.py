"""docs/migrating.md: every script, option and key of the original is there, and what it is told to be exists."""

from __future__ import annotations

import re

import pytest
import typer.main
from document_blocks import ROOT

from mesh_transformer.cli.main import app
from mesh_transformer.config.legacy import KNOWN, RENAMED, from_legacy
from mesh_transformer.config.schema import SECTIONS, run_config_from_dict

PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
# The original at its last commit: its scripts, and each script's options.
SCRIPTS = {
    "train.py": ["--tpu", "--tpu_region", "--preemptible", "--config", "--new", "--version"],
    "device_train.py": ["--config", "--tune-model-path", "--fresh-opt"],
    "eval_harness.py": ["--tpu", "--tpu_region", "--preemptible", "--config"],
    "device_sample.py": ["--config"],
    "device_serve.py": ["--config"],
    "slim_model.py": ["--config", "--ckpt-step", "--f16"],
    "to_hf_weights.py": ["--input-ckpt", "--config", "--output-path", "--debug", "--cpu", "--dtype"],
    "create_finetune_tfrecords.py": [
        "input_path", "name", "--output-dir", "--normalize-with-ftfy", "--normalize-with-wikitext-detokenize",
        "--min-unique-tokens", "--n-repack-epochs", "--seed", "--preserve-data-order", "--verbose",
        "--treat-eot-as-text",
    ],
}  # fmt: skip
OTHER_FILES = [
    "resharding_example.py", "tfrecord_loader.py", "ray_tpu.py", "mesh_transformer/build_model.py",
    "mesh_transformer/TPU_cluster.py", "mesh_transformer/train_actor.py", "mesh_transformer/transformer_shard.py",
    "mesh_transformer/layers.py", "mesh_transformer/checkpoint.py", "mesh_transformer/sampling.py",
    "mesh_transformer/util.py", "tasks/eval_harness.py", "tasks/util.py", "configs/6B_roto_256.json",
    "configs/example_config.json", "data/*.index", "docker/", "scripts/create_serve_tpu.sh",
    "scripts/deploy_server.sh", "scripts/init_ray.sh", "scripts/init_ray_v2.sh", "scripts/init_serve.sh",
    "colab_demo.ipynb", "howto_finetune.md", "benchmarks.md", "setup.py", "requirements.txt",
]  # fmt: skip
KEYS = [
    "layers", "d_model", "n_heads", "n_vocab", "norm", "pe", "pe_rotary_dims", "d_head", "seq", "cores_per_replica",
    "per_replica_batch", "gradient_accumulation_steps", "warmup_steps", "anneal_steps", "lr", "end_lr", "weight_decay",
    "total_steps", "tpu_size", "bucket", "model_dir", "train_set", "val_set", "eval_harness_tasks", "val_batches",
    "val_every", "ckpt_every", "keep_every", "val_batch_multiplier", "noise_scale_alpha", "name", "wandb_project",
    "comment", "early_cast", "early_collect", "bf16_optimizer", "eval_only", "gen_length",
]  # fmt: skip
# What the original's defects are about: each is a row of the page.
DEFECTS = [
    "jax 0.2.12", "generation of the second version", "TypeError", "token 0", "z-loss", "decays norms", "retention",
    "step % k == 1", "compiling takes", "container", "resharding from 8 to 1", "slimming", "no import from Hugging",
    "depend on `cores_per_replica`", "gradients of single examples", "does not shuffle", "stands twice",
    "summed in bfloat16", "cannot be repeated", "only Google Cloud", "Weights & Biases", "KeyErrors", "no tests",
    "TPU v3 only", "wrong place in the exporter", "first save", "fixed positions", "more results than requests",
    "noise scale", "as a string crashes", "parameter count",
]  # fmt: skip


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_file_has_a_successor() -> None:
    named = {name for row in rows("Scripts") for name in re.findall(r"`([^`]+)`", row[0])}
    assert named == {*SCRIPTS, *OTHER_FILES}
    assert all(row[1] for row in rows("Scripts"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_has_a_successor(script: str) -> None:
    named, current = [], ""
    for scripts, option, here in rows("Options"):
        current = scripts or current
        if f"`{script}`" in current:
            assert here
            named += [words.split()[0] for words in re.findall(r"`([^`]+)`", option)]
    assert sorted(named) == sorted(SCRIPTS[script])


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_known_and_told_of(key: str) -> None:
    assert key in KNOWN
    told = {row[0].strip("`"): row[1] for row in rows("Configuration keys")}
    assert told[key]
    if key in RENAMED:
        assert f"`{RENAMED[key]}`" in told[key] or "as `" in told[key]


def test_no_other_keys_are_known() -> None:
    assert sorted(KEYS) == sorted(KNOWN)
    assert [row[0].strip("`") for row in rows("Configuration keys")][-1] == "any other key"


@pytest.mark.parametrize("about", DEFECTS)
def test_every_defect_is_answered(about: str) -> None:
    found = [row for row in rows("Defects, and what is done instead") if about in row[0]]
    assert found and all(row[1] for row in found), about


def test_commands_and_options_exist() -> None:
    group = typer.main.get_command(app)
    spans = re.findall(r"`mesh-transformer ([^`]+)`", PAGE) + re.findall(r"mesh-transformer (\w.*)$", PAGE, re.M)
    assert len(spans) > 30
    for span in spans:
        words = span.split("`")[0].split()
        command = group
        while words and not words[0].startswith("-") and hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts} | {"--debug"}
        for word in words:
            assert not word.startswith("--") or word in known, f"{word} in: {span}"


def test_keys_of_today_exist() -> None:
    fields = {f"{name}.{field}" for name, kind in SECTIONS.items() for field in kind.__dataclass_fields__}
    for name in re.findall(rf"`((?:{'|'.join(SECTIONS)})\.(?!py`)\w+)", PAGE):
        assert name in fields, name


def test_files_that_are_named_exist() -> None:
    package = ROOT / "src" / "mesh_transformer"
    for row in rows("Scripts"):
        for name in re.findall(r"`([\w./]+(?:\.\w+|/))`", row[1]):
            assert (ROOT / name).exists() or (package / name).exists(), name


@pytest.mark.parametrize(("key", "value"), [("val_every", 0), ("ckpt_every", 1), ("warmup_steps", 0)])
def test_what_the_original_could_not_do(key: str, value: int) -> None:
    raw = {
        "layers": 2, "d_model": 64, "n_heads": 4, "n_vocab": 512, "seq": 128, "norm": "layernorm", "pe": "rotary",
        "cores_per_replica": 1, "per_replica_batch": 1, "total_steps": 10, "lr": 1e-3, "end_lr": 1e-4,
        "warmup_steps": 1, "anneal_steps": 9, "weight_decay": 0.1, "train_set": "a.index", "val_set": {},
        "val_batches": 1, "val_every": 5, "ckpt_every": 5, "keep_every": 5, "name": "a", key: value,
    }  # fmt: skip
    nested, _ = from_legacy(raw)
    section_name, _, field = RENAMED[key].partition(".")
    assert getattr(getattr(run_config_from_dict(nested), section_name), field) == value
