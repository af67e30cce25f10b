"""A small model on disk, and the real server before it in a process of its own, for other people's clients."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mesh_transformer as mt
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import Tokenizer, train_bpe
from mesh_transformer.model.params import abstract_params
from quickly import compile_quickly

CONTEXT = 256  # tokens
KEY = "a-key"
PATIENCE = 240.0  # seconds for whatever must happen in the end

_ADDRESS = re.compile(r"^serving .+ at (http://\S+)\n", re.MULTILINE)
_WHO = (
    "The geese",
    "A river",
    "Two servers",
    "Many readers",
    "An old model",
    "The committee",
    "Nobody",
    "Seven proofs",
)
_DOES = ("waited for", "read about", "wrote to", "counted", "remembered", "followed", "forgot", "drew")
_WHAT = ("the café", "every token", "a field of clover", "the year 2021", "its own tail", "an even number", "the sea")
_HOW = ("slowly", "at noon", "without a word", "for the third time", "and laughed", "in spite of the rain", "by heart")


def sentences(seed: int, n: int) -> list[str]:
    """`n` sentences of one pattern, the same for the same seed."""
    chosen = random.Random(seed)
    return [" ".join(chosen.choice(words) for words in (_WHO, _DOES, _WHAT, _HOW)) + "." for _ in range(n)]


def save_model(path: Path) -> Path:
    """Writes a model of random weights with a tokenizer of its own, as a Hugging Face directory, and returns it.

    Its texts are mostly of whole words; now and then they hold bytes that are no character, and some end by themselves.
    """
    tokenizer = train_bpe(sentences(0, 400), 512)
    cfg = ModelConfig(n_layers=2, d_model=32, n_heads=2, n_vocab=tokenizer.n_vocab + 3, n_ctx=CONTEXT, d_rotary=8)
    normal = np.random.default_rng(2021)

    def one(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray((keys[-1].key == "scale") + 0.4 * normal.normal(size=leaf.shape), jnp.float32)

    params: dict[str, Any] = dict(jax.tree_util.tree_map_with_path(one, abstract_params(cfg)))
    params["head"]["b"] = params["head"]["b"] + jnp.asarray(_likings(tokenizer, cfg.n_vocab))
    mt.Model(cfg, params, tokenizer).save(path, format="huggingface")
    return path


def _likings(tokenizer: Tokenizer, n_vocab: int) -> np.ndarray:
    """For the logits: words rather than single bytes, an end now and then, never an id that the tokenizer lacks."""
    written = [tokenizer.token_bytes(token) for token in range(tokenizer.n_vocab)]
    liked = [0.0 if len(data) > 1 and data.isascii() else -3.0 for data in written]
    liked[tokenizer.end_of_text or 0] = 1.0
    return np.asarray([*liked, *[-1e4] * (n_vocab - len(liked))], np.float32)


@contextmanager
def compiled_quickly() -> Iterator[None]:
    """Programs of this process are compiled meanwhile without what would make them fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    compile_quickly(True)
    yield
    compile_quickly(before)


@dataclasses.dataclass
class Running:
    """A server that is ready. url: without a slash at its end. messages: what it has said so far, a line each."""

    model: Path
    url: str
    process: subprocess.Popen[str]
    messages: list[str]
    key: str | None

    def figure(self, name: str) -> float:
        """One of its figures at /metrics."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(f"{self.url}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            found = re.search(rf"^mesh_transformer_{name} (\S+)$", answer.read().decode(), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def stop(self) -> int:
        """Tells it to end; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def serving(model: Path, *options: str, key: str | None = None) -> Iterator[Running]:
    """`mesh-transformer serve MODEL` at a free port, ready; at the end it must go when it is told to."""
    line = [sys.executable, "-m", "mesh_transformer", "serve", str(model), "--port", "0", *options]
    environment = {name: value for name, value in os.environ.items() if name != "MESH_TRANSFORMER_API_KEY"}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment |= {"MESH_TRANSFORMER_CACHE": str(model.parent / "cache")}
    environment |= {"MESH_TRANSFORMER_API_KEY": key} if key else {}
    messages: list[str] = []
    with subprocess.Popen(
        line, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        reader = threading.Thread(target=lambda: messages.extend(process.stderr or ()))
        reader.start()
        try:
            running = Running(model, _wait_ready(process, messages), process, messages, key)
            yield running
            if process.poll() is None:
                assert running.stop() == 0, messages
        finally:
            process.kill()
            reader.join()


def _wait_ready(process: subprocess.Popen[str], messages: list[str]) -> str:
    """Where the server is reached, once /health says that it is ready."""

    def ready() -> bool:
        assert process.poll() is None, messages
        found = _ADDRESS.search("".join(messages))
        if found is None:
            return False
        try:
            with urllib.request.urlopen(f"{found[1]}/health", timeout=PATIENCE) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            with error:
                assert error.code == 503
            return False

    wait_for(ready)
    found = _ADDRESS.search("".join(messages))
    assert found is not None
    return found[1]


def wait_for(true: Callable[[], bool], seconds: float = PATIENCE) -> float:
    """Returns once `true()`, with the seconds that it took; fails after a deadline."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, "waited in vain"
        time.sleep(0.01)
    return time.monotonic() - begun


def likelihoods(model: mt.Model, tokens: list[int]) -> np.ndarray:
    """log p of every token of the vocabulary after each of `tokens`: [length, vocab]."""
    return np.asarray(jax.nn.log_softmax(model.logits([tokens])[0]))


def written(data: bytes) -> str:
    """How the bytes of a token are told."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def assert_told(model: mt.Model, told: Any, tokens: list[int], n_prompt: int, top: int, text: str) -> None:
    """What is told of `tokens` but the first `n_prompt` is what the model says."""
    assert model.tokenizer is not None
    data = [model.tokenizer.token_bytes(token) for token in tokens]
    assert told.tokens == [written(each) for each in data[n_prompt:]]
    expected = likelihoods(model, tokens)
    entries = zip(told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True)
    for at, (name, logprob, alternatives, offset) in enumerate(entries, n_prompt):
        if not name.startswith("bytes:") and not written(data[at - 1]).startswith("bytes:"):
            assert text.startswith(name, offset)
        if at == 0:
            assert logprob is None and alternatives is None
            continue
        row = expected[at - 1]
        assert logprob == pytest.approx(row[tokens[at]], abs=1e-4) and logprob == alternatives[name]
        likeliest = np.argsort(-row)[:top].tolist()
        own = [] if tokens[at] in likeliest else [tokens[at]]
        names = [written(model.tokenizer.token_bytes(token)) for token in [*likeliest, *own]]
        assert list(alternatives) == names
        np.testing.assert_allclose(list(alternatives.values()), row[[*likeliest, *own]], atol=1e-4)
