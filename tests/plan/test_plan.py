"""Formulas of the plan against hand counts, and what its search says."""

import dataclasses
from typing import Any

import pytest

from mesh_transformer.config.devices import DEVICES, device, of_kind, peak_flops_of
from mesh_transformer.config.errors import ConfigError, UserError
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.config.tuning import LoraConfig
from mesh_transformer.kernels import accelerators
from mesh_transformer.model.params import count_matmul_params, count_params, named_specs, shape
from mesh_transformer.plan import search
from mesh_transformer.plan.links import ring_speed, sent_bytes
from mesh_transformer.plan.serving import serve_plan, serve_plans, weight_bytes
from mesh_transformer.plan.speed import step_time
from mesh_transformer.plan.work import attention_kernel, work_of
from mesh_transformer.sharding.memory import state_bytes
from mesh_transformer.sharding.mesh import mesh_sizes
from mesh_transformer.sharding.rules import rules_for

V3 = device("tpu-v3")


def run(model: str = "gpt-j-6b", *, train: Any = None, mesh: Any = None, length: int = 2048) -> RunConfig:
    how = {"steps": 1000, "learning_rate": 1e-4, "batch_size": 32, "remat": "full"} | (train or {})
    data = DataConfig(train="none", sequence_length=length)
    cfg = preset(model)
    return RunConfig(name="p", model=cfg, data=data, train=TrainConfig(**how), mesh=MeshConfig(**(mesh or {})))


@pytest.mark.parametrize("mesh", [{"tensor": 8}, {"fsdp": 4, "tensor": 2, "zero": 3}, {"fsdp": 2, "pipeline": 4}])
def test_what_rests_is_what_the_sharding_rules_say(mesh: dict[str, int]) -> None:
    planned = search.plan(run(mesh=mesh, train={"moment_dtype": "bfloat16"}), V3, 8)
    cfg, sizes = preset("gpt-j-6b"), mesh_sizes(MeshConfig(**mesh), 8)
    table = [(spec.axes, shape(spec, cfg)) for spec in named_specs(cfg).values()]
    exact = state_bytes(table, rules_for(sizes, zero=mesh.get("zero", 1)), sizes, moment_itemsize=2)
    assert (planned.bytes.parameters, planned.bytes.optimizer) == (exact.params, exact.moments)


def test_bytes_grow_with_what_is_held() -> None:
    def total(**train: Any) -> float:
        return search.plan(run(train=train, mesh={"tensor": 8}), V3, 8).bytes.total

    assert total(remat="none") > total(remat="dots") > total(remat="full")
    assert total(remat="none", gradient_accumulation=8) < total(remat="none", gradient_accumulation=4)
    halved = search.plan(run(mesh={"tensor": 8}), V3, 8).bytes.optimizer / 2
    assert search.plan(run(train={"moment_dtype": "bfloat16"}, mesh={"tensor": 8}), V3, 8).bytes.optimizer == halved


def test_sent_bytes_are_the_ring_formulas() -> None:
    cfg = preset("gpt-j-6b")
    tensor = run(train={"batch_size": 1}, mesh={"tensor": 8})
    work = work_of(tensor, 8, dtype="bfloat16", kernel="splash", chunk=4096)
    stream = 4 * 2048 * 4096
    assert sent_bytes(tensor, work) == {"tensor": pytest.approx((28 * 4 + 4) * 7 / 8 * stream)}
    data = run(mesh={"data": 8})
    work = work_of(data, 8, dtype="bfloat16", kernel="splash", chunk=4096)
    assert sent_bytes(data, work) == {"gradients": pytest.approx(2 * 7 / 8 * 4 * count_params(cfg))}
    assert ring_speed(device("h100"), 8, 1) == 450e9
    assert ring_speed(device("h100"), 2, 8) == 50e9  # one port each
    assert ring_speed(device("h100"), 16, 1) == 400e9  # eight ports of a machine


def test_time_follows_from_the_peak() -> None:
    planned = run(mesh={"tensor": 8}, train={"remat": "none"})
    work = work_of(planned, 8, dtype="bfloat16", kernel="plain", chunk=2**20)
    slow, fast = (step_time(planned, work, V3, reach=reach) for reach in (0.3, 0.6))
    assert slow.products == pytest.approx(2 * fast.products)
    assert fast.products == pytest.approx(fast.flops / (0.6 * fast.peak))  # nothing is computed again
    assert fast.mfu == pytest.approx(fast.flops / fast.seconds / (8 * 61.5e12)) and fast.mfu < 0.6
    full = step_time(run(mesh={"tensor": 8}), work, V3)
    assert 1.25 < full.products / fast.products < 4 / 3


def test_ranking_puts_what_fits_first_and_the_fastest_on_top() -> None:
    plans = search.ranked(run(train={"batch_size": 8}), V3, 8)
    fitting = [one for one in plans if one.fits]
    assert fitting and plans[: len(fitting)] == fitting
    speeds = [one.time.tokens_per_second for one in fitting]
    assert speeds[0] > max(speeds) / 1.03
    assert not search.plan(run(train={"batch_size": 8}), V3, 8).fits  # as configured: data 8
    assert any(one.changes.get("mesh.tensor") == 8 for one in fitting)
    assert len({str(sorted((one.changes | {"r": one.run}).items(), key=str)) for one in plans}) == len(plans)


def test_more_devices_are_found_where_these_do_not_do() -> None:
    large = run("gpt-j-10b", train={"batch_size": 8})
    assert not any(one.fits for one in search.ranked(large, V3, 8))
    more = search.more_devices(large, V3, 8)
    assert more is not None and more.fits and more.work.sizes.n_devices in (16, 32)


def test_kernels_are_chosen_as_the_program_chooses_them() -> None:
    for name in ("gpt-j-6b", "gpt-j-13b"):  # heads of 256 and 192
        for length in (2048, 100):
            planned = run(name, length=length)
            width = planned.model.axis_sizes["head_dim"]
            reason = accelerators.why_plain("splash", dtype="bfloat16", head_dim=width, seq=length)
            assert (attention_kernel(planned, V3) == "plain") == (reason is not None)
    assert attention_kernel(run(), device("h200")) == "cudnn"
    assert attention_kernel(run(), device("a100-80gb")) == "plain"  # heads of 256 before Hopper
    assert attention_kernel(run(train={"compute_dtype": "float32"}), device("h200")) == "plain"


def test_serving_counts_weights_and_cache() -> None:
    cfg = preset("gpt-j-6b")
    assert weight_bytes(cfg, "bfloat16") == 2 * count_params(cfg)
    h200 = device("h200")
    one = serve_plan(cfg, h200, data=1, tensor=1, batch=8, weights_as="bfloat16")
    assert one.cache_a_text == (2048 + 64) * 2 * 28 * 4096 * 2
    assert one.cache == 8 * one.cache_a_text
    most = serve_plan(cfg, h200, data=1, tensor=1, batch=one.largest_batch, weights_as="bfloat16")
    assert most.fits and not dataclasses.replace(most, cache=most.cache + 3 * one.cache_a_text).fits
    read = 2 * count_params(cfg) + 8 * 2048 * 2 * 28 * 4096 * 2
    assert one.seconds == pytest.approx(read / (0.8 * 4800e9))
    plans = serve_plans(cfg, V3, 8, batch=8, mesh=None, weights=["bfloat16", "int8"])
    assert plans[0].fits and plans[0].sizes.tensor > 1
    with pytest.raises(ConfigError, match=r"mesh\.tensor = 3"):
        serve_plans(cfg, V3, 3, batch=8, mesh=(1, 3), weights=["bfloat16"])


def test_devices_have_what_their_sheets_say() -> None:
    assert {name for name in DEVICES if name.startswith("tpu")} == {
        "tpu-v2", "tpu-v3", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e"
    }  # fmt: skip
    assert all(one.source and one.memory > one.usable * 0.99 for one in DEVICES.values())
    kinds = {"TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12, "NVIDIA H100 PCIe": 756e12, "TPU v2": 22.5e12}
    assert {kind: peak_flops_of(kind) for kind in kinds} == kinds
    assert peak_flops_of("cpu") is None and of_kind("cpu") is None
    with pytest.raises(UserError, match=r"did you mean tpu-v3\?.*\n.*h200") as error:
        device("tpu-v33")
    assert "here" in str(error.value)


def adapter(*targets: str, **how: Any) -> RunConfig:
    return dataclasses.replace(run(**how), lora=LoraConfig(rank=8, targets=targets or ("q", "v")))


def test_an_adapter_alone_has_gradients_moments_and_updates() -> None:
    h200 = device("h200")
    whole, part = run(train={"batch_size": 1}), adapter(train={"batch_size": 1})
    both = search.plan(whole, h200, 1).bytes
    planned = search.plan(part, h200, 1, assumed=search.Assumed(base="bfloat16")).bytes
    own = 28 * 2 * 8 * (4096 + 4096)  # A and B of q and v in every layer
    assert planned.parameters == 2 * count_params(whole.model) + 4 * own
    assert (planned.optimizer, planned.gradients) == (8 * own, 0)  # fullest in the loss
    assert both.parameters == 4 * count_params(whole.model) and both.total > 5 * planned.total
    assert search.plan(part, h200, 1).bytes.parameters == both.parameters + 4 * own  # as train.param_dtype has it
    # On a mesh A and B lie as the axes do that they have: q's and v's B over tensor, A and B over no fsdp but embed.
    divided = work_of(adapter(mesh={"tensor": 8}), 8, dtype="bfloat16", kernel="splash", chunk=1024)
    assert divided.learned.use == 28 * 2 * 8 * (4096 + 4096 / 8)
    wide = search.plan(adapter("w_in", train={"batch_size": 1}), device("cpu"), 1).bytes
    assert wide.workspace > search.plan(part, device("cpu"), 1).bytes.workspace


def test_a_narrow_base_is_widened_where_products_are_wider() -> None:
    narrow = search.plan(adapter(train={"batch_size": 1}), device("cpu"), 1, assumed=search.Assumed(base="bfloat16"))
    wide = search.plan(adapter(train={"batch_size": 1}), device("cpu"), 1)
    n = count_params(narrow.run.model)
    assert narrow.bytes.total - wide.bytes.total == pytest.approx(2 * n)  # 2 + 4 against 4


def test_an_adapter_leaves_out_a_third_of_the_products_and_sends_its_own_gradients() -> None:
    h200 = device("h200")
    one, part = run(train={"remat": "none"}), adapter(train={"remat": "none"})
    work, own = (work_of(r, 1, dtype="bfloat16", kernel="plain", chunk=2**20) for r in (one, part))
    seconds, fewer = step_time(one, work, h200).products, step_time(part, own, h200).products
    tokens = 32 * 2048
    saved = 2 * count_matmul_params(one.model) * tokens - 6 * own.learned.use * tokens
    assert seconds - fewer == pytest.approx(saved / (0.6 * 989e12))
    data = adapter(mesh={"data": 8})
    work = work_of(data, 8, dtype="bfloat16", kernel="splash", chunk=4096)
    assert sent_bytes(data, work) == {"gradients": pytest.approx(2 * 7 / 8 * 4 * 28 * 2 * 8 * 2 * 4096)}
    zero = adapter(mesh={"fsdp": 8})
    sent = sent_bytes(zero, work_of(zero, 8, dtype="bfloat16", kernel="splash", chunk=4096))
    assert sent["updated parameters"] == pytest.approx(7 / 8 * 4 * 28 * 2 * 8 * 2 * 4096)
    assert not any(one.run.mesh.pipeline > 1 for one in search.ranked(adapter(), V3, 8))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.pipeline = 2: \[lora\] is not supported"):
        search.plan(adapter(mesh={"pipeline": 2}), V3, 8)
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        search.plan(adapter("query"), V3, 8)
    with pytest.raises(ConfigError, match=r"mesh\.tensor"):
        search.plan(run(mesh={"tensor": 3}), V3, 3)
