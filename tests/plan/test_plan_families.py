"""The plan's formulas for what tells families apart: shared heads, tied heads, gates, windows, two sums in a layer."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mesh_transformer.bench.work import weight_bytes as read_bytes
from mesh_transformer.cli.main import app
from mesh_transformer.config.devices import device
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.model.params import count_matmul_params, count_params
from mesh_transformer.plan.links import sent_bytes
from mesh_transformer.plan.memory import step_bytes
from mesh_transformer.plan.serving import serve_plan, turned, weight_bytes
from mesh_transformer.plan.speed import step_time
from mesh_transformer.plan.work import attention_kernel, sums_of_layer, work_of
from mesh_transformer.train.metrics import flops_per_token, scored_positions

V3, H200 = device("tpu-v3"), device("h200")
LLAMA = preset("llama-3.1-8b")


def run(cfg: ModelConfig, *, length: int = 2048, remat: Any = "full", **mesh: Any) -> RunConfig:
    train = TrainConfig(steps=10, learning_rate=1e-4, batch_size=8, remat=remat)
    data = DataConfig(train="none", sequence_length=length)
    return RunConfig(name="p", model=cfg, data=data, train=train, mesh=MeshConfig(**mesh))


def work(planned: RunConfig, n: int, kernel: str = "plain") -> Any:
    return work_of(planned, n, dtype="bfloat16", kernel=kernel, chunk=1024)


def test_flops_of_a_token() -> None:
    """Llama 3.1 8B by hand: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 14336, the head."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    matrices = 32 * layer + 4096 * 128256
    assert count_matmul_params(LLAMA) == matrices
    assert flops_per_token(LLAMA, 2048) == 6 * matrices + 12 * 32 * 2048 * 32 * 128
    gpt2 = preset("gpt2")  # its head is the token table; positions are looked up
    assert count_matmul_params(gpt2) == 12 * 12 * 768**2 + 768 * 50257
    assert flops_per_token(gpt2, 1024) == 6 * count_matmul_params(gpt2) + 12 * 12 * 1024 * 768


def test_windows_limit_what_a_query_has_scores_with() -> None:
    neo = preset("gpt-neo-1.3b")  # 24 layers, every second one with 256 positions
    assert scored_positions(neo, 2048) == 12 * 2048 + 12 * 256
    assert scored_positions(neo, 100) == 24 * 100
    everywhere = dataclasses.replace(neo, windowed_layers="all")
    assert scored_positions(everywhere, 2048) == 24 * 256
    odd = dataclasses.replace(neo, n_layers=3)
    assert scored_positions(odd, 2048) == 2 * 2048 + 256
    assert scored_positions(LLAMA, 2048) == 32 * 2048


def test_the_plain_form_computes_what_a_window_hides_and_a_kernel_does_not() -> None:
    whole = run(dataclasses.replace(LLAMA, window=0), remat="none", tensor=8)
    narrow = run(dataclasses.replace(LLAMA, window=512), remat="none", tensor=8)
    plain = [step_time(one, work(one, 8), V3) for one in (whole, narrow)]
    assert plain[0].products == pytest.approx(plain[1].products) and plain[0].flops > plain[1].flops
    by_kernel = [step_time(one, work(one, 8, "splash"), V3).products for one in (whole, narrow)]
    a_token = 4 * 32 * 128 * 32 * (2048 - 512)  # forward
    saved = 2 * a_token * 8 * 2048 / 8 / (0.6 * 61.5e12)  # half of a forward and three times as much backward
    assert by_kernel[0] - by_kernel[1] == pytest.approx(saved)


def test_layers_that_alternate_have_no_kernel() -> None:
    alternating = run(preset("gpt-neo-1.3b"))
    assert attention_kernel(alternating, H200) == "plain"
    same = dataclasses.replace(alternating.model, windowed_layers="all")
    assert attention_kernel(dataclasses.replace(alternating, model=same), H200) == "cudnn"


def test_shared_heads_are_narrower_where_dots_keeps_them() -> None:
    many, few = (dataclasses.replace(LLAMA, n_kv_heads=n) for n in (32, 8))
    wide, narrow = (run(cfg, remat="dots", tensor=8) for cfg in (many, few))
    assert work(narrow, 8).kv == work(narrow, 8).heads / 4 == work(wide, 8).kv / 4
    kept = [step_bytes(one, work(one, 8)).activations for one in (wide, narrow)]
    tokens = 8 * 2048
    assert kept[0] - kept[1] == pytest.approx(32 * 2 * 2 * tokens * (32 - 8) * 128 / 8)  # k and v in bfloat16
    ungated = dataclasses.replace(few, feed_forward="gelu_tanh", biases=())
    plain = run(ungated, remat="dots", tensor=8)
    assert kept[1] - step_bytes(plain, work(plain, 8)).activations == pytest.approx(32 * 2 * tokens * 14336 / 8)


@pytest.mark.parametrize(
    ("residual", "remat", "a_layer"),
    [
        ("parallel", "full", 2),
        ("parallel-two-norms", "none", 3),
        ("serial", "none", 4),
        ("serial", "full", 5),  # attention's sum is computed again
    ],
)
def test_sums_over_tensor(residual: Any, remat: str, a_layer: int) -> None:
    cfg = dataclasses.replace(preset("gpt-j-6b"), residual=residual)
    planned = run(cfg, remat=remat, data=1, tensor=8)
    sent = sent_bytes(planned, work(planned, 8, "splash"))
    stream = 4 * 8 * 2048 * 4096
    # An all-reduce sends its array twice; beside the layers, embedding and head have one each.
    assert sent == {"tensor": pytest.approx((28 * a_layer + 2) * 2 * 7 / 8 * stream)}


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-0.6b"])
def test_serving_is_parameters_and_cache(name: str) -> None:
    cfg = preset(name)
    layers, kv, width = (cfg.axis_sizes[axis] for axis in ("layers", "kv_heads", "head_dim"))
    one = serve_plan(cfg, H200, data=1, tensor=1, batch=2, weights_as="bfloat16")
    assert one.weights == 2 * count_params(cfg)
    assert one.cache_a_text == (cfg.n_ctx + 64) * 2 * layers * kv * width * 2
    assert one.cache == 2 * one.cache_a_text


def test_a_tied_head_is_held_once_more_where_it_is_quantised() -> None:
    cfg = preset("qwen3-0.6b")
    vocab, embed = 151936, 1024
    assert turned(cfg, "bfloat16") == turned(LLAMA, "int8") == 0
    assert turned(cfg, "int8") == vocab * embed + 4 * vocab
    assert turned(cfg, "int4") == vocab * embed // 2 + 2 * vocab * embed // 32
    alone, apart = (serve_plan(cfg, H200, data=n, tensor=1, batch=2, weights_as="int8") for n in (1, 2))
    assert alone.weights - apart.weights == turned(cfg, "int8")
    untied = dataclasses.replace(cfg, tied_head=False)
    for precision in ("float32", "bfloat16", "int8", "int4"):  # what a step reads is as much
        assert read_bytes(cfg, precision) == read_bytes(untied, precision)
    assert weight_bytes(untied, "bfloat16") - weight_bytes(cfg, "bfloat16") == 2 * vocab * embed


def test_a_serial_residual_sends_two_sums_for_each_layer_and_token() -> None:
    cfg = preset("gpt-j-6b")
    parallel, serial = (
        serve_plan(c, V3, data=1, tensor=8, batch=4, weights_as="bfloat16").seconds
        for c in (cfg, dataclasses.replace(cfg, residual="serial"))
    )
    more = 2 * 7 / 8 * 4 * 4 * 4096 * 28 / 83.01e9
    # The second norm's parameters are read beside it.
    assert serial - parallel == pytest.approx(more, rel=0.02)


def test_a_preset_is_planned_by_the_command(tmp_path: Path) -> None:
    config = tmp_path / "llama.toml"
    config.write_text(
        '[model]\npreset = "llama-3.1-8b"\n[data]\ntrain = "x.index"\nsequence_length = 4096\n'
        "[train]\nsteps = 10\nbatch_size = 16\nlearning_rate = 1e-5\n"
    )
    told = CliRunner().invoke(app, ["plan", str(config), "--device", "h200", "--devices", "1", "--serve", "--json"])
    assert told.exit_code == 0, told.exception
    plans = {one["weights_as"]: one for one in json.loads(told.stdout)["plans"]}
    assert plans["bfloat16"]["bytes"]["weights"] == 2 * 8_030_261_248
    assert plans["bfloat16"]["cache_bytes_a_text"] == (131072 + 64) * 131072
    assert plans["int4"]["bytes"]["weights"] < plans["int8"]["bytes"]["weights"] < 0.6 * 2 * 8_030_261_248


@pytest.mark.long
@pytest.mark.parametrize("residual", ["parallel", "parallel-two-norms", "serial"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_sums_are_those_of_the_compiled_step(residual: Any, remat: Any) -> None:
    """All-reduces of a whole stream in the loops' bodies and around them."""
    import jax

    from mesh_transformer.model.policy import ComputePolicy
    from mesh_transformer.sharding.layout import layout_for
    from mesh_transformer.train.loop import train_batches
    from mesh_transformer.train.state import abstract_state
    from mesh_transformer.train.step import make_train_step

    cfg = ModelConfig(
        n_layers=3, d_model=64, n_heads=4, n_vocab=128, n_ctx=32, d_rotary=8, residual=residual
    )  # fmt: skip
    planned = run(cfg, length=32, remat=remat, data=1, tensor=2)
    layout = layout_for(planned)
    policy = ComputePolicy(remat=remat)
    with layout.using():
        step = jax.jit(make_train_step(cfg, planned.train, policy, layout.rules), donate_argnums=0)
        lowered = step.lower(abstract_state(planned, layout), train_batches(planned, layout).abstract)
    results = re.findall(r"= (.*?) all-reduce\(", lowered.compile().as_text())  # of one array, or of several at once
    found = sum(len(re.findall(r"f32\[8,32,64\]", result)) for result in results)
    norms, branches = sums_of_layer(cfg)
    again = branches - 1 if remat == "full" else 0
    assert found == norms + branches + again + 2  # a loop's body stands there once
