"""The real command in its own process, on a small random model: from HTTP to the model and back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mesh_transformer as mt
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.model.params import abstract_params

CFG = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=264, n_ctx=64, d_rotary=4)
END = 256
KEY = "s3cret"
DEADLINE = 240.0


def random_params() -> dict[str, Any]:
    random = np.random.default_rng(7)

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray((path[-1].key == "scale") + 0.4 * random.normal(size=leaf.shape), jnp.float32)

    return dict(jax.tree_util.tree_map_with_path(one, abstract_params(CFG)))


class RealServer:
    """The process, and clients of it."""

    def __init__(self, model: mt.Model, process: subprocess.Popen[str], url: str) -> None:
        self.model, self.process, self.url = model, process, url
        self.http = httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=DEADLINE)

    def complete(self, **body: Any) -> Any:
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def figure(self, name: str) -> float:
        found = re.search(rf"^mesh_transformer_{name} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def wait_for_figure(self, name: str, value: float) -> None:
        end = time.monotonic() + DEADLINE
        while self.figure(name) != value:
            assert time.monotonic() < end, name
            time.sleep(0.01)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    path = tmp_path_factory.mktemp("real")
    model = mt.Model(CFG, random_params(), load_tokenizer("bytes"))
    model.save(path / "model")
    line = [sys.executable, "-m", "mesh_transformer", "serve", path / "model", "--port", "0", "--max-batch", "2"]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MESH_TRANSFORMER_API_KEY": KEY}
    environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0", "MESH_TRANSFORMER_CACHE": str(path / "cache")}
    with subprocess.Popen(line, env=environment, **pipes) as process:
        try:
            assert process.stderr is not None
            first = process.stderr.readline()
            assert first.startswith("serving model at http://127.0.0.1:"), first
            ready = process.stderr.readline()
            assert ready.startswith("ready after "), ready
            server = RealServer(model, process, first.split()[-1])
            with server.http:
                yield server
        finally:
            process.kill()


def test_it_is_ready_when_it_says_so(real: RealServer) -> None:
    assert real.http.get("/health").json() == {"status": "ok"}
    assert httpx2.get(f"{real.url}/v1/models").status_code == 401
    assert real.http.get("/v1/models").json()["data"][0]["max_model_len"] == CFG.n_ctx
    page = httpx2.get(real.url)
    assert page.status_code == 200 and "frame-ancestors 'none'" in page.headers["content-security-policy"]


# Prompts of 33 to 64 tokens: the model is compiled in this process for one width only.
PROMPTS = [b"To be, or not to be, that is the question", b"Whether 'tis nobler in the mind to suffer", bytes(range(64))]


def test_greedy_text_is_the_models(real: RealServer) -> None:
    answer = real.complete(prompt=[list(prompt) for prompt in PROMPTS[:2]], temperature=0, max_tokens=12, logprobs=0)
    for prompt, choice in zip(PROMPTS, answer["choices"], strict=False):
        tokens = list(prompt)
        for told in choice["logprobs"]["token_logprobs"]:
            likelihoods = np.asarray(jax.nn.log_softmax(real.model.logits([tokens])[0, -1]))
            tokens.append(int(likelihoods.argmax()))
            assert told == pytest.approx(float(likelihoods.max()), abs=1e-4)
        assert choice["text"] == real.model.tokenizer.decode(tokens[len(prompt) :])


def test_a_seed_gives_the_same_answer(real: RealServer) -> None:
    asked = {"prompt": "To be", "n": 3, "seed": 2**33 + 5, "temperature": 1.2, "top_p": 0.95, "max_tokens": 90}
    texts = [[choice["text"] for choice in real.complete(**asked)["choices"]] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert [choice["text"] for choice in real.complete(**{**asked, "seed": 5})["choices"]] == texts[0]
    assert [choice["text"] for choice in real.complete(**{**asked, "seed": 6})["choices"]] != texts[0]


def test_a_stream_is_the_same_text(real: RealServer) -> None:
    asked = {"prompt": "To be", "seed": 5, "max_tokens": 40, "logprobs": 2, "echo": True}
    whole = real.complete(**asked)["choices"][0]
    pieces = []
    with real.http.stream("POST", "/v1/completions", json={**asked, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    pieces = [json.loads(line)["choices"][0] for line in lines]
    assert len(pieces) > 5 and "".join(piece["text"] for piece in pieces) == whole["text"]
    for key in ("tokens", "text_offset"):
        assert [v for piece in pieces for v in piece["logprobs"][key]] == whole["logprobs"][key]


def score(real: RealServer, prompts: list[list[int]], **more: Any) -> list[dict[str, Any]]:
    """As lm-eval asks for the likelihoods of continuations."""
    answer = real.complete(
        model="model", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True, **more
    )
    return [choice["logprobs"] for choice in answer["choices"]]


def test_likelihoods_are_the_models(real: RealServer) -> None:
    prompts = [list(prompt) for prompt in PROMPTS]
    for prompt, logprobs in zip(prompts, score(real, prompts), strict=True):
        logits = real.model.logits([prompt])[0]
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(logprobs["token_logprobs"][1:-1], expected, rtol=1e-4, atol=1e-4)
        assert logprobs["token_logprobs"][0] is None and len(logprobs["tokens"]) == len(prompt) + 1
        greedy = logits[:-1].argmax(-1) == prompt[1:]
        tops = zip(logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1], strict=True)
        assert [max(top.values()) == own for own, top in tops] == greedy.tolist()


def test_likelihoods_before_an_end_of_text(real: RealServer) -> None:
    """The last entry is thrown away by lm-eval, and so must be there."""
    prompt = list(b"To be or not")
    (logprobs,) = score(real, [prompt], logit_bias={str(END): 100})
    assert len(logprobs["token_logprobs"]) == len(prompt) + 1
    assert logprobs["tokens"][-1] == "<|endoftext|>"


def test_both_of_the_original(real: RealServer) -> None:
    body = {"context": "In a shocking finding, " * 10, "top_p": 0.9, "temp": 0.75}
    answer = real.http.post("/complete", json=body, headers={"Origin": "https://demo.example"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"
    assert answer.json()["completion"]
    numbers = [real.http.post("/model/predict", json={"context": "a", "length": n}).json()["qid"] for n in (4, 9)]
    answers = [real.http.post("/model/get_prediction", json={"qid": qid}).json() for qid in (*numbers, *numbers)]
    assert answers[:2] == answers[2:] and all(a["context"] == "a" for a in answers)


def test_a_vanished_client_frees_its_slot(real: RealServer) -> None:
    before, gone = real.figure("generated_tokens_total"), real.figure("clients_gone_total")
    # Much more than could be written before the client has gone.
    body = {"prompt": "a", "max_tokens": 900, "n": 128, "ignore_eos": True, "stream": True}
    with real.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # kept: the connection goes with it
        next(lines)
        real.wait_for_figure("slots_used", 2)  # between the ends of two texts and the next two it is 0
    real.wait_for_figure("slots_used", 0)
    # Freed, and not finished.
    assert real.figure("generated_tokens_total") - before < 128 * 900
    assert real.figure("queue_length") == 0
    real.wait_for_figure("clients_gone_total", gone + 1)
    assert real.complete(prompt="a", max_tokens=1)["choices"][0]["finish_reason"]


def test_bad_requests_do_no_harm(real: RealServer) -> None:
    compiled = real.figure("compilations_total")
    for body in (b"{", b"[]", b'{"prompt": [999999]}', b'{"temperature": NaN}', b"\xff" * 100, b" " * 2_000_000):
        answer = real.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 413) and answer.json()["error"]["message"]
    answer = real.http.post("/v1/completions", json={"prompt": "a" * 65})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    answer = real.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 4000})
    assert answer.status_code == 400 and "tokens that a text may have here" in answer.json()["error"]["message"]
    assert real.figure("engine_step_failures_total") == 0
    assert real.figure("compilations_total") == compiled


def test_sigterm_under_load_finishes_what_runs(real: RealServer) -> None:
    """The last test: afterwards the server is gone."""
    n, ends = 10, {}
    begun = threading.Barrier(n + 1)

    def ask(i: int) -> None:
        body = {"prompt": f"client {i}", "max_tokens": 60, "ignore_eos": True, "stream": True}
        with real.http.stream("POST", "/v1/completions", json=body) as answer:
            begun.wait(DEADLINE)
            ends[i] = (answer.status_code, [line for line in answer.iter_lines() if line][-1])

    clients = [threading.Thread(target=ask, args=(i,)) for i in range(n)]
    for client in clients:
        client.start()
    begun.wait(DEADLINE)
    real.process.send_signal(signal.SIGTERM)
    for client in clients:
        client.join(DEADLINE)
    assert ends == dict.fromkeys(range(n), (200, "data: [DONE]"))
    assert real.process.wait(DEADLINE) == 0
    assert real.process.stderr is not None
    assert real.process.stderr.read() == "stopping: finishing what runs\n"
