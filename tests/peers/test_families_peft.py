"""Adapters of every family as the peft library loads them, on the Hugging Face form of their base: equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.checkpoint.convert import Conversion, convert
from mesh_transformer.checkpoint.lora import LoraRecord, base_record, target_paths
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.checkpoint.peft import write_peft
from mesh_transformer.checkpoint.weights import InMemory, assemble
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.lora import adapt, adaptable, init_adapter
from mesh_transformer.model.policy import ComputePolicy
from small_families import params_of, small

# Deprecations inside torch, transformers and peft are theirs to mend.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

# Targets as a configuration names them, and the modules that peft is to adapt.
CASES: dict[str, tuple[str, tuple[str, ...], list[str]]] = {
    "gpt2, q and v": ("gpt2", ("q", "v"), ["c_attn"]),
    "gpt2, v and o": ("gpt2", ("v", "o"), ["attn.c_proj", "c_attn"]),
    "gpt2, by its names": ("gpt2", ("c_attn", "mlp.c_proj"), ["c_attn", "mlp.c_proj"]),
    "gpt_neo": ("gpt_neo", (), ["c_fc", "c_proj", "k_proj", "out_proj", "q_proj", "v_proj"]),
    "gpt_neox, q and v": ("gpt_neox", ("q", "v"), ["query_key_value"]),
    "gpt_neox": ("gpt_neox", (), ["dense", "dense_4h_to_h", "dense_h_to_4h", "lm_head", "query_key_value"]),
    "llama": (
        "llama",
        (),
        ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"],
    ),
    "qwen2, the gate": ("qwen2", ("gate_proj", "k_proj"), ["gate_proj", "k_proj"]),
    "qwen3": ("qwen3", ("q", "v"), ["q_proj", "v_proj"]),
}
IDS = np.random.default_rng(4).integers(0, 40, (2, 14)).astype(np.int32)


def run(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS.astype(np.int64))).logits.float().numpy()


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_it_with_equal_logits(tmp_path: Path, case: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    name, targets, modules = CASES[case]
    cfg = small(name)
    paths = target_paths(targets, cfg) if targets else tuple(adaptable(cfg))
    record, params = LoraRecord(rank=3, alpha=6.0, targets=paths), params_of(cfg)
    begun = init_adapter(cfg, paths, record.rank, jax.random.key(1))
    adapter = jax.tree.map(lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), begun)
    convert(InMemory(cfg, params), tmp_path / "base", Conversion(to="huggingface"))
    origin = base_record(open_weights(tmp_path / "base"), "base", None, lambda n: None)
    metadata = {"model": cfg.to_dict(), "lora": record.to_dict(), "init_from": origin}
    with CheckpointStore(tmp_path / "tuned", keep_last=1, keep_every=0) as store:
        store.save(3, {"params": adapter}, metadata=metadata, files={}, wait=True)
    write_peft(open_weights(tmp_path / "tuned"), tmp_path / "peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_bytes())["target_modules"] == modules

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    before = run(base)
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    loaded = [name for name, _ in theirs.named_parameters() if "lora_" in name]
    assert len(loaded) == 2 * sum(1 if module == "lm_head" else cfg.n_layers for module in modules)
    expected, top = run(theirs), np.abs(before).max()
    assert np.abs(expected - before).max() > 0.05 * top
    merged = assemble(open_weights(tmp_path / "tuned"))
    for ours in (adapt(params, adapter, record.scale), merged):
        ours = jax.tree.map(jnp.asarray, ours)
        found = np.asarray(forward(ours, jnp.asarray(IDS), cfg, ComputePolicy()))
        assert np.abs(found - expected).max() <= 2e-5 * top
    # What peft merges by itself is the same: fused, and (in, out) or (out, in).
    assert np.abs(run(theirs.merge_and_unload()) - expected).max() <= 2e-5 * top
