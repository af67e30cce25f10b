"""Hugging Face directories by themselves: what is written is read back, and what cannot be read is named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint import hf_cases
from mesh_transformer.checkpoint.digest import digest
from mesh_transformer.checkpoint.huggingface import looks_huggingface
from mesh_transformer.checkpoint.huggingface.config import tokenizer_document
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.model.params import abstract_params

# Eleven layers: "10" sorts before "2". No two widths are equal, but for n_heads * d_head = d_model.
CFG = ModelConfig(n_layers=11, d_model=24, n_heads=4, d_ff=40, n_vocab=56, n_ctx=16, d_rotary=4, norm_eps=1e-6)
TOKENIZER = {"tokenizer.json": b'{"a": 1}'}


def random_params(dtype: Any = np.float32, embedding_bias: bool = False, cfg: ModelConfig = CFG) -> dict:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(dtype), abstract_params(cfg))
    if not embedding_bias:
        params["embed"]["bias"][:] = 0
    return params


def write(path: Path, params: dict | None = None, cfg: ModelConfig = CFG, **options: Any) -> Path:
    hf_cases.write(path, cfg, random_params() if params is None else params, TOKENIZER, 55, **options)
    return path


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write(tmp_path / "model", max_shard_bytes=20_000)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_round_trip(tmp_path: Path, dtype: Any, max_shard_bytes: int) -> None:
    dtype = jnp.dtype(dtype).type
    params = random_params(dtype)
    cfg, back, tokenizer = hf_cases.read(write(tmp_path / "model", params, max_shard_bytes=max_shard_bytes))
    assert cfg == CFG
    assert tokenizer == TOKENIZER["tokenizer.json"]
    assert jax.tree.structure(back) == jax.tree.structure(params)

    def same(a: np.ndarray, b: np.ndarray) -> None:
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

    jax.tree.map(same, back, params)
    assert digest(cfg, back) == digest(CFG, params)


def test_an_embedding_bias_is_folded_in(tmp_path: Path) -> None:
    params = random_params(embedding_bias=True)
    cfg, back, _ = hf_cases.read(write(tmp_path / "model", params))
    assert np.abs(params["embed"]["bias"]).min() > 0 and not back["embed"]["bias"].any()
    exact = params["embed"]["tokens"].astype(np.float64) + params["embed"]["bias"].astype(np.float64)
    np.testing.assert_array_equal(back["embed"]["tokens"], exact.astype(np.float32))
    assert digest(cfg, back) == digest(CFG, params)


def test_a_folded_half_precision_embedding_is_rounded_once(tmp_path: Path) -> None:
    params = random_params(jnp.dtype(jnp.bfloat16).type, embedding_bias=True)
    _, back, _ = hf_cases.read(write(tmp_path / "model", params))
    exact = params["embed"]["tokens"].astype(np.float64) + params["embed"]["bias"].astype(np.float64)
    np.testing.assert_array_equal(back["embed"]["tokens"], exact.astype(np.float32).astype(jnp.bfloat16))


def test_mixed_dtypes_become_that_of_the_matrices(tmp_path: Path) -> None:
    params = random_params(jnp.dtype(jnp.bfloat16).type)
    finer = params["head"]["ln"]["scale"] = params["head"]["ln"]["scale"].astype(np.float32) + np.float32(1e-6)
    _, back, _ = hf_cases.read(write(tmp_path / "model", params))
    np.testing.assert_array_equal(back["head"]["ln"]["scale"], finer.astype(jnp.bfloat16))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_layers_of_different_dtypes_lose_nothing(written: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = written / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.h.{}.mlp.fc_in.bias"
    first = tensors[name.format(0)] = tensors[name.format(0)].astype(jnp.bfloat16)
    save_file(tensors, file)
    found = hf_cases.read(written)[1]["layers"]["mlp"]["b_in"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], first.astype(np.float32))
    np.testing.assert_array_equal(found[1], tensors[name.format(1)])


def test_jax_arrays_are_written_as_numpy_ones_are(tmp_path: Path) -> None:
    params = random_params()
    write(tmp_path / "numpy", params)
    write(tmp_path / "jax", jax.tree.map(jnp.asarray, params))
    file = "model.safetensors"
    assert (tmp_path / "numpy" / file).read_bytes() == (tmp_path / "jax" / file).read_bytes()


def test_config_json(tmp_path: Path) -> None:
    path = write(tmp_path / "model", random_params(jnp.dtype(jnp.bfloat16).type))
    assert json.loads((path / "config.json").read_text()) == {
        "model_type": "gptj",
        "architectures": ["GPTJForCausalLM"],
        "n_layer": 11,
        "n_embd": 24,
        "n_head": 4,
        "n_inner": 40,
        "n_positions": 16,
        "vocab_size": 56,
        "rotary_dim": 4,
        "layer_norm_epsilon": 1e-6,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 55,
        "eos_token_id": 55,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert names(path) == files


def test_the_usual_config(tmp_path: Path) -> None:
    cfg = ModelConfig(n_layers=1, d_model=8, n_heads=2, n_vocab=50400, n_ctx=8)
    hf_cases.write(tmp_path / "model", cfg, random_params(cfg=cfg), {}, 50256)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["tokenizer_class"], config["n_inner"], config["eos_token_id"]) == ("GPT2Tokenizer", None, 50256)
    assert hf_cases.read(tmp_path / "model")[0] == cfg
    assert hf_cases.read(tmp_path / "model")[2] is None


def test_shards_and_their_index(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2 and names(sharded) == sorted(
        ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"]
        + ["tokenizer_config.json"]
        + [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    )
    sizes = {}
    for file in files:
        header = header_of(file)
        assert header.pop("__metadata__") == {"format": "pt"}  # without it transformers refuses the file
        assert {name: index["weight_map"].pop(name) for name in header} == dict.fromkeys(header, file.name)
        sizes[file.name] = max(entry["data_offsets"][1] for entry in header.values())
    assert not index["weight_map"]
    assert max(sizes.values()) <= 20_000
    assert (
        index["metadata"]["total_size"]
        == sum(sizes.values())
        == 4 * sum(leaf.size for leaf in jax.tree.leaves(random_params())) - 4 * 24
    )  # the embedding bias is folded in


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def test_a_target_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "directory").mkdir()
    for name in ("file", "directory"):
        with pytest.raises(FileExistsError, match=name):
            write(tmp_path / name)
    assert names(tmp_path) == ["directory", "file"] and not names(tmp_path / "directory")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_head": 8}, r"model\.n_heads \* model\.d_head = 32 is not model\.d_model = 24"),
        ({"norm": "rmsnorm"}, "model.norm = 'rmsnorm'"),
        ({"position": "t5"}, "model.position = 't5'"),
    ],
)
def test_what_hugging_face_has_not_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    cfg = ModelConfig(**{"n_layers": 1, "d_model": 24, "n_heads": 4, "n_vocab": 8, "n_ctx": 8, **change})
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / "model", random_params(cfg=cfg), cfg)
    assert not names(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "model")
    assert not names(tmp_path)


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "model_type is 'bloom'; expected one of: 'gptj'"),
        ({"model_type": "gpt2"}, "rotary_dim = 4 is not known for this model_type"),
        ({"activation_function": "relu"}, "activation_function is 'relu'; only 'gelu_new'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; only False"),
        ({"n_layer": "11"}, 'model.n_layers = "11" is of type string.*n_layers is n_layer here'),
        ({"n_layer": None}, "lacks n_layer"),
        ({"n_embd": 25}, r"model\.d_model = 25.*model\.d_model is n_embd here"),
        ({"rotary_dim": 7}, "model.d_rotary = 7 must be even .*model.d_rotary is rotary_dim here"),
        ({"rotary_dim": None}, "model.d_rotary = null"),
        ({"rotary_dim": 0}, "rotary_dim is 0"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"layer_norm_epsilon": 0}, "model.norm_eps = 0.*layer_norm_epsilon here"),
    ],
)
def test_a_configuration_that_is_not_ours(written: Path, change: dict[str, Any], message: str) -> None:
    edit_config(written, lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=message) as raised:
        hf_cases.read(written)
    assert str(raised.value).startswith(f"{written / 'config.json'}: ")
    assert len(str(raised.value).splitlines()) == 1


def edit_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def test_keys_that_are_left_out(written: Path) -> None:
    edit_config(written, lambda config: [config.pop("n_layer"), config.pop("vocab_size")])
    with pytest.raises(CheckpointError, match=r"config\.json: lacks n_layer, vocab_size$"):
        hf_cases.read(written)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    cfg = ModelConfig(n_layers=1, d_model=256, n_heads=2, n_vocab=8, n_ctx=8, d_rotary=64)
    write(tmp_path / "model", random_params(cfg=cfg), cfg)
    left_out = ("rotary_dim", "layer_norm_epsilon", "n_inner", "activation_function", "tie_word_embeddings")
    edit_config(tmp_path / "model", lambda config: [config.pop(key) for key in left_out])
    assert hf_cases.read(tmp_path / "model")[0] == cfg


def test_what_looks_like_hugging_face(written: Path, tmp_path: Path) -> None:
    assert looks_huggingface(written)
    assert not looks_huggingface(tmp_path) and not looks_huggingface(tmp_path / "nowhere")
    for text in ("{", "7", "[]", '{"layers": 28}', "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        assert not looks_huggingface(tmp_path)


def test_no_weights(written: Path) -> None:
    (written / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json, nor pytorch_model",
    ):
        hf_cases.read(written)


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard}: missing, though model.safetensors.index.json names it"):
        hf_cases.read(sharded)


def test_a_missing_tensor(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["transformer.h.10.ln_1.bias"], content["weight_map"]["lm_head.bias"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"lacks the tensor \S+ \(2 missing in all\)"):
        hf_cases.read(sharded)


def test_fewer_layers_than_configured(written: Path) -> None:
    edit_config(written, lambda config: config.update(n_layer=12))
    with pytest.raises(CheckpointError, match=r"lacks the tensor transformer\.h\.11\.\S+ \(10 missing in all\)"):
        hf_cases.read(written)


def test_another_shape_than_configured(written: Path) -> None:
    edit_config(written, lambda config: config.update(vocab_size=57))
    with pytest.raises(
        CheckpointError, match=r"transformer\.wte\.weight: shape \(56, 24\).* makes it \(57, 24\)"
    ) as at:
        hf_cases.read(written)
    assert str(at.value).count(str(written)) == 1


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_named(written: Path, keep: float) -> None:
    file = written / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=f"{file}: not a whole safetensors file") as raised:
        hf_cases.read(written)
    assert len(str(raised.value).splitlines()) == 1 and str(raised.value).count(str(written)) == 1


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=str(shard)) as raised:
        hf_cases.read(sharded)
    assert str(raised.value).count(str(sharded)) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"lm_head.bias": 3}}'])
def test_a_damaged_index(sharded: Path, content: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(CheckpointError, match=f'{index}: not JSON with a "weight_map"'):
        hf_cases.read(sharded)


def test_tensors_that_are_not_parameters_are_left_alone(written: Path) -> None:
    """Old exports hold masks that are constants."""
    from safetensors.numpy import load_file, save_file

    file = written / "model.safetensors"
    tensors = load_file(file) | {
        "transformer.h.0.attn.bias": np.tri(16, dtype=bool)[None, None],
        "transformer.h.0.attn.masked_bias": np.array(-1e9, np.float32),
    }
    save_file(tensors, file)
    cfg, back, _ = hf_cases.read(written)
    assert digest(cfg, back) == digest(CFG, random_params())


def test_a_tensor_that_gpt_j_does_not_have_is_named(written: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = written / "model.safetensors"
    save_file(load_file(file) | {"transformer.h.0.attn.q_proj.lora_A": np.zeros(3, np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"holds the tensor transformer\.h\.0\.attn\.q_proj\.lora_A"):
        hf_cases.read(written)


def test_a_dtype_that_no_parameter_has(written: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = written / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.bias": tensors["lm_head.bias"].astype(np.float64)}, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.bias: dtype F64; expected float32, bfloat16 or float16"):
        hf_cases.read(written)


def test_an_index_that_points_elsewhere(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.bias"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"names the file '\.\./model\.safetensors'"):
        hf_cases.read(sharded)
    files = sorted(sharded.glob("model-*.safetensors"))
    content["weight_map"]["lm_head.bias"] = next(f.name for f in files if "lm_head.bias" not in header_of(f))
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.bias, though model\.safetensors\.index"):
        hf_cases.read(sharded)


def test_the_tokenizer_knows_how_a_text_begins_and_ends() -> None:
    gpt2 = load_tokenizer("gpt2")
    document = tokenizer_document(gpt2.to_bytes(), gpt2.end_of_text)
    assert document["tokenizer_class"] == "GPT2Tokenizer"
    assert {document[name] for name in ("bos_token", "eos_token", "unk_token")} == {"<|endoftext|>"}
    assert tokenizer_document(b"{}", None)["eos_token"] is None
