from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from checkpoint.hf_cases import hf_tensors
from mesh_transformer.checkpoint import names
from mesh_transformer.checkpoint.weights import leaf_at
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import CHOICES, ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.model.params import abstract_params, count_params, named_specs, shape

# More than ten layers: "10" sorts before "2". Every width differs, so that no transposition can go unseen.
CFG = ModelConfig(n_layers=12, d_model=24, n_heads=4, d_head=6, d_ff=40, n_vocab=56, n_ctx=16, d_rotary=4)


def random_params(cfg: ModelConfig, dtype: object = np.float32) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(dtype), abstract_params(cfg))


def test_the_map_names_every_parameter_of_the_table_once() -> None:
    table = names.hf_table(CFG)
    assert {tensor.path for tensor in table.values()} | {"embed/bias"} == set(named_specs(CFG))
    assert len(table) == 6 - 1 + 10 * 12
    # Nothing is lost or counted twice: only the embedding bias is without a tensor of its own.
    values = sum(np.prod(tensor.matrix_shape(CFG)) for tensor in table.values())
    assert values == count_params(CFG) - CFG.d_model


def test_hugging_face_layout_written_out() -> None:
    params = random_params(CFG)
    tensors = hf_tensors(CFG, params)
    layers = params["layers"]
    expected = {
        "transformer.h.10.attn.q_proj.weight": layers["attn"]["q"][10].reshape(24, 24).T,
        "transformer.h.2.attn.k_proj.weight": layers["attn"]["k"][2].reshape(24, 24).T,
        "transformer.h.2.attn.v_proj.weight": layers["attn"]["v"][2].reshape(24, 24).T,
        "transformer.h.11.attn.out_proj.weight": layers["attn"]["o"][11].reshape(24, 24).T,
        "transformer.h.0.mlp.fc_in.weight": layers["mlp"]["w_in"][0].T,
        "transformer.h.0.mlp.fc_in.bias": layers["mlp"]["b_in"][0],
        "transformer.h.0.mlp.fc_out.weight": layers["mlp"]["w_out"][0].T,
        "transformer.h.0.mlp.fc_out.bias": layers["mlp"]["b_out"][0],
        "transformer.h.5.ln_1.weight": layers["ln_1"]["scale"][5],
        "transformer.h.5.ln_1.bias": layers["ln_1"]["bias"][5],
        "transformer.ln_f.weight": params["head"]["ln"]["scale"],
        "transformer.ln_f.bias": params["head"]["ln"]["bias"],
        "lm_head.weight": params["head"]["w"].T,
        "lm_head.bias": params["head"]["b"],
        "transformer.wte.weight": (
            params["embed"]["tokens"].astype(np.float64) + params["embed"]["bias"].astype(np.float64)
        ).astype(np.float32),
    }
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)
        assert tensors[name].flags.c_contiguous
    assert tensors["transformer.h.0.mlp.fc_in.weight"].shape == (40, 24)
    assert tensors["transformer.wte.weight"].dtype == np.float32


def test_the_embedding_is_rounded_once() -> None:
    cfg = ModelConfig(n_layers=1, d_model=4, n_heads=2, n_vocab=3, n_ctx=8)
    params = random_params(cfg, jax.numpy.bfloat16)
    # float32 would lose the 2**-30 that decides the rounding; bfloat16 would lose the bias altogether.
    params["embed"]["tokens"][:] = 1.0
    params["embed"]["bias"][:] = [2**-24, 2**-24 + 2**-30, 0.0, -(2**-25)]
    wte = hf_tensors(cfg, params)["transformer.wte.weight"]
    np.testing.assert_array_equal(wte[1], np.array([1, 1 + 2**-23, 1, 1], np.float32))


def test_a_tensor_finds_back_to_its_own_axes() -> None:
    params = random_params(CFG)
    for name, tensor in names.hf_table(CFG).items():
        own = leaf_at(params, tensor.path) if tensor.layer is None else leaf_at(params, tensor.path)[tensor.layer]
        stored = tensor.to_stored(own, CFG)
        assert stored.shape == tensor.stored_shape(CFG), name
        for n_parts in (1, 3):
            parts = np.array_split(stored, n_parts)
            np.testing.assert_array_equal(tensor.to_own(parts, stored.dtype, CFG), own, err_msg=name)


def test_sharded_arrays_give_the_same_tensors_under_any_mesh() -> None:
    params = random_params(CFG)
    expected = hf_tensors(CFG, params)
    n = 4 if len(jax.devices()) >= 4 else 1
    mesh = jax.make_mesh((n,), ("tensor",), devices=jax.devices()[:n])
    for axis in range(3):

        def place(array: np.ndarray, axis: int = axis) -> jax.Array:
            cut = (
                PartitionSpec(*(None,) * axis, "tensor")
                if axis < array.ndim and array.shape[axis] % n == 0
                else PartitionSpec()
            )
            return jax.device_put(array, NamedSharding(mesh, cut))

        with jax.set_mesh(mesh):
            for name, tensor in hf_tensors(CFG, jax.tree.map(place, params)).items():
                np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


@pytest.mark.parametrize("change", [{"norm": "rmsnorm"}, {"position": "t5"}, {"norm": "layernorm-nobias"}])
def test_other_architectures_have_no_hugging_face_form(change: dict[str, str]) -> None:
    cfg = ModelConfig(n_layers=1, d_model=8, n_heads=2, n_vocab=8, n_ctx=8, **change)
    with pytest.raises(ConfigError, match="Hugging Face's GPT-J has only"):
        names.hf_table(cfg)


def test_legacy_table_covers_every_architecture() -> None:
    for norm, position in itertools.product(set(CHOICES["norm"]) - {"rms"}, CHOICES["position"]):
        cfg = ModelConfig(n_layers=2, d_model=16, n_heads=4, n_vocab=32, n_ctx=8, norm=norm, position=position)
        unread = {"layers/ln_1/bias", "head/ln/bias"} if norm == "layernorm-nobias" else set()
        assert set(names.legacy_table(cfg)) == set(named_specs(cfg)) | unread


def test_legacy_axes_are_the_ones_that_shards_cut() -> None:
    """The concatenated axis is the one made of the vocabulary, the heads or the feed-forward width."""
    cfg = ModelConfig(n_layers=2, d_model=16, n_heads=4, n_vocab=32, n_ctx=8)
    for path, entry in names.legacy_table(cfg).items():
        spec = named_specs(cfg)[path]
        axes = [axis for axis in spec.axes if axis not in ("layers", "head_dim")]
        cut = [axis for axis in axes if axis in ("vocab", "heads", "kv_heads", "mlp")]
        assert bool(cut) == (entry.combine == "concat"), path
        if cut:
            assert axes[entry.axis] == cut[0], path


def test_counts_of_gpt_j_6b() -> None:
    cfg = preset("gpt-j-6b")
    assert count_params(cfg) == 6_050_886_880
    assert sum(int(np.prod(tensor.matrix_shape(cfg))) for tensor in names.hf_table(cfg).values()) == 6_050_882_784
    assert names.count_in_shards(cfg, 8) == 6_053_381_344
    assert names.count_in_shards(cfg, 1) == count_params(cfg)
    with pytest.raises(ConfigError, match=r"7 shards do not divide model\.n_heads = 16"):
        names.count_in_shards(cfg, 7)


def test_a_bias_that_the_original_stores_unread_is_counted() -> None:
    cfg = ModelConfig(n_layers=3, d_model=16, n_heads=4, n_vocab=32, n_ctx=8, norm="layernorm-nobias")
    with_bias = ModelConfig(n_layers=3, d_model=16, n_heads=4, n_vocab=32, n_ctx=8)
    assert names.count_in_shards(cfg, 2) == names.count_in_shards(with_bias, 2)
    assert shape(named_specs(cfg)["head/ln/scale"], cfg) == (16,)
