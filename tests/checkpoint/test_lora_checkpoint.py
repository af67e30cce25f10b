"""Checkpoints of an adapter: read as the merged model, converted, and refused where the base is not what it was."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.checkpoint.convert import Conversion, convert
from mesh_transformer.checkpoint.logical import fingerprint
from mesh_transformer.checkpoint.lora import LoraRecord, LoraWeights, base_record, record_of, target_paths
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.checkpoint.peft import write_peft
from mesh_transformer.checkpoint.weights import InMemory, assemble
from mesh_transformer.config.errors import CheckpointError, ConfigError, UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.tuning import LoraConfig
from mesh_transformer.model.lora import adapt, init_adapter, merged
from mesh_transformer.model.params import init_params
from mesh_transformer.shapes import Params

CFG = ModelConfig(n_layers=3, d_model=16, n_heads=2, n_vocab=40, n_ctx=8, d_rotary=4)
V2 = ModelConfig(architecture="v2", n_layers=1, d_model=16, n_heads=2, n_vocab=40, n_ctx=8, d_rotary=4, n_shards=2)
PATHS = ("head/w", "layers/attn/o", "layers/attn/q", "layers/mlp/w_in")
RECORD = LoraRecord(rank=2, alpha=3.0, targets=PATHS)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A base, an adapter trained on it, and what both mean together."""

    base: Path
    path: Path
    params: Params
    adapter: Params

    @property
    def whole(self) -> Params:
        return merged(adapt(self.params, self.adapter, RECORD.scale), CFG)

    def document(self) -> Path:
        return self.path / "checkpoint.json"


def save(where: Path, step: int, state: Any, cfg: ModelConfig, **metadata: Any) -> Path:
    with CheckpointStore(where, keep_last=9, keep_every=0) as store:
        store.save(step, state, metadata={"model": cfg.to_dict(), **metadata}, files={}, wait=True)
        return store.path(step)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Adapted]:
    def make(dtype: Any = jnp.float32) -> Adapted:
        params = jax.tree.map(lambda w: w.astype(dtype), init_params(CFG, jax.random.key(0)))
        base = save(tmp_path / "base", 7, {"params": params}, CFG)
        begun = init_adapter(CFG, PATHS, RECORD.rank, jax.random.key(1))
        adapter = jax.tree.map(lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), begun)
        origin = base_record(open_weights(base), "base", None, lambda n: None)
        path = save(tmp_path / "tuned", 5, {"params": adapter}, CFG, lora=RECORD.to_dict(), init_from=origin)
        return Adapted(base, path, params, adapter)

    return make


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_reads_as_the_merged_model(make: Callable[..., Adapted], dtype: Any) -> None:
    made = make(dtype)
    weights = open_weights(made.path.parent)
    assert isinstance(weights, LoraWeights)
    assert (weights.step, weights.format, weights.counters) == (5, "native", None)
    assert {d.name for d in weights.dtypes.values()} == {jnp.dtype(dtype).name}
    found, expected, base = assemble(weights), made.whole, made.params
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b, before in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), jax.tree.leaves(base), strict=True
    ):
        name = "/".join(key.key for key in path)
        # In bfloat16 two ways to sum in float32 may fall on either side of a half.
        wide = [np.asarray(x, np.float32) for x in (a, b)]
        np.testing.assert_allclose(*wide, rtol=1e-6 if dtype == jnp.float32 else 2**-7, atol=1e-7)
        assert (name in PATHS) != np.array_equal(a, before)


@pytest.mark.parametrize("to", ["native", "huggingface", "legacy"])
def test_it_converts_as_the_merged_model(make: Callable[..., Adapted], tmp_path: Path, to: Any) -> None:
    weights = open_weights(make().path)
    facts = convert(weights, tmp_path / "out", Conversion(to=to))
    assert facts["changed"] == []
    back = open_weights(tmp_path / "out")
    assert not isinstance(back, LoraWeights)
    assert fingerprint(back).digest == fingerprint(weights).digest == facts["source"]["digest"]
    with pytest.raises(UserError, match="holds no optimizer state"):
        convert(weights, tmp_path / "more", Conversion(to="native", with_optimizer=True))


def test_an_adapter_may_be_trained_on_an_adapted_model(make: Callable[..., Adapted], tmp_path: Path) -> None:
    made = make()
    origin = base_record(open_weights(made.path), "tuned", None, lambda n: None)
    path = save(tmp_path / "again", 1, {"params": made.adapter}, CFG, lora=RECORD.to_dict(), init_from=origin)
    twice = merged(adapt(made.whole, made.adapter, RECORD.scale), CFG)
    q = assemble(open_weights(path))["layers"]["attn"]["q"]
    np.testing.assert_allclose(q, twice["layers"]["attn"]["q"], rtol=1e-5, atol=1e-7)


def test_it_is_not_written_over_its_own_base(make: Callable[..., Adapted]) -> None:
    made = make()
    with pytest.raises(CheckpointError, match="holds the source"):
        convert(open_weights(made.path), made.base.parent, Conversion(to="native"), overwrite=True)
    assert open_weights(made.path).step == 5


def test_the_tokenizer_may_be_the_bases(make: Callable[..., Adapted]) -> None:
    made = make()
    weights = open_weights(made.path)
    assert weights.tokenizer_file() is None
    (made.base / "tokenizer.json").write_text("{}")
    assert weights.tokenizer_file() == made.base / "tokenizer.json"


def test_a_base_that_is_gone_is_named(make: Callable[..., Adapted], tmp_path: Path) -> None:
    made = make()
    made.base.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"trained on {re.escape(str(made.base))}, which is gone") as refused:
        open_weights(made.path)
    assert "given as base" in str(refused.value) and "--init-from" in str(refused.value)


def test_a_base_that_changed_is_refused_however_it_is_stored(make: Callable[..., Adapted], tmp_path: Path) -> None:
    made = make()
    merged_before = fingerprint(open_weights(made.path)).digest
    shutil.rmtree(made.base)
    # The same model in another format is the same base.
    convert(InMemory(CFG, made.params), made.base, Conversion(to="huggingface"))
    assert fingerprint(open_weights(made.path)).digest == merged_before
    params = jax.tree.map(np.array, made.params)
    params["head"]["b"][3] += 1
    shutil.rmtree(made.base)
    convert(InMemory(CFG, params), made.base, Conversion(to="native"))
    with pytest.raises(CheckpointError, match=r"trained on a model with digest [0-9a-f]{16}, and .* has [0-9a-f]{16}"):
        open_weights(made.path)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"lora": {"rank": 2, "alpha": 3.0}}, "cannot be understood"),
        ({"lora": {"rank": 0, "alpha": 3.0, "targets": ["head/w"]}}, "cannot be understood"),
        ({"lora": {"rank": 2, "alpha": 3.0, "targets": ["embed/tokens"]}}, "cannot be understood"),
        ({"lora": {"rank": 3, "alpha": 3.0, "targets": ["head/w"]}}, r"array params/head/w/a is .*\[16, 2\]"),
        ({"lora": {"rank": 2, "alpha": 3.0, "targets": ["layers/attn/k"]}}, "array params/layers/attn/k/a is None"),
        ({"init_from": {"path": "/x"}}, "does not say what its adapter was trained on"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(
    make: Callable[..., Adapted], tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    made = make()
    origin = json.loads(made.document().read_bytes())["init_from"]
    metadata = {"lora": RECORD.to_dict(), "init_from": origin} | change
    path = save(tmp_path / "wrong", 1, {"params": made.adapter}, CFG, **metadata)
    with pytest.raises(CheckpointError, match=word):
        open_weights(path)


def test_targets_go_by_our_names_and_by_hugging_faces() -> None:
    assert target_paths(["v_proj", "q"], CFG) == ("layers/attn/q", "layers/attn/v")
    assert target_paths(["fc_out", "layers/attn/o", "w"], CFG) == ("head/w", "layers/attn/o", "layers/mlp/w_out")
    assert target_paths(["lm_head", "w"], CFG) == ("head/w",)
    assert target_paths(["w_gate"], V2) == ("layers/mlp/w_gate",)
    lora = LoraConfig(rank=4, targets=("k_proj",))
    assert record_of(lora, CFG) == LoraRecord(rank=4, alpha=8.0, targets=("layers/attn/k",))
    assert record_of(None, CFG) is None


@pytest.mark.parametrize("target, cfg", [("query", CFG), ("tokens", CFG), ("wte", CFG), ("b_in", CFG), ("q_proj", V2)])
def test_a_target_that_is_no_matrix_is_refused_with_those_that_are(target: str, cfg: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=f'lora.targets: "{target}" is no matrix') as refused:
        target_paths(["q", target], cfg)
    named = "q or q_proj" if cfg is CFG else "w_gate"
    assert named in str(refused.value) and "tokens" not in str(refused.value).replace('"tokens"', "")


def test_the_peft_directory_has_the_names_of_peft_and_layout(make: Callable[..., Adapted], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    made = make()
    n_values = write_peft(open_weights(made.path), tmp_path / "peft", base_name="owner/base")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 3.0, "owner/base")
    assert config["target_modules"] == ["fc_in", "lm_head", "out_proj", "q_proj"]
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert len(tensors) == 2 * (1 + 3 * CFG.n_layers) and n_values == sum(t.size for t in tensors.values())
    o = made.adapter["layers"]["attn"]["o"]
    prefix = "base_model.model.transformer.h.2.attn.out_proj"
    a, b = (tensors[f"{prefix}.lora_{name}.weight"] for name in "AB")
    assert (a.shape, b.shape) == ((2, 16), (16, 2))
    np.testing.assert_array_equal(a, np.asarray(o["a"][2]).reshape(16, 2).T)
    np.testing.assert_array_equal(b, np.asarray(o["b"][2]).T)


def test_what_cannot_be_a_peft_directory_is_refused(make: Callable[..., Adapted], tmp_path: Path) -> None:
    made = make()
    weights = open_weights(made.path)
    with pytest.raises(UserError, match=r"is no run with \[lora\]"):
        write_peft(open_weights(made.base), tmp_path / "peft")
    (tmp_path / "notes").mkdir()
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="exists already"):
            write_peft(weights, tmp_path / "notes", overwrite=overwrite)
    write_peft(weights, tmp_path / "peft")
    with pytest.raises(CheckpointError, match="--overwrite"):
        write_peft(weights, tmp_path / "peft")
    write_peft(weights, tmp_path / "peft", overwrite=True)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == str(made.base)
