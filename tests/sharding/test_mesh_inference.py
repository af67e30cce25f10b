"""A model laid over several devices computes and writes what it does on one."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from generation_cases import greedy_agreement

import mesh_transformer as mt
from mesh_transformer.api import Model
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import MeshConfig, mesh_from_text
from mesh_transformer.model.params import init_params, map_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, inference_layout

BASE = ModelConfig(n_layers=2, d_model=32, n_heads=8, n_vocab=272, n_ctx=32, d_rotary=4)
FORMS: dict[str, tuple[ModelConfig, str]] = {
    "rotary": (BASE, "float32"),
    "t5": (dataclasses.replace(BASE, position="t5", d_rotary=0), "float32"),
    "fixed": (dataclasses.replace(BASE, position="fixed", d_rotary=0), "float32"),
    "16-bit weights": (BASE, "bfloat16"),
}
MESHES = ["data=2,tensor=4", "tensor=8", "data=8"]
QUICK = [("data=2,tensor=4", "16-bit weights")]
EVERY = [
    pytest.param(mesh, form, marks=() if (mesh, form) in QUICK else pytest.mark.long)
    for mesh in MESHES
    for form in FORMS
]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]  # not a multiple of the devices


def model_on(form: str, mesh: str | None) -> Model:
    cfg, dtype = FORMS[form]
    layout = ONE_DEVICE_LAYOUT if mesh is None else inference_layout(mesh_from_text(mesh), cfg)
    params = jax.tree.map(lambda w: np.asarray(2 * w), init_params(cfg, jax.random.key(1), dtype))
    placed = map_table(lambda s, w: jax.device_put(w, layout.sharding(layout.rules.param(s.axes))), cfg, params)
    return Model(cfg, placed, None, ComputePolicy(dtype="float32"), None, layout)


@dataclasses.dataclass(frozen=True)
class Answers:
    model: Model
    logits: np.ndarray
    features: np.ndarray
    log_likelihood: float
    greedy: list[list[int]]
    sampled: list[list[int]]


def answers_of(model: Model) -> Answers:
    rows = np.random.default_rng(0).integers(0, model.config.n_vocab, (3, 11))
    # Past the context, where the oldest tokens are forgotten.
    greedy, sampled = (
        [c.tokens for c in model.generate(PROMPTS, max_tokens=36, temperature=t, top_p=0.9, seed=3)] for t in (0.0, 0.8)
    )
    likelihood, _ = model._score([1, 2], [3, 4, 5])
    return Answers(model, model.logits(rows), model.features(rows, layer=1), likelihood, greedy, sampled)


@functools.cache
def alone(form: str) -> Answers:
    return answers_of(model_on(form, None))


@pytest.mark.parametrize(("mesh", "form"), EVERY)
def test_several_devices_answer_as_one(form: str, mesh: str) -> None:
    one, here = alone(form), answers_of(model_on(form, mesh))
    for ours, theirs in ((one.logits, here.logits), (one.features, here.features)):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(ours).max()
    assert here.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-5)
    agreement = greedy_agreement(PROMPTS, one.greedy, here.greedy, one.model, 2e-5 * float(np.abs(one.logits).max()))
    assert agreement.tokens >= 60 and agreement.differing == 0
    # Random numbers depend on seed, sample and position alone.
    assert here.sampled == one.sampled


def test_parameters_and_cache_are_divided() -> None:
    model = model_on("rotary", "data=2,tensor=4")
    q, tokens = model.params["layers"]["attn"]["q"], model.params["embed"]["tokens"]
    assert q.sharding.shard_shape(q.shape) == (2, 32, 2, 4)
    assert tokens.sharding.shard_shape(tokens.shape) == (68, 32)


def test_a_stored_model_on_a_mesh(tmp_path: Path) -> None:
    whole = model_on("rotary", None)
    whole.save(tmp_path / "model")
    expected = [c.tokens for c in whole.generate(PROMPTS, max_tokens=8, temperature=0.0)]
    for mesh in ("tensor=4", MeshConfig(data=2, tensor=2)):
        opened = mt.load(tmp_path / "model", mesh=mesh)
        assert [c.tokens for c in opened.generate(PROMPTS, max_tokens=8, temperature=0.0)] == expected
        opened.save(tmp_path / f"again {opened.layout.sizes}", format="huggingface")
    again = mt.load(tmp_path / "again tensor 4")
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=3", "mesh.tensor = 3 must divide model.n_heads = 8; mesh.tensor = 2 would do"),
        ("tensor=16", "= 1 x 1 x 16 x 1 = 16, but there are 8 devices"),
        ("fsdp=2", "mesh.fsdp = 2 is for training; a model that is not trained lies over data and tensor"),
        ("tensor", 'mesh = "tensor": "tensor" is no axis with its size; expected some of data, fsdp, tensor'),
        ("tensor=2;data=2", "is no axis with its size"),
        ("tensor=0", "mesh.tensor = 0 is too small"),
        ("", "is no axis with its size"),
    ],
)
def test_meshes_that_cannot_be(tmp_path: Path, mesh: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        inference_layout(mesh_from_text(mesh), BASE)


def test_the_command_takes_a_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from mesh_transformer import compat
    from mesh_transformer.cli.main import main

    monkeypatch.setattr(compat, "prepare_process", lambda: None)
    monkeypatch.setattr(compat, "use_compile_cache", lambda: None)
    model_on("rotary", None).save(tmp_path / "model")
    texts = []
    for mesh in ([], ["--mesh", "data=2,tensor=2"]):
        flags = ["--tokenizer", "bytes", "--prompt", "abc", "--max-tokens", "8", "--temperature", "0", *mesh]
        monkeypatch.setattr("sys.argv", ["mesh-transformer", "generate", str(tmp_path / "model"), *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
