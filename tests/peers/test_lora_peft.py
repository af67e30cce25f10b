"""An exported adapter as the peft library loads it, on the Hugging Face form of its base: equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mesh_transformer as mt
from golden import gptj
from mesh_transformer.checkpoint.convert import Conversion, convert
from mesh_transformer.checkpoint.lora import LoraRecord, base_record
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.checkpoint.peft import write_peft
from mesh_transformer.checkpoint.weights import InMemory
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.lora import adapt, adaptable, init_adapter
from mesh_transformer.model.policy import ComputePolicy

# Deprecations inside torch, transformers and peft are theirs to mend.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

SIZES = gptj.Sizes(n_layers=3, d_model=64, n_heads=4, d_rotary=8, n_vocab=160, n_ctx=48)
SEED = 17
IDS = gptj.tokens(SIZES, SEED, batch=3, length=SIZES.n_ctx)
CFG = gptj.config(SIZES)


def run(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(IDS, np.int64))).logits.float().numpy()


@pytest.mark.parametrize(
    "targets", [("layers/attn/q", "layers/attn/v"), tuple(adaptable(CFG))], ids=["q and v", "every matrix"]
)
def test_peft_loads_it_with_equal_logits(tmp_path: Path, targets: tuple[str, ...]) -> None:
    from peft import PeftModel
    from transformers import GPTJForCausalLM

    record = LoraRecord(rank=4, alpha=6.0, targets=targets)
    params = gptj.our_params(gptj.weights(SIZES, SEED), SIZES, SEED)
    begun = init_adapter(CFG, targets, record.rank, jax.random.key(1))
    adapter = jax.tree.map(lambda w: w + 0.05 * jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), begun)
    convert(InMemory(CFG, params), tmp_path / "base", Conversion(to="huggingface"))
    metadata = {
        "model": CFG.to_dict(),
        "lora": record.to_dict(),
        "init_from": base_record(open_weights(tmp_path / "base"), "base", None, lambda n: None),
    }
    with CheckpointStore(tmp_path / "tuned", keep_last=1, keep_every=0) as store:
        store.save(3, {"params": adapter}, metadata=metadata, files={}, wait=True)
    write_peft(open_weights(tmp_path / "tuned"), tmp_path / "peft")

    base = GPTJForCausalLM.from_pretrained(tmp_path / "base").eval()
    before = run(base)
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    loaded = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert len(loaded) == 2 * sum(1 if path == "head/w" else SIZES.n_layers for path in targets)
    expected = run(theirs)
    merged = mt.load(tmp_path / "tuned", dtype="float32").logits(IDS)
    whole = adapt(params, adapter, record.scale)
    adapted = np.asarray(forward(whole, jnp.asarray(IDS, jnp.int32), CFG, ComputePolicy(dtype="float32")))
    top = np.abs(expected).max()
    assert np.abs(expected - before).max() > 0.05 * top
    for ours in (merged, adapted):
        assert np.abs(ours - expected).max() <= 1e-5 * top
    # What peft merges by itself is what is exported as a whole model.
    assert np.abs(run(theirs.merge_and_unload()) - merged).max() <= 1e-5 * top
