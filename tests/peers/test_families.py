"""Every family and option against transformers: logits, gradients, greedy texts, tensors in and out, both spellings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, in_older_spelling, make, tokens
from safetensors.numpy import load_file, save_file

from mesh_transformer.checkpoint.huggingface import HuggingFaceWeights, read_config, write_huggingface
from mesh_transformer.checkpoint.huggingface.config import config_document
from mesh_transformer.checkpoint.names import hf_table
from mesh_transformer.checkpoint.weights import assemble, leaf_at
from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.engine.generator import Generator
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.loss import loss_report
from mesh_transformer.model.params import count_params
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sample.options import SamplingOptions

# Deprecations inside torch and transformers are theirs to mend.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-4
POLICY = ComputePolicy(dtype="float32")
FILE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Both:
    """The same model there and here, and the directory by which it came."""

    theirs: Any
    cfg: ModelConfig
    params: Any
    path: Path


# One model of each family is always compared; the others, with options of their own, in the long tests.
_EVERY_CASE = [pytest.param(name, marks=[pytest.mark.long] if "-" in name else []) for name in CASES]


@pytest.fixture(scope="module", params=_EVERY_CASE)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    path = tmp_path_factory.mktemp("family") / "model"
    theirs = make(CASES[request.param])
    theirs.save_pretrained(path)
    weights = HuggingFaceWeights(path)
    yield Both(theirs, weights.cfg, assemble(weights), path)


def logits_of(params: Any, ids: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, t: forward(p, t, cfg, POLICY))(params, ids))


def test_logits_and_gradients(both: Both) -> None:
    import torch

    ids = tokens(2, 40)
    given = torch.from_numpy(ids.astype(np.int64))
    both.theirs.zero_grad()
    out = both.theirs(input_ids=given, labels=given)
    out.loss.backward()
    expected = out.logits.detach().numpy()
    assert expected.std() >= 1
    np.testing.assert_allclose(logits_of(both.params, ids, both.cfg), expected, rtol=0, atol=TOLERANCE)

    loss, gradient = jax.jit(jax.value_and_grad(lambda p: loss_report(p, jnp.asarray(ids), both.cfg, POLICY).loss))(
        jax.tree.map(jnp.asarray, both.params)
    )
    assert float(loss) == pytest.approx(float(out.loss.detach()), abs=1e-5)
    theirs = {name: p.grad.numpy() for name, p in both.theirs.named_parameters()}
    if "embed_out.weight" in hf_table(both.cfg):  # what transformers calls the head itself, but not in files
        theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    assert theirs.keys() == hf_table(both.cfg).keys()
    for name, tensor in hf_table(both.cfg).items():
        own = [np.asarray(leaf_at(gradient, path)) for path in tensor.paths]
        own = own if tensor.layer is None else [leaf[tensor.layer] for leaf in own]
        scale = max(1.0, float(np.abs(theirs[name]).max()))
        np.testing.assert_allclose(
            tensor.to_stored(own, both.cfg), theirs[name], rtol=0, atol=TOLERANCE * scale, err_msg=name
        )


def test_greedy_texts_and_the_cache(both: Both) -> None:
    import torch

    prompts = tokens(2, 20)
    given = torch.from_numpy(prompts.astype(np.int64))
    made = both.theirs.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, use_cache=True, max_new_tokens=64, pad_token_id=0
    )[:, 20:].numpy()
    assert made.shape == (2, 64)
    generator = Generator(both.cfg, both.params, POLICY, None)
    done = generator.generate(prompts.tolist(), [SamplingOptions(max_tokens=64, temperature=0.0)] * 2)
    assert [c.tokens for c in done] == made.tolist()
    assert min(len(set(c.tokens)) for c in done) > 5
    # What was written through the cache is what the whole text read at once gives.
    whole = logits_of(both.params, np.concatenate([prompts, made], axis=1).astype(np.int32), both.cfg)
    np.testing.assert_array_equal(whole[:, 19:-1].argmax(axis=-1), made)


# Another value of each field in which families differ: none of them may pass unseen.
_OTHERS: dict[str, tuple[Any, ...]] = {
    "residual": ("parallel-two-norms", "serial"),
    "rotary_layout": ("interleaved", "half"),
    "feed_forward": ("gelu", "gelu_tanh"),
    "rope_theta": (700.0,),
    "rope_scaling": (None,),
    "window": (0,),
    "windowed_layers": ("all",),
    "scale_scores": (True, False),
    "norm_eps": (0.3,),
}


@pytest.mark.long
def test_every_option_shows(both: Both) -> None:
    ids, seen = tokens(1, 40), 0
    expected = logits_of(both.params, ids, both.cfg)
    for field, values in _OTHERS.items():
        now = getattr(both.cfg, field)
        is_rotary = field in ("rotary_layout", "rope_theta")
        if (field == "windowed_layers" and now == "all") or (is_rotary and both.cfg.position != "rotary"):
            continue
        if field in ("residual", "feed_forward") and now not in values:
            continue
        changed = [{field: value} for value in values if value != now]
        if field == "window" and both.cfg.windowed_layers == "odd":
            changed = [{"window": 0, "windowed_layers": "all"}]
        if field == "rope_scaling" and now is not None and now.kind == "dynamic":
            continue  # of no effect within the context that the configuration names
        for change in changed:
            other = dataclasses.replace(both.cfg, **change)
            assert np.abs(logits_of(both.params, ids, other) - expected).max() > 1e-3, change
            seen += 1
    own = both.params["layers"]["attn"]
    # b_k adds the same to all scores of a query, unless keys are turned after it.
    for name in [leaf for leaf in own if leaf in ("b_q", "b_v", "b_o", "q_norm", "k_norm")]:
        idle = np.zeros_like if name.startswith("b_") else np.ones_like
        attn = {**own, name: jax.tree.map(idle, own[name])}
        changed_params = both.params | {"layers": both.params["layers"] | {"attn": attn}}
        assert np.abs(logits_of(changed_params, ids, both.cfg) - expected).max() > 1e-3, name
        seen += 1
    assert seen >= 2


def test_the_directory_goes_out_as_it_came(both: Both, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    weights = HuggingFaceWeights(both.path)
    target = tmp_path / "again"
    target.mkdir()
    write_huggingface(target, weights, dtype=np.dtype(np.float32), tokenizer={}, end_of_text=None)
    came, went = load_file(both.path / FILE), load_file(target / FILE)
    assert came.keys() == went.keys()
    for name, tensor in came.items():
        assert tensor.shape == went[name].shape and tensor.tobytes() == went[name].tobytes(), name
    assert read_config(target) == both.cfg
    again = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").eval()
    # A Mistral without a window is a Llama.
    if both.cfg.window or type(both.theirs).__name__ != "MistralForCausalLM":
        assert type(again) is type(both.theirs)
    ids = torch.from_numpy(tokens(1, 40).astype(np.int64))
    with torch.no_grad():
        np.testing.assert_array_equal(again(ids).logits.numpy(), both.theirs(ids).logits.numpy())


def test_both_spellings_say_the_same(both: Both, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((both.path / "config.json").read_bytes())
    in_older_spelling(tmp_path)
    assert read_config(tmp_path) == both.cfg


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2") / "model"
    make(CASES["gpt2"]).save_pretrained(path)
    return path


def test_names_without_prefix_a_stored_tied_head_and_a_causal_mask(gpt2: Path, tmp_path: Path) -> None:
    """The published GPT-2's file is so."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(gpt2 / FILE).items()}
    tensors["lm_head.weight"] = tensors["wte.weight"].copy()
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
    (tmp_path / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    save_file(tensors, tmp_path / FILE)
    plain, bare = assemble(HuggingFaceWeights(gpt2)), assemble(HuggingFaceWeights(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, plain, bare)
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        HuggingFaceWeights(tmp_path)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("gpt2", {"alibi": True}, "alibi = True is not known"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1], [["global"], 2]]}, "the two in turn are supported"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type is 'longrope'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = .* is not known"),
        ("llama", {"num_key_value_heads": 4}, "n_kv_heads = 4 must divide"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": None},
            "a window is supported in all layers or none",
        ),
    ],
)
def test_what_would_change_the_arithmetic_is_refused(
    tmp_path: Path, case: str, change: dict[str, Any], message: str
) -> None:
    make(CASES[case]).config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("gpt-j-") or name == "gpt-j-6b"])
def test_presets_have_as_many_parameters_there(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    cfg = PRESETS[name]
    (tmp_path / "config.json").write_text(json.dumps(config_document(cfg, np.dtype(np.float32), None)))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config).num_parameters()
    assert count_params(cfg) - cfg.d_model * ("embed" in cfg.biases) == theirs
