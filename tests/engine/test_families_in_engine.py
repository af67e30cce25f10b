"""One model of every family through the engine: texts, company, prefixes, narrow weights, scores, a mesh, HTTP."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import N_CTX, Model, ask, complete, prompt_of
from test_invariance import random_company
from test_shared_scoring import assert_alike, by_hand, questions

import mesh_transformer as mt
from mesh_transformer.checkpoint.quantized import assemble_as
from mesh_transformer.checkpoint.weights import InMemory
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import mesh_from_text
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.engine.packing import Pair
from mesh_transformer.engine.programs import Programs
from mesh_transformer.engine.scoring import Scorer
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.params import map_table
from mesh_transformer.model.policy import ComputePolicy, for_inference
from mesh_transformer.model.quantize import Quantized, map_arrays
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, inference_layout
from small_families import NAMES, params_of, small

# Default tests have time for one model, which has most of what the families have.
EVERY = ["shared", *(pytest.param(name, marks=pytest.mark.long) for name in NAMES)]
CHUNK = 64
# In parts of the largest logit: what arithmetic in another order makes of one.
ROUNDING = 2e-5


def config(name: str, n_ctx: int = 80) -> ModelConfig:
    return small(name, n_vocab=264, n_ctx=n_ctx)


@functools.cache
def values(cfg: ModelConfig) -> Any:
    return jax.tree.map(jnp.asarray, params_of(cfg))


@functools.cache
def model(cfg: ModelConfig, dtype: str = "float32") -> Model:
    """As `engine_cases.model` for the other tests of the engine."""
    params = jax.tree.map(lambda w: w.astype(dtype), values(cfg))
    policy = for_inference(ComputePolicy(dtype=dtype), params, one_device=True)
    return Model(cfg, policy, params, Programs(cfg, policy))


def logits_of(params: Any, cfg: ModelConfig, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """[texts, longest, vocab], by the forward pass alone, which knows no cache, no chunks and no neighbours."""
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    return np.asarray(jax.jit(lambda p, t: forward(p, t, cfg, ComputePolicy()))(params, padded))


def assert_greedy(params: Any, cfg: ModelConfig, written: Sequence[Sequence[int]]) -> None:
    """Every token written after `PROMPTS` is the likeliest after all before it, or as likely but for rounding."""
    logits = logits_of(params, cfg, [[*p, *tokens] for p, tokens in zip(PROMPTS, written, strict=True)])
    largest = np.abs(logits).max()
    for row, prompt, tokens in zip(logits, PROMPTS, written, strict=True):
        after = row[len(prompt) - 1 : len(prompt) - 1 + len(tokens)]
        chosen = np.take_along_axis(after, np.asarray(tokens)[:, None], axis=1)[:, 0]
        assert (after.max(axis=1) - chosen <= ROUNDING * largest).all()
    assert len(set().union(*written)) >= 12, "texts that repeat themselves would prove little"


# A chunk and more; another end of the same first chunk; less than one.
PROMPTS = [prompt_of(70), (*prompt_of(70)[:65], 7, 8, 9), prompt_of(3), prompt_of(30)]
# The first text runs past the context.
LENGTHS = [18, 8, 12, 16]


@pytest.mark.parametrize("name", EVERY)
def test_greedy_texts_are_the_forward_pass_in_any_company(name: str) -> None:
    one = model(config(name))
    lengths = LENGTHS if one.cfg.position == "rotary" else [10, *LENGTHS[1:]]  # fixed positions cannot slide
    requests = [ask(p, n) for p, n in zip(PROMPTS, lengths, strict=True)]
    together = complete(one.engine(4), *requests)
    written = [heard.tokens for heard in together]
    assert [len(tokens) for tokens in written] == lengths
    assert [heard.n_cached for heard in together] == [0, CHUNK, 0, 0]
    assert_greedy(one.params, one.cfg, written)
    alone = one.engine(4)
    for request, tokens in zip(requests, written, strict=True):
        assert complete(alone, request)[0].tokens == tokens


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same_bit_for_bit_in_random_company(name: str, dtype: str) -> None:
    for seed in range(6):
        compared, cached = random_company(model(config(name, N_CTX), dtype), seed, 8)
        assert compared > 100 and cached >= CHUNK


def opened(name: str, quantize: str | None = None, mesh: str | None = None) -> mt.Model:
    """As `mt.load` makes it."""
    cfg = config(name)
    layout = ONE_DEVICE_LAYOUT if mesh is None else inference_layout(mesh_from_text(mesh), cfg)
    place = functools.partial(map_arrays, lambda a, axes: jax.device_put(a, layout.sharding(layout.rules.param(axes))))
    params = map_table(place, cfg, assemble_as(InMemory(cfg, values(cfg)), quantize))
    return mt.Model(cfg, params, load_tokenizer("bytes"), ComputePolicy(), layout=layout)


def write(one: mt.Model) -> list[list[int]]:
    """Within the context."""
    done = one.generate([list(prompt) for prompt in PROMPTS], max_tokens=10, temperature=0.0, ignore_eos=True)
    return [completion.tokens for completion in done]


@pytest.mark.long
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_weights_write_what_the_matrices_that_they_mean_would(name: str, quantize: str) -> None:
    one = opened(name, quantize)
    held = jax.tree.leaves(one.params["layers"], is_leaf=lambda leaf: isinstance(leaf, Quantized))
    n_matrices = 6 + (one.config.feed_forward == "glu_silu")
    assert sum(isinstance(leaf, Quantized) for leaf in held) == n_matrices
    assert not isinstance(one.params["embed"]["tokens"], Quantized)
    meant = jax.tree.map(
        lambda leaf: leaf.widen(np.float32) if isinstance(leaf, Quantized) else leaf,
        one.params,
        is_leaf=lambda leaf: isinstance(leaf, Quantized),
    )
    assert_greedy(meant, one.config, write(one))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_two_devices_write_what_one_does(name: str) -> None:
    one = opened(name, mesh="tensor=2")
    cfg, k = one.config, one.params["layers"]["attn"]["k"]
    assert k.sharding.shard_shape(k.shape)[2] == k.shape[2] // 2
    assert_greedy(values(cfg), cfg, write(one))
    text = list(PROMPTS[3])
    pairs = [Pair(text[:20], text[20:]), Pair(text[:20], [1, 2])]
    assert_alike([one._score(*pair) for pair in pairs], by_hand(values(cfg), cfg, pairs))


@pytest.mark.parametrize("name", EVERY)
def test_scores_are_those_of_the_forward_pass(name: str) -> None:
    """Texts that share what they begin with, and longer ones than the context."""
    cfg, pairs = small(name, n_vocab=64, n_ctx=48), questions()
    params = values(cfg)
    expected = by_hand(params, cfg, pairs)
    scorer = Scorer(cfg, ComputePolicy())
    assert_alike(scorer.score(params, pairs), expected)
    assert scorer.counts.read < 0.7 * scorer.counts.read_apart
    assert_alike(scorer.score(params, pairs, shared=False), expected)


@pytest.mark.long
def test_completions_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model in Llama's form, with the engine on its thread."""
    from starlette.testclient import TestClient

    from mesh_transformer.serve.app import make_app
    from mesh_transformer.serve.options import ServeOptions
    from mesh_transformer.serve.served import ModelFacts, Served

    monkeypatch.setattr("mesh_transformer.engine.service.warm", lambda engine: None)  # what is asked for, is compiled
    one = opened("llama")
    service = one.service(max_batch=2)
    service.start()
    try:
        app = make_app(Served(ModelFacts(config=one.config, tokenizer=one.tokenizer), service, ServeOptions(name="m")))
        end = time.monotonic() + 60
        while not service.ready:
            assert time.monotonic() < end, "the engine did not start"
            time.sleep(0.01)
        prompt = list(prompt_of(70))
        asked = {"prompt": prompt, "temperature": 0, "max_tokens": 10, "ignore_eos": True}
        with TestClient(app) as client:
            answer = client.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["usage"]["prompt_tokens"], answer.json()["usage"]["completion_tokens"]) == (70, 10)
        (expected,) = one.generate([prompt], max_tokens=10, temperature=0.0, ignore_eos=True)
        assert answer.json()["choices"][0]["text"] == expected.text != ""
    finally:
        assert service.close(10.0)
