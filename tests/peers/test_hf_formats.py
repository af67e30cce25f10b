"""The original's checkpoints through Hugging Face's formats, and the formats that only other programs write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mesh_transformer as mt
from golden import gptj
from legacy.generator import Arch, write_model_directory
from mesh_transformer.api import conversion, tokenizer_of
from mesh_transformer.checkpoint.convert import convert
from mesh_transformer.checkpoint.digest import digest
from mesh_transformer.checkpoint.logical import logical_piece
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.names import hf_table
from mesh_transformer.checkpoint.weights import Piece

# Deprecations inside torch and transformers are theirs to mend.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

ARCH = Arch(layers=3, n_vocab=320, seq=48)
IDS = np.random.default_rng(5).integers(0, ARCH.n_vocab, (3, ARCH.seq))
# The most by which rounding to nearest changes a value, relative to it: 8 and 11 significant bits.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full, on eight shards, each with its own part of the summed biases and its own untrained layernorm."""
    path = tmp_path_factory.mktemp("v1")
    write_model_directory(path, ARCH, 8, [1201], config=True, style="unequal")
    return path


@pytest.fixture(scope="module")
def logits(original: Path) -> np.ndarray:
    """Ours, from the shards."""
    return mt.load(original).logits(IDS)


def export(original: Path, target: Path, dtype: str = "float32") -> Path:
    weights = open_weights(original)
    convert(weights, target, conversion("huggingface", tokenizer_of(weights), dtype=dtype))
    return target


@pytest.fixture(scope="module")
def exported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(original, tmp_path_factory.mktemp("hf") / "model")


def open_theirs(path: Path, **options: Any) -> Any:
    from transformers import GPTJForCausalLM

    model, told = GPTJForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert {name: list(found) for name, found in told.items() if found} == {}, "every tensor is there, and none other"
    return model.eval()


def run(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.float().numpy()


def test_eight_shards_compute_in_transformers_what_they_compute_here(exported: Path, logits: np.ndarray) -> None:
    gptj.check_logits(logits, run(open_theirs(exported)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_export_has_every_weight_rounded_once(
    original: Path, logits: np.ndarray, tmp_path: Path, dtype: str
) -> None:
    """Each tensor in PyTorch has the bits of ours, cast; the embedding is summed with its bias before it is rounded.

    The logits are those of rounded weights: independent relative errors of at most r = 2^-8 or 2^-11 in each of the
    weights make an error of r relative to a matrix' output at most. In series are the embedding, two matrices in each
    branch of each block (those of the branches add up, they do not follow one another) and the head; errors that know
    nothing of one another add up in squares. Hence the root mean square of the logits' error is at most
    r * sqrt(2 * n_layers + 2) of the logits' own, with room: the mean error of rounding is less than half of r, while
    the softmax may double it.
    """
    import torch

    model = open_theirs(export(original, tmp_path / "hf", dtype), dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    weights = open_weights(original)
    state = model.state_dict()
    for name, tensor in hf_table(weights.cfg).items():
        own = tensor.to_stored(logical_piece(weights, Piece(tensor.path, tensor.layer)), weights.cfg)
        expected = np.ascontiguousarray(own.astype(jnp.dtype(dtype))).view(np.int16)
        np.testing.assert_array_equal(state[name].view(torch.int16).numpy(), expected, err_msg=name)
    found = run(model.float())
    error = math.sqrt(np.mean((found - logits) ** 2)) / logits.std()
    bound = ROUNDING[dtype] * math.sqrt(2 * ARCH.layers + 2)
    assert bound / 20 < error < bound


@pytest.mark.parametrize("shard_size", ["50GB", "100KB"], ids=["single", "shards"])
def test_what_transformers_saves_of_it_is_the_original(
    exported: Path, original: Path, logits: np.ndarray, tmp_path: Path, shard_size: str
) -> None:
    open_theirs(exported).save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shard_size == "100KB")
    check_is_the_original(tmp_path / "theirs", original, logits)


def check_is_the_original(path: Path, original: Path, logits: np.ndarray) -> None:
    found, expected = mt.load(path), mt.load(original)
    assert digest(found.config, found.params) == digest(expected.config, expected.params)
    np.testing.assert_allclose(found.logits(IDS), logits, rtol=0, atol=1e-5)  # where the bias is folded in differs
    assert not np.asarray(found.params["embed"]["bias"]).any()


def with_old_constants(state: dict[str, Any], n_ctx: int, dtype: Any) -> dict[str, Any]:
    """As exports of 2021 were: the causal mask and its fill value are buffers of every layer."""
    import torch

    out: dict[str, Any] = {}
    for name, tensor in state.items():
        if name.endswith(".attn.k_proj.weight"):
            prefix = name.removesuffix("k_proj.weight")
            out[prefix + "bias"] = torch.tril(torch.ones((n_ctx, n_ctx), dtype=torch.uint8)).view(1, 1, n_ctx, n_ctx)
            out[prefix + "masked_bias"] = torch.tensor(-1e9).to(dtype)
        out[name] = tensor
    return out


def save_bin(path: Path, state: dict[str, Any], *, n_files: int, zip_form: bool) -> None:
    """pytorch_model.bin, or the files of an index."""
    import torch

    if n_files == 1:
        torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=zip_form)
        return
    weight_map = {}
    for i in range(n_files):
        name = f"pytorch_model-{i + 1:05d}-of-{n_files:05d}.bin"
        part = dict(list(state.items())[i::n_files])
        torch.save(part, path / name, _use_new_zipfile_serialization=zip_form)
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("zip_form", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("n_files", [1, 3])
def test_bin_files_of_float32(
    exported: Path, original: Path, logits: np.ndarray, tmp_path: Path, n_files: int, zip_form: bool
) -> None:
    model = open_theirs(exported)
    model.config.save_pretrained(tmp_path)
    save_bin(tmp_path, model.state_dict(), n_files=n_files, zip_form=zip_form)
    check_is_the_original(tmp_path, original, logits)


@pytest.mark.parametrize("n_files", [1, 3])
def test_bin_files_of_float16_with_constants_as_the_release_had_them(
    original: Path, tmp_path: Path, n_files: int
) -> None:
    """Opened here, and made into the original's shards again, they are what a float16 export is."""
    import torch

    half = export(original, tmp_path / "half", "float16")
    model = open_theirs(half, dtype="auto")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    model.config.save_pretrained(theirs)
    state = with_old_constants(model.state_dict(), ARCH.seq, torch.float16)
    assert state["transformer.h.1.attn.masked_bias"].isneginf()
    save_bin(theirs, state, n_files=n_files, zip_form=False)
    found, expected = mt.load(theirs), mt.load(half)
    assert digest(found.config, found.params) == digest(expected.config, expected.params)
    assert {str(leaf.dtype) for leaf in (found.params["embed"]["tokens"], found.params["head"]["b"])} == {"float16"}
    gptj.check_logits(found.logits(IDS), run(model.float()))
    weights = open_weights(theirs)
    facts = convert(weights, tmp_path / "v1", conversion("legacy", None, shards=4))
    assert facts["changed"] == [] and facts["target"]["digest"] == digest(expected.config, expected.params)


def test_the_tokenizer_of_gpt_2_comes_along(tmp_path: Path) -> None:
    """The original's shards hold none; a vocabulary of GPT-2's size and padding means GPT-2's."""
    from transformers import AutoTokenizer

    arch = Arch(layers=1, d_model=16, n_vocab=50400, seq=16, pe_rotary_dims=2)
    write_model_directory(tmp_path / "v1", arch, 8, [1], config=True, variant="slim")
    export(tmp_path / "v1", tmp_path / "hf", "bfloat16")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    own = tokenizer_of(open_weights(tmp_path / "hf"))
    assert own is not None and own.name == "gpt2" and own.n_vocab == 50257
    for text in (
        "The quick brown fox: été, 12 dogs.\n\n  lazy\t",
        "def f(x):\n    return x ** 2  # 東京 🙂",
        " leading space, don't we'll I'M",
    ):
        ids = theirs(text)["input_ids"]
        assert ids == own.encode(text) and theirs.decode(ids) == text
    assert theirs.eos_token_id == own.end_of_text == 50256
    assert theirs("<|endoftext|>")["input_ids"] == [50256]
    model = open_theirs(tmp_path / "hf")
    assert (model.config.eos_token_id, model.config.bos_token_id) == (50256, 50256)
