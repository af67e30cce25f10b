from __future__ import annotations

import hashlib
import itertools
import struct

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mesh_transformer.checkpoint import logical
from mesh_transformer.checkpoint.digest import digest
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import abstract_params

CFG = ModelConfig(n_layers=12, d_model=8, n_heads=2, d_head=6, d_ff=10, n_vocab=14, n_ctx=16, d_rotary=4)


def random_params(cfg: ModelConfig, dtype: object = np.float32) -> dict:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: np.asarray(rng.normal(size=a.shape)).astype(dtype), abstract_params(cfg))


def by_the_letter(tensors: dict[str, np.ndarray]) -> str:
    """The definition, one value at a time."""
    text = b""
    for name in sorted(tensors, key=str.encode):
        array = np.asarray(tensors[name], np.float32)
        text += name.encode() + b"\x00" + ",".join(str(n) for n in array.shape).encode() + b"\x00"
        for value in itertools.chain(array.flat):
            text += struct.pack("<f", float(value))
    return hashlib.sha256(text).hexdigest()


def test_gpt_j_by_the_letter() -> None:
    params = random_params(CFG)
    tensors = {"transformer.wte.weight": (params["embed"]["tokens"].astype(float) + params["embed"]["bias"])}
    for i in range(12):
        prefix, attn, mlp = f"transformer.h.{i}.", params["layers"]["attn"], params["layers"]["mlp"]
        for name in ("q", "k", "v"):
            tensors[f"{prefix}attn.{name}_proj.weight"] = attn[name][i].reshape(8, 12)
        tensors[f"{prefix}attn.out_proj.weight"] = attn["o"][i].reshape(12, 8)
        tensors[f"{prefix}mlp.fc_in.weight"] = mlp["w_in"][i]
        tensors[f"{prefix}mlp.fc_in.bias"] = mlp["b_in"][i]
        tensors[f"{prefix}mlp.fc_out.weight"] = mlp["w_out"][i]
        tensors[f"{prefix}mlp.fc_out.bias"] = mlp["b_out"][i]
        tensors[f"{prefix}ln_1.weight"] = params["layers"]["ln_1"]["scale"][i]
        tensors[f"{prefix}ln_1.bias"] = params["layers"]["ln_1"]["bias"][i]
    tensors["transformer.ln_f.weight"] = params["head"]["ln"]["scale"]
    tensors["transformer.ln_f.bias"] = params["head"]["ln"]["bias"]
    tensors["lm_head.weight"] = params["head"]["w"]
    tensors["lm_head.bias"] = params["head"]["b"]
    assert digest(CFG, params) == by_the_letter(tensors)


@pytest.mark.parametrize("change", [{"norm": "scalenorm"}, {"norm": "rmsnorm-bias", "position": "t5"}])
def test_other_architectures_by_the_letter(change: dict[str, str]) -> None:
    cfg = ModelConfig(n_layers=11, d_model=8, n_heads=2, n_vocab=14, n_ctx=16, **change)
    params = random_params(cfg)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    expected = by_the_letter({"/".join(key.key for key in path): leaf for path, leaf in flat})
    assert digest(cfg, params) == expected


def test_stored_dtype_sharding_and_chunks_have_no_part_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    half = random_params(CFG, jax.numpy.bfloat16)
    full = jax.tree.map(lambda a: a.astype(np.float32), half)
    expected = digest(CFG, full)
    assert digest(CFG, half) == expected
    n = 2 if len(jax.devices()) >= 2 else 1
    mesh = jax.make_mesh((n,), ("tensor",), devices=jax.devices()[:n])
    cut, whole = NamedSharding(mesh, PartitionSpec("tensor")), NamedSharding(mesh, PartitionSpec())
    assert digest(CFG, jax.tree.map(lambda a: jax.device_put(a, cut), half)) == expected
    assert digest(CFG, jax.tree.map(lambda a: jax.device_put(a, whole), full)) == expected
    monkeypatch.setattr(logical, "_CHUNK", 7)
    assert digest(CFG, half) == expected


def test_every_parameter_has_a_part_in_it() -> None:
    params = random_params(CFG)
    seen = {digest(CFG, params)}
    leaves, structure = jax.tree.flatten(params)
    for i in range(len(leaves)):
        changed = [leaf.copy() for leaf in leaves]
        changed[i].flat[-1] += 1
        seen.add(digest(CFG, jax.tree.unflatten(structure, changed)))
    assert len(seen) == len(leaves) + 1
