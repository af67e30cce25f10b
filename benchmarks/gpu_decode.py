"""GPT-J-6B writing: one text against the memory's bound, many texts, and the engine that the server runs."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_operations import GB, random_weight, read_bandwidth
from gpu_rows import Rows, median_seconds, peak_bytes

from mesh_transformer.bench.work import weight_bytes
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.pages import page_size, table_width
from mesh_transformer.engine.programs import Programs, Uses
from mesh_transformer.engine.request import Request
from mesh_transformer.model.cache import empty_cache
from mesh_transformer.model.params import is_multiplied, map_table, shape
from mesh_transformer.model.policy import default_policy, for_inference
from mesh_transformer.sample.options import SamplingOptions
from mesh_transformer.shapes import Params

PROMPT, OUTPUT = 128, 128


class Writer:
    """A model of random weights and `batch` texts that are all at the same position; greedy."""

    def __init__(self, cfg: ModelConfig, quantize: str | None, batch: int) -> None:
        self.cfg = cfg
        self.params = random_params(cfg, quantize)
        policy = for_inference(default_policy("bfloat16"), self.params, one_device=True)
        self.programs = Programs(cfg, policy)
        self.use(batch)

    def use(self, batch: int) -> None:
        """As many texts, none of which has been read, with pages of their own."""
        self.cache: Any = None  # the old one does not stand beside the new
        self.batch = max(batch, self.programs.fewest_rows)
        self._size = page_size(self.cfg.n_ctx)
        n_each = -(-(PROMPT + OUTPUT) // self._size)
        self._table = np.zeros((self.batch, table_width(self.cfg.n_ctx)), np.int32)
        n_each = min(n_each, self._table.shape[1])
        self._table[:, :n_each] = 1 + np.arange(self.batch * n_each).reshape(self.batch, n_each)
        policy = self.programs.policy
        self.cache = empty_cache(
            self.cfg, 1 + self.batch * n_each, self._size, self.cfg.n_ctx, policy.jax_dtype, self.programs.layout
        )

    def read(self, n_tokens: int) -> jax.Array:
        """Reads so many random tokens of every text, a page at a time; logits [batch, vocab] after the last."""
        ids = np.random.default_rng(0).integers(0, self.cfg.n_vocab, (self.batch, n_tokens), np.int32)
        for at in range(0, n_tokens, self._size):
            chunk = ids[:, at : at + self._size]
            rows = np.concatenate([np.full((self.batch, 2), (at, chunk.shape[1]), np.int32), self._table], axis=1)
            logits, self.cache, _ = self.programs.prefill(self.params, self.cache, chunk, rows)
        return logits[:: self.programs.fewest_rows]

    def write(self, tokens: Any, position: int) -> jax.Array:
        """Adds a token to every text; the logits of the next."""
        start = np.full((self.batch, 1), position, np.int32)
        rows = np.concatenate([np.asarray(tokens, np.int32).reshape(-1, 1), start, self._table], axis=1)
        logits, self.cache = self.programs.decode(self.params, self.cache, rows)
        return logits

    def whole(self, n_prompt: int, n_output: int) -> float:
        """Seconds from the prompts to the last of `n_output` tokens, each chosen on the device and seen by the host."""
        began = time.perf_counter()
        logits = self.read(n_prompt)
        for i in range(n_output):
            tokens = np.asarray(_likeliest(logits))
            if i + 1 < n_output:
                logits = self.write(tokens, n_prompt + i)
        return time.perf_counter() - began


@jax.jit
def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def random_params(cfg: ModelConfig, quantize: str | None) -> Params:
    """Matrices in bfloat16 or narrower, everything else in bfloat16, made on the device."""

    def one(spec: Any) -> Any:
        narrow = quantize if quantize and is_multiplied(spec) else "bfloat16"
        return random_weight(spec, shape(spec, cfg), narrow)

    return jax.block_until_ready(map_table(one, cfg))


def model(rows: Rows) -> ModelConfig:
    """GPT-J-6B, or a tiny one."""
    return dataclasses.replace(preset("gpt-j-tiny"), n_layers=1) if rows.rehearse else preset("gpt-j-6b")


def lengths(rows: Rows) -> tuple[int, int]:
    """Tokens of a prompt and of what is written after it."""
    return (40, 4) if rows.rehearse else (PROMPT, OUTPUT)


def one_text(quantize: str | None, rows: Rows) -> None:
    """The time of a step, as a share of what reading the weights takes at the bandwidth measured in the same run."""
    cfg, (n_prompt, n_output) = model(rows), lengths(rows)
    found: dict[str, Any] = {}

    def ceiling() -> dict[str, Any]:
        found["bandwidth"] = read_bandwidth(1 << (16 if rows.rehearse else 32))
        return {"GB_per_s": found["bandwidth"] / GB}

    def opened() -> dict[str, Any]:
        found["writer"] = writer = Writer(cfg, quantize, 1)
        began = time.perf_counter()
        writer.whole(n_prompt, 2)
        return {"first_two_tokens_s": time.perf_counter() - began, "rows": writer.batch}

    def step(position: int) -> dict[str, Any]:
        writer: Writer = found["writer"]
        tokens = np.zeros(writer.batch, np.int32)
        seconds = median_seconds(lambda: writer.write(tokens, position))
        n_bytes = weight_bytes(cfg, quantize or "bfloat16")
        bound = n_bytes / found["bandwidth"]
        return {"bytes": n_bytes, "bound_s": bound, "share_of_bound": bound / seconds["seconds"], **seconds}

    def whole() -> dict[str, Any]:
        seconds = sorted(found["writer"].whole(n_prompt, n_output) for _ in range(3))[1]
        return {"seconds": seconds, "tokens_per_second": n_output / seconds, "peak_bytes": peak_bytes()}

    rows.row("bandwidth", ceiling)
    rows.row("first tokens, with compiling", opened)
    rows.row("a step after 128 tokens", functools.partial(step, min(n_prompt, 128)))
    rows.row("a step after 255 tokens", functools.partial(step, min(n_prompt + n_output - 1, 255)))
    rows.row(f"{n_prompt} tokens in, {n_output} out", whole)


def many_texts(rows: Rows) -> None:
    """Output tokens a second of so many texts together; reading and writing apart too."""
    cfg, (n_prompt, n_output) = model(rows), lengths(rows)
    made: list[Writer] = []

    def measure(batch: int) -> dict[str, Any]:
        if not made:
            made.append(Writer(cfg, None, batch))
        (writer,) = made
        writer.use(batch)
        writer.whole(n_prompt, 2)  # compiles
        seconds = sorted(writer.whole(n_prompt, n_output) for _ in range(3))[1]
        began = time.perf_counter()
        jax.block_until_ready(writer.read(n_prompt))
        read = time.perf_counter() - began
        tokens = np.zeros(writer.batch, np.int32)
        return {
            "tokens_per_second": batch * n_output / seconds,
            "seconds": seconds,
            "reading_s": read,
            "step": median_seconds(lambda: writer.write(tokens, n_prompt + n_output - 1)),
            "peak_bytes": peak_bytes(),
        }

    for batch in (2, 4) if rows.rehearse else (256, 128, 384, 64, 32):
        rows.row(f"{batch} texts", functools.partial(measure, batch))


def engine(rows: Rows) -> None:
    """As many requests as there are slots and half as many again, through the engine, tokens seen by the host."""
    cfg, (n_prompt, n_output) = model(rows), lengths(rows)
    made: list[tuple[Params, Programs]] = []

    def measure(slots: int) -> dict[str, Any]:
        if not made:
            params = random_params(cfg, None)
            made.append((params, Programs(cfg, for_inference(default_policy("bfloat16"), params, one_device=True))))
        ((params, programs),) = made
        n_pages = slots * (-(-(n_prompt + n_output) // page_size(cfg.n_ctx)))
        uses = Uses(shaping=False, filters=False, legacy=False, scores=False)
        run = Engine(programs, params, None, max_batch=slots, n_pages=n_pages, slide=False, uses=uses)
        options = SamplingOptions(max_tokens=n_output, temperature=0)
        ids = np.random.default_rng(0).integers(0, cfg.n_vocab, (slots + slots // 2, n_prompt))

        def serve(requests: np.ndarray) -> float:
            for prompt in requests:
                run.submit(Request(prompt=tuple(prompt.tolist()), options=options))
            began = time.perf_counter()
            while run.busy:
                run.step()
            return time.perf_counter() - began

        compiling = serve(ids)
        run.reset()  # so that no prompt is found in the cache
        seconds = serve(ids)
        return {
            "tokens_per_second": len(ids) * n_output / seconds,
            "seconds": seconds,
            "with_compiling_s": compiling,
            "requests": len(ids),
            "peak_bytes": peak_bytes(),
        }

    for slots in (2,) if rows.rehearse else (64, 128):
        rows.row(f"{slots} slots", functools.partial(measure, slots))
