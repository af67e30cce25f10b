"""Hugging Face's `generate` behind HTTP, as people serve a transformers model: a contender of `bench load`.

    python -m mesh_transformer.bench.hf_server DIRECTORY --port N --max-batch N

POST /v1/completions takes the fields that `bench load` sends and answers when all tokens are there. One thread
generates. With --max-batch 1 it takes one request at a time; with more, whatever waits when it is free, padded on the
left, and generates as many tokens for all as the longest asks for. Tokens are not decoded to text: that time is given
to it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import transformers

Body = dict[str, Any]


class Generator:
    """The model and the thread that it runs on."""

    def __init__(self, directory: str, max_batch: int) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
        self._model = transformers.GPTJForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        # Every completion has the length asked for, on both sides.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self._max_batch = max_batch
        self._waiting: queue.Queue[tuple[Body, Future[Body]]] = queue.Queue()
        threading.Thread(target=self._serve, daemon=True).start()

    def ask(self, body: Body) -> Body:
        """The answer to one request, from any thread."""
        answer: Future[Body] = Future()
        self._waiting.put((body, answer))
        return answer.result()

    def _serve(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self._max_batch and not self._waiting.empty():
                batch.append(self._waiting.get())
            try:
                for (_, answer), made in zip(batch, self.complete([body for body, _ in batch]), strict=True):
                    answer.set_result(made)
            except Exception as error:  # it belongs to those who wait for it
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)

    @torch.inference_mode()
    def complete(self, bodies: list[Body]) -> list[Body]:
        """The answers to requests of one batch; temperature, top_p and seed are those of the first."""
        longest = max(len(body["prompt"]) for body in bodies)
        padding = [longest - len(body["prompt"]) for body in bodies]
        prompts = torch.tensor([[0] * n + body["prompt"] for n, body in zip(padding, bodies, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        torch.manual_seed(bodies[0]["seed"])
        written = self._model.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=max(body["max_tokens"] for body in bodies),
            do_sample=True,
            temperature=bodies[0]["temperature"],
            top_p=bodies[0]["top_p"],
            top_k=0,
        )[:, longest:].tolist()
        return [_answer(body, tokens[: body["max_tokens"]]) for body, tokens in zip(bodies, written, strict=True)]


def _answer(body: Body, tokens: list[int]) -> Body:
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(tokens)}
    return {"choices": [{"text": "", "tokens": tokens, "finish_reason": "length"}], "usage": usage}


def _handler(generator: Generator) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/health"
            self._send(200 if found else 404, {"status": "ok"} if found else {"error": "no such page"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(200, generator.ask(body))

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: a line for every request is no part of what is measured."""

        def _send(self, status: int, message: Body) -> None:
            data = json.dumps(message).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


class _Server(ThreadingHTTPServer):
    request_queue_size = 1024  # connections that may wait to be accepted
    daemon_threads = True


def main() -> None:
    """Serves until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-batch", type=int, default=1)
    options = parser.parse_args()
    generator = Generator(options.directory, options.max_batch)
    _Server(("127.0.0.1", options.port), _handler(generator)).serve_forever()


if __name__ == "__main__":
    main()
