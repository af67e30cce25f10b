"""`mesh-transformer plan` as a user calls it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mesh_transformer.cli.main import app
from mesh_transformer.config.errors import ConfigError, UserError

TOML = """
name = "six"
[model]
preset = "{preset}"
[data]
train = "nowhere.index"
[train]
steps = 1000
batch_size = 16
gradient_accumulation = 16
learning_rate = 1.0e-4
remat = "full"
[mesh]
tensor = 8
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "six.toml"
    path.write_text(TOML.format(preset="gpt-j-6b"))
    return str(path)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def facts(*arguments: str) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def test_a_plan_is_told_in_words_and_in_json(config: str) -> None:
    told = call(config, "--mesh", "tensor=8", "--price-per-device-hour", "2")
    assert told.exit_code == 0
    for part in ("six on 8 x tpu-v3", "fits", "parameters   2.82 GiB", "tokens/s", "1,000 steps", "best first"):
        assert part in told.stdout, part
    found = facts(config, "--mesh", "tensor=8", "--price-per-device-hour", "2")
    assert found["devices"] == 8 and found["fits"] and not found["mends"]
    own = found["configured"]
    parts = [size for name, size in own["bytes"].items() if name not in ("total", "usable", "room")]
    assert sum(parts) == pytest.approx(own["bytes"]["total"], abs=8)
    seconds = own["seconds"]
    counted = sum(v for k, v in seconds.items() if k not in ("step", "links")) + sum(seconds["links"].values())
    assert counted == pytest.approx(seconds["step"])
    assert own["tokens_per_second"] == pytest.approx(16 * 2048 / seconds["step"])
    assert own["days"] == pytest.approx(1000 * seconds["step"] / 86400)
    assert own["cost"] == pytest.approx(own["days"] * 24 * 8 * 2)


def test_what_does_not_fit_comes_with_the_smallest_change(config: str) -> None:
    found = facts(config, "--mesh", "tensor=8", "--set", "train.remat=none")
    assert found["configured"]["fits"] is False and found["configured"]["bytes"]["room"] < 0
    (mend,) = found["mends"]
    assert mend.startswith("smallest change that fits: --set train.")
    change = mend.split("--set ")[1].split(" ")[0]
    assert facts(config, "--mesh", "tensor=8", "--set", "train.remat=none", "--set", change)["configured"]["fits"]


def test_where_nothing_fits_it_says_by_how_much_and_what_would(config: str) -> None:
    found = facts(config, "--device", "rtx-4090", "--devices", "1", "--mesh", "data=1")
    assert not found["fits"] and found["best"] == []
    assert "nothing fits on 1 x rtx-4090" in found["mends"][0] and "GiB more than there is" in found["mends"][0]
    assert any("devices" in line for line in found["mends"][1:])


def test_devices_that_nothing_divides_are_named_with_some_that_do(config: str) -> None:
    found = facts(config, "--devices", "7")
    assert "mesh.tensor" in found["configured"]["refused"]
    assert found["mends"][0] == "no mesh of 7 devices divides this model and its batch of 16 sequences"


def test_serving(config: str) -> None:
    found = facts(config, "--serve", "--device", "h200", "--devices", "1", "--batch", "4")
    assert [one["weights_as"] for one in found["plans"]] == ["bfloat16", "int8", "int4"]
    assert all(one["fits"] and one["batch"] == 4 and one["largest_batch"] > 100 for one in found["plans"])
    told = call(config, "--serve", "--device", "rtx-3090", "--devices", "1", "--batch", "64")
    assert "nothing fits" in told.stdout and "--batch" in told.stdout


def test_an_adapter_is_planned_on_what_is_said_of_its_base(config: str) -> None:
    alone = ("--device", "rtx-4090", "--devices", "1", "--mesh", "data=1", "--set", "lora.rank=8")
    found = facts(config, *alone, "--base", "bf16")
    assert found["assumed"]["base"] == "bfloat16" and found["configured"]["fits"]
    told = call(config, *alone)
    assert "an adapter of 3,670,016 parameters is trained; the model rests in float32" in told.stdout
    assert "does not fit" in told.stdout and "--base names another" in told.stdout
    assert "base" not in facts(config)["assumed"]


def test_the_originals_json_is_planned_on_its_pod(tmp_path: Path) -> None:
    keys = {
        "layers": 28, "d_model": 4096, "n_heads": 16, "n_vocab": 50400, "norm": "layernorm", "pe": "rotary",
        "pe_rotary_dims": 64, "seq": 2048, "cores_per_replica": 8, "per_replica_batch": 1,
        "gradient_accumulation_steps": 16, "warmup_steps": 3000, "anneal_steps": 300000, "lr": 1.2e-4, "end_lr": 1.2e-5,
        "weight_decay": 0.1, "total_steps": 350000, "tpu_size": 256, "bucket": "b", "model_dir": "m",
        "train_set": "pile.train.index", "val_set": {}, "val_batches": 100, "val_every": 500, "ckpt_every": 500,
        "keep_every": 10000, "name": "GPT3_6B_pile_rotary",
    }  # fmt: skip
    path = tmp_path / "6B_roto_256.json"
    path.write_text(json.dumps(keys))
    found = facts(str(path), "--mesh", "data=32,tensor=8", "--set", "log.directory=runs")
    assert found["devices"] == 256 and found["configured"]["fits"]
    assert found["configured"]["tokens_per_second"] == pytest.approx(151_000, rel=0.15)  # as published


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu-v9"], "tpu-v5p"),
        (["--mesh", "tensor=3"], "mesh.tensor = 3|but there are"),
        (["--mesh", "width=3"], "no axis"),
        (["--serve", "--mesh", "pipeline=2"], "for training"),
        (["--base", "bfloat61", "--set", "lora.rank=8"], "did you mean bfloat16"),
        (["--base", "bfloat16"], "plan an adapter: --set lora.rank=8"),
        (["--base", "bfloat16", "--serve", "--set", "lora.rank=8"], "leave one of them out"),
        (["--set", "lora.rank=8", "--set", "lora.targets=['query']"], "is no matrix of this model"),
    ],
)
def test_mistakes_are_named(config: str, arguments: list[str], message: str) -> None:
    result = call(config, *arguments)
    assert isinstance(result.exception, UserError | ConfigError) and result.exception.exit_status == 2
    assert any(part in str(result.exception) for part in message.split("|"))


def test_devices_of_this_machine_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(TOML.format(preset="gpt-j-tiny").replace("tensor = 8", "tensor = 2"))
    found = facts(str(path), "--device", "here", "--set", "data.sequence_length=64")
    assert found["devices"] == 8
    device = found["device"]
    assert device["source"].startswith("measured here: cpu")
    assert all(device[name] > 1e6 for name in ("memory", "bandwidth", "near")) and device["flops"]["float32"] > 1e8
