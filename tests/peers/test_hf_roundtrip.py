"""Directories in Hugging Face's form, between this project and transformers, both ways and through both programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mesh_transformer as mt
from checkpoint import hf_cases
from golden import gptj
from mesh_transformer.checkpoint.digest import digest
from mesh_transformer.data.tokenizer import train_bpe

# Deprecations inside torch and transformers are theirs to mend.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

SIZES = gptj.Sizes(n_layers=4, d_model=96, n_heads=6, d_rotary=8, n_vocab=320, n_ctx=64)
SEED = 31
IDS = gptj.tokens(SIZES, SEED, batch=3, length=SIZES.n_ctx)


@pytest.fixture(scope="module")
def ours() -> mt.Model:
    """Large weights, no bias zero, the embedding bias neither."""
    params = gptj.our_params(gptj.weights(SIZES, SEED), SIZES, SEED)
    assert float(jnp.abs(params["embed"]["bias"]).min()) > 0
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog. " * 50], SIZES.n_vocab)
    return mt.Model(gptj.config(SIZES), params, tokenizer)


@pytest.fixture(scope="module")
def saved(ours: mt.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    ours.save(path, format="huggingface")
    return path


@pytest.fixture(scope="module")
def theirs(saved: Path) -> Any:
    return open_theirs(saved)


def open_theirs(path: Path, **options: Any) -> Any:
    from transformers import GPTJForCausalLM

    model, told = GPTJForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert {name: list(found) for name, found in told.items() if found} == {}, "every tensor is there, and none other"
    return model.eval()


def run(model: Any, ids: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and hidden states."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(np.asarray(ids, np.int64)), output_hidden_states=True)
    return out.logits.float().numpy(), [hidden.float().numpy() for hidden in out.hidden_states]


def test_what_we_save_transformers_opens_with_equal_logits(ours: mt.Model, theirs: Any) -> None:
    logits, _ = run(theirs, IDS)
    gptj.check_logits(ours.logits(IDS), logits)


def test_hidden_states_are_the_features_of_every_layer(ours: mt.Model, theirs: Any) -> None:
    _, hidden = run(theirs, IDS)
    assert len(hidden) == SIZES.n_layers + 1
    for layer, expected in enumerate(hidden):
        assert expected.std() > 0.05
        np.testing.assert_allclose(ours.features(IDS, layer), expected, rtol=0, atol=1e-4, err_msg=f"layer {layer}")
    np.testing.assert_allclose(ours.features(IDS), hidden[-1], rtol=0, atol=1e-4)


def test_greedy_generation(ours: mt.Model, theirs: Any) -> None:
    import torch

    n_new = 40
    prompts = IDS[:, :20]
    with torch.no_grad():
        expected = theirs.generate(
            torch.from_numpy(prompts.astype(np.int64)),
            attention_mask=torch.ones(prompts.shape, dtype=torch.int64),
            max_new_tokens=n_new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, 20:].tolist()
    found = ours.generate(prompts.tolist(), max_tokens=n_new, temperature=0.0, ignore_eos=True)
    assert [completion.tokens for completion in found] == expected
    assert len(set(expected[0])) > 5


def test_generation_stops_where_theirs_does(ours: mt.Model, theirs: Any) -> None:
    """config.json and generation_config.json name our end-of-text."""
    assert ours.tokenizer is not None
    end = ours.tokenizer.end_of_text
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == end


def test_what_transformers_saves_we_open_with_equal_logits(theirs: Any, ours: mt.Model, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    opened = mt.load(tmp_path / "theirs")
    assert opened.config == ours.config
    assert digest(opened.config, opened.params) == digest(ours.config, ours.params)
    gptj.check_logits(opened.logits(IDS), run(theirs, IDS)[0])


def test_in_shards_both_ways(ours: mt.Model, theirs: Any, tmp_path: Path) -> None:
    hf_cases.write(tmp_path / "ours", ours.config, ours.params, {}, 0, max_shard_bytes=200_000)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    for name in ("ours", "theirs"):
        assert len(list((tmp_path / name).glob("model-*-of-*.safetensors"))) > 3
        np.testing.assert_array_equal(run(open_theirs(tmp_path / name), IDS)[0], run(theirs, IDS)[0])
        opened = mt.load(tmp_path / name)
        assert digest(opened.config, opened.params) == digest(ours.config, ours.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_both_ways(ours: mt.Model, tmp_path: Path, dtype: str) -> None:
    """The dtype in config.json is the one that transformers takes; weights are equal bit for bit."""
    import torch

    half = mt.Model(ours.config, jax.tree.map(lambda a: a.astype(dtype), ours.params), ours.tokenizer)
    half.save(tmp_path / "ours", format="huggingface")
    model = open_theirs(tmp_path / "ours", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    opened = mt.load(tmp_path / "ours")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(opened.params)} == {dtype}
    model.save_pretrained(tmp_path / "theirs")
    again = mt.load(tmp_path / "theirs")
    assert digest(again.config, again.params) == digest(opened.config, opened.params)
    # The same rounded weights, computed with in float32 on both sides.
    gptj.check_logits(opened.logits(IDS), run(model.float(), IDS)[0])


def test_a_feed_forward_of_another_width(tmp_path: Path) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        n_layer=3, n_embd=48, n_head=4, n_inner=80, n_positions=32, vocab_size=96, rotary_dim=12,
        layer_norm_epsilon=1e-3, bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    theirs = GPTJForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    opened = mt.load(tmp_path / "theirs")
    assert (opened.config.d_ff, opened.config.d_rotary, opened.config.norm_eps) == (80, 12, 1e-3)
    ids = IDS[:, :32] % 96
    logits, hidden = run(theirs, ids)
    gptj.check_logits(opened.logits(ids), logits)
    np.testing.assert_allclose(opened.features(ids, 2), hidden[2], rtol=0, atol=1e-4)
    opened.save(tmp_path / "ours", format="huggingface")
    np.testing.assert_array_equal(run(open_theirs(tmp_path / "ours"), ids)[0], logits)


def test_the_tokenizer_that_goes_with_it(ours: mt.Model, saved: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved)
    text = "The quick brown fox: été, 12 dogs.\n  lazy"
    assert tokenizer(text)["input_ids"] == ours.encode(text)
    assert tokenizer.decode(ours.encode(text)) == text
