"""After the engine is warm nothing is compiled and every step reads from the device once, whatever is asked."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import END, LARGE, N_CTX, ask, model, prompt_of
from fake_programs import assert_idle

from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.request import Request
from mesh_transformer.engine.warm import warm


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Grows with everything that is compiled."""
    found: list[str] = []

    def listen(name: str, seconds: float, **_: Any) -> None:
        if name.endswith("backend_compile_duration"):
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_compilation_is_noticed(compiled: list[str]) -> None:
    jax.jit(lambda x: x * 3.25)(jnp.zeros(3)).block_until_ready()
    assert compiled


@functools.cache
def warm_engine(position: str) -> Engine:
    """Of sizes that other tests use too, which then compile less."""
    one, size = (model(), LARGE) if position == "rotary" else (model(n_layers=1, position=position), 8)
    engine = one.engine(size, tokenizer=load_tokenizer("bytes"))
    warm(engine)
    assert_idle(engine)
    return engine


def random_request(random: np.random.Generator) -> Request:
    """Options of every kind, alone and together."""
    options: dict[str, Any] = {"seed": int(random.integers(9)), "ignore_eos": bool(random.random() < 0.5)}
    kinds: dict[str, Any] = {
        "temperature": 0.8,
        "top_k": 5,
        "top_p": 0.7,
        "presence_penalty": 1.0,
        "frequency_penalty": -0.5,
        "logit_bias": ((3, 5.0), (END, 2.0)),
        "min_tokens": 3,
        "stop": ("a", "bc"),
        "sampler": "legacy",
        "logprobs": 4,
        "sample": 7,
    }
    options |= {name: value for name, value in kinds.items() if random.random() < 0.3}
    if "logprobs" in options and random.random() < 0.5:
        options["prompt_logprobs"] = True
    elif "sampler" not in options and random.random() < 0.3:
        options["min_p"] = 0.1
    length = int(random.choice([0, 1, 4, 30, 120]))
    return ask(
        prompt_of(int(random.choice([0, 1, 16, 17, 64, 65, 130, N_CTX])), int(random.integers(3))), length, **options
    )


def load_at_random(engine: Engine, seed: int, n_requests: int) -> tuple[int, int]:
    """Requests that come at random and are cancelled now and then: steps, and the most texts at one time."""
    random, texts, steps, most = np.random.default_rng(seed), [], 0, 0
    while n_requests or engine.busy:
        for _ in range(min(n_requests, int(random.poisson(0.5)))):
            n_requests -= 1
            texts.append(engine.submit(random_request(random)))
        if texts and random.random() < 0.03:
            engine.cancel(texts[random.integers(len(texts))])
        engine.step()
        steps, most = steps + 1, max(most, len(engine.running))
    assert_idle(engine)
    return steps, most


@pytest.mark.parametrize(
    ("position", "n_requests"), [("rotary", 80), pytest.param("fixed", 30, marks=pytest.mark.long)]
)
def test_nothing_is_compiled_once_it_is_warm(position: str, n_requests: int, compiled: list[str]) -> None:
    engine = warm_engine(position)
    del compiled[:]
    before = engine.programs.n_compiled
    steps, most = load_at_random(engine, 1, n_requests)
    assert steps > 100 and most == engine.max_batch
    assert (compiled, engine.programs.n_compiled) == ([], before)
    # Nor after a step has failed, when everything begins again.
    engine.reset()
    load_at_random(engine, 2, 5)
    assert engine.programs.n_compiled == before
    engine.reset()
    del compiled[:]
    load_at_random(engine, 3, 5)
    assert compiled == []


class _OnDevice:
    """A result that nothing but `jax.device_get` may look into."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("a result is read outside of the step's one transfer")

    __int__ = __float__ = __bool__ = __index__ = __iter__ = __getitem__ = tolist = __array__  # type: ignore[assignment]


def keep_results_on_device(engine: Engine) -> None:
    """Hides what programs return, so that a transfer by the way is an error. JAX's own guard does nothing on CPU."""
    held = engine.programs
    programs = copy.copy(held)

    def prefill(*inputs: Any) -> Any:
        logits, cache, scores = held.prefill(*inputs)
        return _OnDevice(logits), cache, None if scores is None else _OnDevice(scores)

    def decode(*inputs: Any) -> Any:
        logits, cache = held.decode(*inputs)
        return _OnDevice(logits), cache

    def choose(logits: _OnDevice, *inputs: Any, **options: Any) -> Any:
        tokens, scores, slots = held.choose(logits.value, *inputs, **options)
        return _OnDevice(tokens), _OnDevice(scores), slots

    programs.prefill, programs.decode, programs.choose = prefill, decode, choose  # type: ignore[method-assign]
    engine.programs = programs


def test_one_transfer_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = copy.copy(warm_engine("rotary"))
    engine.reset()
    keep_results_on_device(engine)
    transfers: list[int] = []
    get = jax.device_get

    def device_get(wanted: Any) -> Any:
        hidden = lambda leaf: isinstance(leaf, _OnDevice)  # noqa: E731
        transfers.append(len(jax.tree.leaves(wanted, is_leaf=hidden)))
        return get(jax.tree.map(lambda leaf: leaf.value if hidden(leaf) else leaf, wanted, is_leaf=hidden))

    monkeypatch.setattr(jax, "device_get", device_get)
    steps, _ = load_at_random(engine, 4, 25)
    assert len(transfers) == steps and max(transfers) >= 3
    with pytest.raises(AssertionError, match="outside of the step's one transfer"):
        np.asarray(_OnDevice(jnp.zeros(2)))
