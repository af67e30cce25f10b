"""Small models, engines that share compiled programs, and what a request's rows looked like at every choice."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.programs import Alternatives, Programs
from mesh_transformer.engine.request import Output, Request, TokenLogprob
from mesh_transformer.engine.sequence import Sequence as Text
from mesh_transformer.model.params import ParamSpec, abstract_params, is_multiplied, param_table
from mesh_transformer.model.policy import ComputePolicy, for_inference
from mesh_transformer.model.quantize import quantize
from mesh_transformer.sample.options import SamplingOptions

END = 256  # of the tokenizer of bytes
PAGE, N_CTX = 64, 160
LARGE = 16  # texts at one time in tests that draw tokens; the same in all, for the sake of compiling less


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What an engine needs. Engines of one model share its programs, so that each shape is compiled once."""

    cfg: ModelConfig
    policy: ComputePolicy
    params: Any
    programs: Programs

    def engine(self, max_batch: int = 8, **options: Any) -> Engine:
        """An engine whose completions have no text, unless a tokenizer is given."""
        tokenizer = options.pop("tokenizer", None)
        return Engine(self.programs, self.params, tokenizer, max_batch=max_batch, **options)


@functools.cache
def model(position: str = "rotary", dtype: str = "float32", quantized: bool = False, **sizes: int) -> Model:
    """A random model of two layers that is sure of what it says; the same for the same arguments."""
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_vocab": 260, "n_ctx": N_CTX, "d_rotary": 4} | sizes
    cfg = ModelConfig(**shape, position=position)
    params = random_params(cfg, dtype)
    if quantized:
        params = quantize_all(params, cfg)
    policy = for_inference(ComputePolicy(dtype=dtype, unroll=True), params, one_device=True)
    return Model(cfg, policy, params, Programs(cfg, policy))


def random_params(cfg: ModelConfig, dtype: str = "float32", seed: int = 0) -> Any:
    """Large weights and small biases: the next token depends on all of the text, likelihoods are far apart."""
    random, width = np.random.default_rng(seed), cfg.d_model
    spreads = {"q": 2 / width**0.5, "k": 2 / width**0.5, "w_out": (4 * width) ** -0.5}
    spreads |= dict.fromkeys(("v", "o", "w_in"), width**-0.5)
    spreads |= {"tokens": 1.0, "positions": 1.0, "w": 3 / width**0.5}

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = [key.key for key in path]
        spread = 1.0 if names == ["relative", "bias"] else spreads.get(names[-1], 0.1)
        return jnp.asarray((names[-1] == "scale") + spread * random.normal(size=leaf.shape), dtype)

    return jax.tree_util.tree_map_with_path(one, abstract_params(cfg))


def quantize_all(params: Any, cfg: ModelConfig) -> Any:
    """The parameters with every matrix that tokens are multiplied with in 8 bits."""

    def one(spec: Any, w: jax.Array) -> Any:
        if not is_multiplied(spec):
            return w
        return jax.tree.map(jnp.asarray, quantize(np.asarray(w), spec))

    return jax.tree.map(one, param_table(cfg), params, is_leaf=lambda s: isinstance(s, ParamSpec))


@dataclasses.dataclass
class Heard:
    """All that an engine has said of one request."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    n_cached: int = 0
    finish_reason: str | None = None
    outputs: int = 0

    def hear(self, output: Output) -> None:
        """Adds what a step has said; nothing may come after the last."""
        assert self.finish_reason is None and output.error is None
        self.outputs += 1
        self.tokens += output.tokens
        self.text += output.text
        self.logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "a prompt's likelihoods were said twice"
            self.prompt_logprobs = output.prompt_logprobs
        self.n_cached = max(self.n_cached, output.n_cached)
        self.finish_reason = output.finish_reason


def finish(engine: Engine, texts: Sequence[Text]) -> list[Heard]:
    """Steps until nothing is left to do: what was said of each of `texts`, which are all that it has."""
    heard = {text: Heard() for text in texts}
    while engine.busy:
        for text, output in engine.step():
            heard[text].hear(output)
    return [heard[text] for text in texts]


def complete(engine: Engine, *requests: Request) -> list[Heard]:
    """What the engine says of requests that all come at once."""
    return finish(engine, [engine.submit(request) for request in requests])


def ask(prompt: Sequence[int], max_tokens: int = 8, *, logprobs: int | None = None, **options: Any) -> Request:
    """A greedy request that no end-of-text ends, unless it says otherwise."""
    prompt_logprobs = options.pop("prompt_logprobs", False)
    given = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens} | options
    return Request(
        prompt=tuple(prompt), options=SamplingOptions(**given), logprobs=logprobs, prompt_logprobs=prompt_logprobs
    )


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random bytes."""
    return tuple(int(t) for t in np.random.default_rng([seed, length]).integers(0, 256, length))


def record(engine: Engine) -> dict[Text, list[np.ndarray]]:
    """From now on the logits that each text's tokens are chosen from, in order, by text.

    The likeliest token is chosen, or with a temperature one drawn by NumPy; so nothing is compiled for choosing.
    """
    seen: dict[Text, list[np.ndarray]] = {}
    programs = copy.copy(engine.programs)

    def choose(logits: Any, slots: Any, rows: np.ndarray, end: int, uses: Any) -> Any:
        held, tokens = np.array(logits), np.zeros(len(rows), np.int32)
        owners = {text.slot: text for text in engine.running}
        for row, (slot, position, _) in enumerate(rows):
            if slot < engine.max_batch:
                text = owners[slot]
                assert position == len(text.tokens)
                seen.setdefault(text, []).append(held[row])
                noise = np.random.default_rng([text.options.seed, position]).gumbel(size=held.shape[1])
                tokens[row] = np.argmax(held[row] + (noise if text.options.temperature else 0))
        return tokens, Alternatives(tokens, tokens, tokens), slots

    programs.choose = choose  # type: ignore[method-assign]
    programs.fill = lambda slots, *_: slots  # type: ignore[method-assign]
    engine.programs = programs
    return seen
