"""This project as a contender at writing: `Model.generate`, the engine behind a server, and the memory's own speed."""

from __future__ import annotations

import threading
import time
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.api import Model, load
from mesh_transformer.bench.work import prompts, texts
from mesh_transformer.config.errors import RunError
from mesh_transformer.engine.request import Output, Request
from mesh_transformer.kernels import native
from mesh_transformer.model.quantize import QUANTIZATIONS
from mesh_transformer.sample.options import SamplingOptions

_TURN_SECONDS = 1800.0  # after which a turn of the engine has failed


def _opened(spec: dict[str, Any]) -> Model:
    precision = spec["precision"]
    how = {"quantize": precision} if precision in QUANTIZATIONS else {"dtype": precision}
    found = load(spec["directory"], **how)
    # Without a tokenizer: no other contender turns ids into text.
    return Model(found.config, found.params, None, found.policy)


def _described(model: Model) -> dict[str, Any]:
    kernels = native.description() if native.available() else f"none ({native.why_not()})"
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "native kernels": kernels,
        "weights, bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
    }


def _options(n_tokens: int) -> SamplingOptions:
    return SamplingOptions(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)


class DecodeContender:
    """Greedy continuation of a batch of prompts by `Model.generate`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._model = _opened(spec)
        self._rows = prompts(spec["n_vocab"], spec["batch"], spec["prompt"])
        self._n_tokens = spec["tokens"]

    def step(self) -> dict[str, Any]:
        begun = time.perf_counter()
        self._generate(1)
        first = time.perf_counter()
        tokens = self._generate(self._n_tokens)
        return {"first": first - begun, "whole": time.perf_counter() - first, "tokens": tokens}

    def _generate(self, n_tokens: int) -> list[list[int]]:
        made = self._model.generate(self._rows, max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
        return [completion.tokens for completion in made]

    def describe(self) -> dict[str, Any]:
        return _described(self._model) | {"settings": "Model.generate, greedy"}


class ServeContender:
    """Texts of mixed lengths, all submitted at once to the engine that `serve` runs, without HTTP."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec, self._turn = spec, 0
        self._model = _opened(spec)
        self._service = self._model.service(max_batch=spec["max_batch"], max_queue=spec["texts"], when_full="stop")
        self._service.start()

    def step(self) -> dict[str, Any]:
        wanted = texts(self._spec, self._turn)
        self._turn += 1
        firsts, written, left = [0.0] * len(wanted), 0, len(wanted)
        done, errors = threading.Event(), list[Exception]()
        begun = time.perf_counter()

        def receive(place: int, output: Output) -> None:
            nonlocal written, left
            if output.tokens and not firsts[place]:
                firsts[place] = time.perf_counter() - begun
            written += len(output.tokens)
            if output.error is not None:
                errors.append(output.error)
            if output.last:
                left -= 1
                if not left:
                    done.set()

        requests = [Request(prompt=tuple(text.prompt), options=_options(text.n_tokens)) for text in wanted]
        self._service.submit(requests, receive)
        if not done.wait(_TURN_SECONDS):
            raise RunError(f"{left} of {len(wanted)} texts were not finished after {_TURN_SECONDS:.0f} seconds")
        if errors:
            raise errors[0]
        return {"whole": time.perf_counter() - begun, "written": written, "firsts": firsts}

    def describe(self) -> dict[str, Any]:
        batching = f"continuous batching, {self._spec['max_batch']} texts under way"
        return _described(self._model) | {"settings": batching}


class Bandwidth:
    """How fast weights can be read: a float32 matrix times one row, and its sum, by each way that there is.

    The fastest way counts. The matrix is `spec["rows"]` x `spec["columns"]`, larger than the caches unless told.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        n, m = spec.get("rows", 4096), spec.get("columns", 16384)
        w = jnp.full((1, n, m), 1e-3, jnp.float32)
        x = jnp.ones((1, n), jnp.float32)
        self._arguments = x, w
        ways = {"XLA product": lambda x, w: x @ w[0], "XLA sum": lambda x, w: jnp.sum(w)}
        if native.available():
            ways["native product"] = lambda x, w: native.matmul(x, w, jnp.int32(0), kind="float32")
        self._ways = {name: jax.jit(way).lower(x, w).compile() for name, way in ways.items()}

    def step(self) -> dict[str, Any]:
        found = {}
        for name, way in self._ways.items():
            seconds = []
            for _ in range(5):
                begun = time.perf_counter()
                jax.block_until_ready(way(*self._arguments))
                seconds.append(time.perf_counter() - begun)
            found[name] = self._arguments[1].nbytes / min(seconds)
        return {"bytes_per_second": found}

    def describe(self) -> dict[str, Any]:
        return {"jax": jax.__version__, "bytes": self._arguments[1].nbytes}


def make(spec: dict[str, Any]) -> DecodeContender | ServeContender | Bandwidth:
    """The contender that `spec["kind"]` names."""
    kinds: dict[str, Any] = {"decode": DecodeContender, "serve": ServeContender, "bandwidth": Bandwidth}
    return kinds[spec["kind"]](spec)
