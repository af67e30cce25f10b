"""Attention by the kernels of accelerators: what is asked of them, what they give where they can be run here, and what
is done where they do not serve.

cuDNN's kernel cannot run on a CPU. That the program for a GPU asks it for the right thing is read from the program, as
lowered for "cuda"; splash attention runs step by step on the CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mesh_transformer import compat
from mesh_transformer.config.presets import preset
from mesh_transformer.engine.programs import Programs
from mesh_transformer.kernels import accelerators
from mesh_transformer.model import cache as caches
from mesh_transformer.model import layers
from mesh_transformer.model.decoder import forward, hidden
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import init_params
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.rules import ONE_DEVICE

TINY = dataclasses.replace(preset("gpt-j-tiny"), n_layers=2, n_ctx=32)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN is there, for a GPU of Hopper's kind: what JAX asks of the machine before it lowers its custom calls."""
    from jax._src.cudnn import fused_attention_stablehlo as asked

    monkeypatch.setattr(accelerators, "cudnn_version", lambda: 92800)
    monkeypatch.setattr(asked, "check_cudnn_version", lambda: 92800)
    monkeypatch.setattr(asked, "check_compute_capability", lambda capability: True)


@pytest.fixture
def by_plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that serve everything, and compute as the reference does."""

    def plain(q: Any, k: Any, v: Any, *, kind: str, **how: Any) -> Any:
        return accelerators.plain_causal_attention(q, k, v, **how)

    monkeypatch.setattr(accelerators, "causal_attention", plain)
    monkeypatch.setattr(accelerators, "why_plain", lambda kind, **shape: None)


def lowered_for_cuda(function: Any, *arguments: Any) -> str:
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.replace('\\"', '"').replace("\\22", '"')


def random(shape: tuple[int, ...], seed: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def test_each_platform_has_its_kernel() -> None:
    named = {name: accelerators.attention_for(name) for name in ("cpu", "gpu", "cuda", "tpu", "rocm")}
    assert named == {"cpu": "plain", "gpu": "cudnn", "cuda": "cudnn", "tpu": "splash", "rocm": "plain"}


@pytest.mark.parametrize(
    ("kind", "dtype", "head_dim", "seq", "reason"),
    [
        ("cudnn", "bfloat16", 256, 2047, None),
        ("cudnn", "float32", 256, 2048, "not float32"),
        ("cudnn", "float16", 264, 2048, "multiples of 8 up to 256"),
        ("cudnn", "float16", 20, 2048, "multiples of 8 up to 256"),
        ("splash", "bfloat16", 256, 2048, None),
        ("splash", "bfloat16", 64, 2048, "multiples of 128"),
        ("splash", "bfloat16", 256, 2000, "2000 positions"),
    ],
)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_is_not_served_is_told(kind: Any, dtype: str, head_dim: int, seq: int, reason: str | None) -> None:
    told = accelerators.why_plain(kind, dtype=dtype, head_dim=head_dim, seq=seq)
    assert told is None if reason is None else reason in str(told)


def test_without_cudnn_the_plain_form_computes_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    accelerators.say_once.cache_clear()
    params = init_params(TINY, jax.random.key(0))
    tokens = jnp.arange(16, dtype=jnp.int32)[None]
    policy = ComputePolicy(dtype="bfloat16")
    with caplog.at_level(logging.WARNING):
        fallen = [forward(params, tokens, TINY, dataclasses.replace(policy, attention="cudnn")) for _ in range(2)]
    assert np.array_equal(fallen[1], forward(params, tokens, TINY, policy))
    lines = [record.getMessage() for record in caplog.records if "plain form" in record.getMessage()]
    assert lines == ["attention is computed in its plain form, not by the cuDNN kernel: no cuDNN was found"]


@pytest.mark.parametrize("window", [64, 24])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_cudnn_is_asked_for_causal_attention_with_this_scale_and_window(window: int) -> None:
    q = jax.ShapeDtypeStruct((2, 64, 4, 256), jnp.bfloat16)
    compute = functools.partial(accelerators.causal_attention, scale=0.25, window=window, kind="cudnn")
    text = lowered_for_cuda(jax.grad(lambda q, k, v: jnp.sum(compute(q, k, v).astype(jnp.float32))), q, q, q)
    for target in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        (call,) = [line for line in text.splitlines() if re.search(re.escape(target) + r"\b(?!B)", line)]
        assert '"fmha_scale": 0.25' in call
        assert '"mask_type": "CAUSAL"' in call
        assert f'"sliding_window_length": {window if window < 64 else 0},' in call


@pytest.mark.usefixtures("as_on_a_gpu")
def test_on_a_mesh_every_device_asks_for_its_rows_and_heads() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    q = jax.ShapeDtypeStruct((4, 64, 8, 128), jnp.bfloat16)
    split = PartitionSpec("data", None, "tensor")

    def loss(q: Any) -> Any:
        q = jax.sharding.reshard(q, split)
        mixed = accelerators.causal_attention(q, q, q, scale=1.0, window=64, kind="cudnn")
        assert jax.typeof(mixed).sharding.spec == PartitionSpec("data", None, "tensor", None)
        return jnp.sum(mixed.astype(jnp.float32))

    with jax.set_mesh(mesh):
        text = lowered_for_cuda(jax.grad(loss), q)
    assert text.count("__cudnn$fmhaSoftmax(") + text.count('@"__cudnn$fmhaSoftmax"') == 1
    assert '"dimensions": ["2", "2", "64", "64"]' in text


@pytest.mark.parametrize("window", [pytest.param(256, marks=pytest.mark.long), 100])
def test_splash_attention_and_its_gradients_equal_the_plain_form(window: int) -> None:
    q, k, v, g = (random((1, 256, 2, 128), seed, jnp.bfloat16) for seed in range(4))
    how: dict[str, Any] = {"scale": 128**-0.5, "window": window}
    splash = functools.partial(accelerators.causal_attention, kind="splash", interpret=True, **how)
    near, pull = jax.vjp(splash, q, k, v)
    wide = [a.astype(jnp.float32) for a in (q, k, v, g)]
    true, pull_true = jax.vjp(functools.partial(accelerators.plain_causal_attention, **how), *wide[:3])
    for a, b in zip((near, *pull(g)), (true, *pull_true(wide[3])), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        # Rounding to bfloat16 is 2^-9 = 0.2 % at most; a wrong mask or scale is off by tens of percent.
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


@pytest.mark.parametrize("length", [20, 48])
@pytest.mark.usefixtures("by_plain_kernel")
def test_a_model_by_a_kernel_is_the_plain_model(length: int) -> None:
    """Scale, window and the missing mask reach the kernel; 48 positions are more than the context of 32."""
    params = init_params(TINY, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, TINY.n_vocab, (2, length)), jnp.int32)
    policy = ComputePolicy(dtype="float32")
    true = forward(params, tokens, TINY, policy)
    near = forward(params, tokens, TINY, dataclasses.replace(policy, attention="cudnn"))
    np.testing.assert_allclose(near, true, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("cfg", "documents", "reason"),
    [
        (dataclasses.replace(TINY, position="t5", d_rotary=0), False, "T5 positions"),
        (TINY, True, "documents are kept apart"),
    ],
    ids=["t5", "documents"],
)
@pytest.mark.usefixtures("by_plain_kernel")
def test_what_no_kernel_masks_is_computed_plainly(
    cfg: Any, documents: bool, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    accelerators.say_once.cache_clear()
    params = init_params(cfg, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, cfg.n_vocab, (1, 16)), jnp.int32)
    found = []
    for kind in ("plain", "cudnn"):
        policy = ComputePolicy(dtype="float32", attention=kind)  # type: ignore[arg-type]
        found.append(hidden(params, tokens, cfg, policy, separator=3 if documents else None)[0])
    assert np.array_equal(*found)
    assert [reason in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("position", ["rotary", "t5"])
@pytest.mark.parametrize("newest", [[5, 0, 40], [70, 79, 33], [95, 200, 130]], ids=["few", "full", "wrapped"])
def test_attention_to_all_pages_at_once_is_that_page_by_page(position: Any, newest: list[int]) -> None:
    """Tables of five pages of 16 for a context of 64; at last texts have gone round their tables."""
    cfg = dataclasses.replace(TINY, n_ctx=64, position=position, d_rotary=8 if position == "rotary" else 0)
    cache = caches.empty_cache(cfg, 16, 16, 256, jnp.float32)
    cache = dataclasses.replace(cache, k=random(cache.k.shape, 1), v=random(cache.v.shape, 2))
    table = jnp.asarray(1 + np.random.default_rng(0).permutation(15).reshape(3, 5), jnp.int32)
    heads, width = cfg.axis_sizes["heads"], cfg.axis_sizes["head_dim"]
    for seq in (1, 4):
        positions = jnp.asarray(newest, jnp.int32)[:, None] - jnp.arange(seq)[::-1]
        q = random((3, seq, heads, width), 3)
        relative = random((heads, layers.N_BUCKETS), 4) if position == "t5" else None
        where = {"relative": relative, "cfg": cfg, "policy": ComputePolicy(), "rules": ONE_DEVICE}
        found = [
            jax.jit(functools.partial(attend, **where))(q, cache, jnp.int32(1), table, positions)
            for attend in (caches.attend, caches.attend_at_once)
        ]
        seen = np.asarray(positions) >= 0  # what stands before a text sees nothing
        np.testing.assert_allclose(np.asarray(found[1])[seen], np.asarray(found[0])[seen], rtol=1e-5, atol=1e-5)


def test_tables_are_cut_to_few_widths_and_never_below_what_is_used() -> None:
    cfg = dataclasses.replace(TINY, n_ctx=1024)  # pages of 64, 17 columns
    programs = Programs(cfg, ComputePolicy(attention="cudnn"))
    rows = np.zeros((2, 2 + 17), np.int32)
    widths = {n: programs.used_columns(rows, np.asarray([0, n])).shape[1] - 2 for n in (0, 255, 256, 600, 1023, 5000)}
    assert widths == {0: 4, 255: 4, 256: 8, 600: 16, 1023: 16, 5000: 17}
    plain = Programs(cfg, ComputePolicy())
    assert plain.used_columns(rows, np.asarray([0, 0])) is rows


def test_programs_with_short_tables_give_the_logits_of_whole_ones() -> None:
    chunk = np.random.default_rng(0).integers(0, TINY.n_vocab, (2, 16), np.int32)
    logits = []
    cfg = dataclasses.replace(TINY, n_layers=1)
    params = init_params(cfg, jax.random.key(0))
    for kind in ("plain", "cudnn"):
        programs = Programs(cfg, ComputePolicy(attention=kind))  # type: ignore[arg-type]
        cache = caches.empty_cache(cfg, 9, 32, 64, jnp.float32)
        table = np.asarray([[1, 2], [3, 4]], np.int32)
        _, cache, _ = programs.prefill(
            params, cache, chunk, np.concatenate([np.full((2, 2), (0, 16), np.int32), table], 1)
        )
        step = np.concatenate([np.asarray([[7, 16], [9, 16]], np.int32), table], 1)
        logits.append(programs.decode(params, cache, step)[0])
    np.testing.assert_allclose(logits[1], logits[0], rtol=2e-5, atol=2e-5)


def n_products(jaxpr: Any) -> int:
    """Products of two arrays in a program, those of functions that it calls too."""
    n = 0
    for equation in jaxpr.eqns:
        n += equation.primitive.name == "dot_general"
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(value, "jaxpr", value)
            n += n_products(inner) if hasattr(inner, "eqns") else 0
    return n


def test_remat_dots_computes_no_product_with_a_weight_again() -> None:
    cfg = dataclasses.replace(TINY, n_layers=1)
    params = init_params(cfg, jax.random.key(0))
    rows = jnp.arange(34, dtype=jnp.int32).reshape(2, 17)

    def gradient(remat: Any, dtype: str) -> Any:
        policy = ComputePolicy(dtype=dtype, remat=remat)
        return jax.jit(jax.grad(lambda params: loss_report(params, rows, cfg, policy).total))

    for dtype in ("bfloat16", "float32"):
        counts = {r: n_products(jax.make_jaxpr(gradient(r, dtype))(params).jaxpr) for r in ("none", "dots", "full")}
        # Forward again: queries, keys, values, into the feed-forward; out of it, and of attention, nothing needs.
        # "dots" computes the two products of attention again, whose scores are not kept.
        assert counts["dots"] <= counts["none"] + 2, (dtype, counts)
        assert counts["full"] >= counts["dots"] + 4, (dtype, counts)
    exact, again = (gradient(remat, "float32")(params) for remat in ("none", "dots"))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """JAX's plugin for NVIDIA GPUs and jaxlib, as files that name the flags they know; no settings yet."""
    known = b"...xla_gpu_enable_latency_hiding_scheduler\0..."
    for package, library in (("jax_plugins.xla_cuda13", "xla_cuda_plugin.so"), ("jaxlib", "libjax_common.so")):
        (tmp_path / package).mkdir()
        (tmp_path / package / library).write_bytes(known)
    places = {"jax_plugins.xla_cuda13": tmp_path / "jax_plugins.xla_cuda13", "jaxlib": tmp_path / "jaxlib"}
    monkeypatch.setattr(compat, "_directory_of", places.get)
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_PLATFORMS", "MESH_TRANSFORMER_GPU"):
        monkeypatch.setenv(name, "")  # so that what a test makes of it is undone
        del os.environ[name]
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x")
    return tmp_path


def settings() -> tuple[str | None, str | None]:
    return os.environ.get("XLA_FLAGS"), os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")


def test_gpu_settings_are_those_that_both_libraries_know(plugin: Path) -> None:
    compat.prepare_gpu()
    flags = "--xla_dump_to=/tmp/x --xla_gpu_enable_latency_hiding_scheduler=true"
    assert settings() == (flags, "0.92")
    compat.prepare_gpu()
    assert os.environ["XLA_FLAGS"] == flags


@pytest.mark.parametrize("given", ["--xla_gpu_enable_latency_hiding_scheduler=false", ""])
def test_gpu_settings_that_are_given_or_unknown_are_left(plugin: Path, given: str) -> None:
    if not given:
        (plugin / "jaxlib" / "libjax_common.so").write_bytes(b"another version")
    os.environ.update({"XLA_FLAGS": given, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"})
    compat.prepare_gpu()
    assert settings() == (given, "0.5")


@pytest.mark.parametrize("said", [{"MESH_TRANSFORMER_GPU": "default"}, {"JAX_PLATFORMS": "cpu"}], ids=["off", "cpu"])
def test_gpu_settings_are_not_made_where_they_are_not_wanted(
    plugin: Path, said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**said, "MESH_TRANSFORMER_ALLOCATOR": "default", "TF_CPP_MIN_LOG_LEVEL": "2"}.items():
        monkeypatch.setenv(name, value)
    compat.prepare_process()
    assert settings() == ("--xla_dump_to=/tmp/x", None)


@pytest.mark.parametrize(
    ("flags", "given", "threads"),
    [
        ("--xla_force_host_platform_device_count=200", None, "1600"),
        ("--xla_force_host_platform_device_count=2 --xla_force_host_platform_device_count=300", None, "2400"),
        ("--xla_force_host_platform_device_count=200", "3", "3"),
        ("--xla_force_host_platform_device_count=1", None, None),
        ("", None, None),
    ],
    ids=["many", "the last one counts", "as given", "one", "no flag"],
)
def test_devices_made_of_one_cpu_get_threads(
    flags: str, given: str | None, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("PJRT_NPROC", given or "")
    if given is None:
        monkeypatch.delenv("PJRT_NPROC")
    compat.give_fake_devices_threads()
    assert os.environ.get("PJRT_NPROC") == threads
    monkeypatch.delenv("PJRT_NPROC", raising=False)
