"""16-bit weights in inference on CPU: the same numbers as from float32 copies, without the copies."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.engine.programs import decode, prefill
from mesh_transformer.model.cache import empty_cache
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.params import abstract_params, count_params, init_params
from mesh_transformer.model.policy import ComputePolicy, for_inference

CFG = ModelConfig(n_layers=8, d_model=256, n_heads=4, n_vocab=512, n_ctx=64, d_rotary=16)
TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) * 19 % 512


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.long)])
@pytest.mark.parametrize("position", ["rotary", "t5"])
def test_equal_to_float32_copies(dtype: str, position: Any) -> None:
    cfg = dataclasses.replace(CFG, n_layers=3, position=position, d_rotary=0)
    narrow = init_params(cfg, jax.random.key(0), dtype)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
    policy = for_inference(ComputePolicy(), narrow, one_device=True)
    assert policy.widen_by_layer and not for_inference(ComputePolicy(), wide, one_device=True).widen_by_layer
    found = jax.jit(functools.partial(forward, cfg=cfg, policy=policy))(narrow, TOKENS)
    expected = jax.jit(functools.partial(forward, cfg=cfg, policy=ComputePolicy()))(wide, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("compute", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.long)])
def test_no_copy_of_the_cache(compute: str) -> None:
    """A program that adds a token needs no more memory for a cache of many pages than for one of few."""
    params, rows = abstract_params(CFG, jnp.bfloat16), jnp.ones((2, 4), jnp.int32)
    policy = for_inference(ComputePolicy(dtype=compute), params, one_device=True)

    def temporary(n_pages: int) -> tuple[int, int]:
        cache = empty_cache(CFG, n_pages, 16, 16, policy.jax_dtype)

        def step(params: Any, k: Any, v: Any) -> Any:
            held = dataclasses.replace(cache, k=k, v=v)
            logits, held = decode(params, rows, cache=held, cfg=CFG, policy=policy)
            return logits, held.k, held.v

        program = jax.jit(step, donate_argnums=(1, 2)).lower(params, cache.k, cache.v).compile()
        return program.memory_analysis().temp_size_in_bytes, cache.k.nbytes

    (few, small), (many, large) = temporary(3), temporary(103)
    assert many - few < 0.01 * (large - small)


@pytest.mark.parametrize(
    ("program", "compute"),
    [
        (decode, "float32"),
        *((program, "bfloat16") for program in (prefill, decode, forward)),
        *(pytest.param(program, "float32", marks=pytest.mark.long) for program in (prefill, forward)),
    ],
)
def test_no_copy_of_all_weights(program: Any, compute: str) -> None:
    """The compiled programs' own memory is a part of the weights' bytes; without the care taken it is twice them."""
    params = abstract_params(CFG, jnp.bfloat16)
    one = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def temporary(policy: ComputePolicy) -> int:
        def whole(params: Any, tokens: Any) -> Any:
            if program is forward:
                return forward(params, tokens, CFG, policy)
            how = {"cache": empty_cache(CFG, 3, 16, 16, policy.jax_dtype), "cfg": CFG, "policy": policy}
            rows = jnp.ones((2, 4), jnp.int32)
            if program is decode:
                return decode(params, rows, **how)[0]
            return prefill(params, tokens, rows, n_copies=2, **how)[0]

        return jax.jit(whole).lower(params, one).compile().memory_analysis().temp_size_in_bytes

    weights = 2 * count_params(CFG)
    # One layer in float32, twice, and the head; the activations of 16 tokens are small beside them.
    layer, head = 4 * 12 * CFG.d_model**2, 4 * CFG.d_model * CFG.n_vocab
    assert 2 * layer + head < math.floor(0.75 * weights)
    assert temporary(for_inference(ComputePolicy(dtype=compute), params, one_device=True)) < 2 * layer + head
    if compute == "float32":
        assert temporary(ComputePolicy(dtype=compute, unroll=True)) > 1.5 * weights
