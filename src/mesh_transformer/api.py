"""The Python surface: `load` opens a model, `Model` computes with it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.checkpoint.convert import TARGETS, Conversion, Progress, convert
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.quantized import assemble_as
from mesh_transformer.checkpoint.weights import TOKENIZER_FILE, InMemory, Weights, stored_bytes
from mesh_transformer.compat import give_memory_back
from mesh_transformer.config.dtypes import dtype_name
from mesh_transformer.config.errors import DataError, UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import MeshConfig, mesh_from_text
from mesh_transformer.data.chat import encode_chat
from mesh_transformer.data.choice import check_fits, default_tokenizer
from mesh_transformer.data.tokenizer import Tokenizer, load_tokenizer
from mesh_transformer.engine.engine import Engine
from mesh_transformer.engine.generator import Generator
from mesh_transformer.engine.programs import Programs
from mesh_transformer.engine.scoring import log_likelihood
from mesh_transformer.engine.service import EngineService
from mesh_transformer.model.decoder import features, forward
from mesh_transformer.model.params import map_table
from mesh_transformer.model.policy import ComputePolicy, default_policy, for_inference
from mesh_transformer.model.quantize import check_layout, check_quantize, is_quantized, map_arrays
from mesh_transformer.model.tied import with_turned
from mesh_transformer.sample.options import Completion, Piece, SamplingOptions
from mesh_transformer.shapes import Params
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout, inference_layout, place_array
from mesh_transformer.sharding.rules import Axes

Prompt = str | Sequence[int]
SENTENCEPIECE = "tokenizer.model"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from. format: as `checkpoint.weights.Format` has it; step: None if not recorded."""

    path: Path
    format: str
    step: int | None


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    step: int | None = None,
    config: str | None = None,
    mesh: MeshConfig | str | None = None,
    together: bool = False,
    quantize: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Model:
    """Opens a model: a run directory, a native checkpoint, a Hugging Face GPT-J directory, the original's, or a Hub id.

    Args:
        dtype: what weights are converted to and products computed in; by default weights stay as stored and
            arithmetic is float32 on CPU, bfloat16 on accelerators.
        tokenizer: "gpt2", "bytes" or a tokenizer.json; by default the model's own, else gpt2 or bytes by the size of
            the vocabulary.
        step: which checkpoint of several; by default the newest intact one.
        config: the configuration of an original checkpoint that has none beside it.
        mesh: devices to lay the model over, as "data=2,tensor=4": rows of a batch over data, heads, feed-forward and
            vocabulary over tensor; by default the first device alone.
        together: lay the model over the devices of all processes that `jax.distributed` knows, rows over all of them
            unless `mesh` says otherwise. All must call this, and compute the same with it.
        quantize: "int8" holds the matrices of products in 8 bits with a scale for every output channel, "int4" and
            "int4-128" in 4 with a scale for every 32 or 128 weights; `dtype` then is that of everything else and of the
            arithmetic. Such a model computes and writes; it cannot be saved. A model that was converted so needs no
            word of it.
        progress: called with a stage, the bytes done and those of the whole stage.

    Raises:
        CheckpointError: there is no model, or it is damaged; the message names the file.
        ConfigError: `config` cannot be used, or `mesh` does not divide the model or the devices.
        DataError: the tokenizer cannot be read or has more ids than the model.
        UserError: `quantize` is not known, or the model is stored quantised in another way.
    """
    dtype = dtype_name(dtype) if dtype is not None else None
    check_quantize(quantize)
    weights = open_weights(path, step=step, config=config, report=functools.partial(_log.warning, "%s"))
    chosen = tokenizer_of(weights, tokenizer)
    source = Source(weights.where, weights.format, weights.step)
    layout = ONE_DEVICE_LAYOUT
    if mesh is not None or together:
        asked = mesh_from_text(mesh) if isinstance(mesh, str) else mesh or MeshConfig()
        layout = inference_layout(asked, weights.cfg, together=together)
    params = _on_devices(weights, dtype, quantize, layout, progress)
    return Model(weights.cfg, params, chosen, default_policy(dtype), source, layout)


def tokenizer_of(weights: Weights, given: str | None = None) -> Tokenizer | None:
    """The tokenizer `given`, else the one stored with the model, else gpt2 or bytes by the size of the vocabulary.

    Raises:
        DataError: it cannot be read or has more ids than the model.
    """
    file = weights.tokenizer_file()
    if given is not None:
        chosen: Tokenizer | None = load_tokenizer(given)
    elif file is not None:
        chosen = load_tokenizer(file)
    elif (weights.where / SENTENCEPIECE).is_file():
        raise DataError(
            f"{weights.where / SENTENCEPIECE}: is not read here, and there is no {TOKENIZER_FILE} beside it\n"
            "let transformers write one (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)), or give --tokenizer"
        )
    else:
        chosen = default_tokenizer(weights.cfg.n_vocab)
    if chosen is not None:
        check_fits(chosen, weights.cfg.n_vocab)
    return chosen


def _on_devices(
    weights: Weights, dtype: str | None, quantize: str | None, layout: Layout, progress: Progress
) -> Params:
    """The parameters, piece by piece; on one CPU device the arrays read into are those computed with."""
    done, total = 0, stored_bytes(weights)

    def count(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress("loading", done, total)

    def place(a: np.ndarray, axes: Axes) -> jax.Array:
        sharding = layout.sharding(layout.rules.param(axes))
        if not sharding.is_fully_addressable:
            return place_array(a, sharding)
        return jax.device_put(a, sharding, may_alias=True)

    params = assemble_as(weights, quantize, jnp.dtype(dtype) if dtype else None, count)
    check_layout(params, weights.cfg, layout)
    placed = map_table(functools.partial(map_arrays, place), weights.cfg, params)
    del params
    give_memory_back()  # what reading ahead took
    return placed


class Model:
    """A model in memory: `config`, `tokenizer` (None where texts cannot be read), `params`, `source`."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None,
        policy: ComputePolicy | None = None,
        source: Source | None = None,
        layout: Layout = ONE_DEVICE_LAYOUT,
    ) -> None:
        self.config, self.params, self.tokenizer, self.layout = config, params, tokenizer, layout
        self.policy = for_inference(policy or default_policy(), params, one_device=layout.mesh is None)
        self.params = params = with_turned(params, config, self.policy, one_device=layout.mesh is None)
        self.source = source
        how: dict[str, Any] = {"cfg": config, "policy": self.policy, "rules": layout.rules}
        self._forward = jax.jit(functools.partial(forward, **how))
        self._features = jax.jit(functools.partial(features, **how), static_argnames="layer")
        self._generator = Generator(config, params, self.policy, tokenizer, layout)

    def __repr__(self) -> str:
        c = self.config
        return f"Model(n_layers={c.n_layers}, d_model={c.d_model}, n_vocab={c.n_vocab}, source={self.source})"

    def logits(self, tokens: Any) -> np.ndarray:
        """Logits of the token after every position: int [batch, length] -> float32 [batch, length, vocab].

        Pad shorter rows on the right with any id of the vocabulary: padding changes nothing at real positions.

        Raises:
            UserError: another shape or dtype, an id outside the vocabulary, or rows longer than the context.
        """
        rows, wanted = self._rows(tokens)
        with self.layout.using():
            return np.asarray(self._forward(self.params, self.layout.place_rows(rows)))[wanted]

    def features(self, tokens: Any, layer: int = -1) -> np.ndarray:
        """Hidden states for downstream tasks: int [batch, length] -> float32 [batch, length, d_model].

        Args:
            layer: 0 is the embedding, n the stream after n blocks, n_layers (or -1) that after the final norm.

        Raises:
            UserError: as `logits`, or no such layer.
        """
        n = self.config.n_layers
        if not -n - 1 <= layer <= n:
            raise UserError(f"layer = {layer} is out of range: 0 (the embedding) to {n} (the final norm), or -1 down")
        rows, wanted = self._rows(tokens)
        with self.layout.using():
            return np.asarray(self._features(self.params, self.layout.place_rows(rows), layer=layer))[wanted]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        samples: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> list[Completion]:
        """Completions of prompts (strings, or lists of token ids), `samples` of each, prompt by prompt.

        Args:
            seed: the completions are a function of it, of the prompt and of the sample's number, not of the batch.
            options: the other fields of `SamplingOptions`: max_tokens, temperature, top_p, top_k, min_p, min_tokens,
                ignore_eos, sampler.

        Raises:
            UserError: an option is out of range, a prompt is longer than the context, or text is given to a model
                without a tokenizer.
        """
        ids, each = self._requests(prompts, samples, SamplingOptions(seed=seed, stop=tuple(stop), **options))
        return self._generator.generate(ids, each)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Answers to messages, `{"role": "user", "content": "Hello"}` and the like, by the model's own chat template.

        Args:
            tools: what the template is to say may be called, as JSON schemas; an answer is text whatever it calls.
            options: as `generate`.

        Raises:
            UserError: as `generate`; or the model has no chat template, or that refuses the messages.
        """
        return self.generate([encode_chat(self._tokenizer_or_raise(), messages, tools=tools)], **options)

    def stream(self, prompts: Prompt | Sequence[Prompt], options: SamplingOptions, samples: int = 1) -> Iterator[Piece]:
        """As `generate`, in pieces as the text comes."""
        return self._generator.stream(*self._requests(prompts, samples, options))

    def service(
        self, *, max_batch: int = 16, max_queue: int = 64, when_full: Literal["slide", "stop"] = "slide"
    ) -> EngineService:
        """The model behind a thread that serves many requests at once; not started.

        Args:
            max_batch: texts under way at one time; the cache is allocated for so many of the whole context.
            max_queue: texts that may wait beyond them.
            when_full: what a text does that outgrows the context: slide past its oldest tokens, or stop.
        """
        slide = when_full == "slide"
        programs = Programs(self.config, self.policy, self.layout)
        engine = Engine(programs, self.params, self.tokenizer, max_batch=max_batch, slide=slide)
        return EngineService(engine, max_queue=max_queue)

    def log_likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """log p(continuation | context) in nats, and whether greedy decoding would write exactly it.

        The whole is tokenized at once and cut where the context's tokens end; spaces that end the context go to the
        continuation, where tokenizers put them. An empty context is end-of-text.

        Raises:
            UserError: nothing to score, or more than the context holds.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        whole, head = self.encode(stripped + continuation), self.encode(stripped)
        if not head:
            if self._tokenizer_or_raise().start is None:
                raise UserError("the context is empty and this model has no end-of-text token to stand for it")
            return self._score([self._tokenizer_or_raise().start], whole)
        return self._score(whole[: len(head)], whole[len(head) :])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with what the tokenizer puts before every one (Llama's `<s>`).

        Raises:
            UserError: the model has no tokenizer.
        """
        return self._tokenizer_or_raise().encode_prompt(text)

    def save(self, path: str | os.PathLike[str], format: str = "native") -> None:
        """Writes the model, self-contained, to a directory that must not exist.

        Args:
            format: "native", "huggingface", "legacy" (the original's shards) or "legacy-v2".

        Raises:
            CheckpointError: the directory exists or cannot be written.
            UserError: no such format, or it cannot hold this architecture; or this model is quantised.
        """
        if is_quantized(self.params):
            raise UserError(
                "this model's weights are rounded to 8 or 4 bits, and a copy of them would pass for the original\n"
                "load the original without quantize= to save it; `convert --quantize` writes a rounded one"
            )
        step = self.source.step if self.source else None
        convert(
            InMemory(self.config, self.params, step=step), Path(path), conversion(format, self.tokenizer), certify=False
        )

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], samples: int, options: SamplingOptions
    ) -> tuple[list[list[int]], list[SamplingOptions]]:
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer)):
            return self._requests([cast(Prompt, prompts)], samples, options)
        if samples < 1:
            raise UserError(f"samples = {samples} must be at least 1")
        several = cast(Sequence[Prompt], prompts)
        ids = [self.encode(p) if isinstance(p, str) else [int(t) for t in p] for p in several]
        requests = [(p, dataclasses.replace(options, sample=i)) for p in ids for i in range(samples)]
        return [p for p, _ in requests], [o for _, o in requests]

    def _score(self, context: Sequence[Any], continuation: Sequence[int]) -> tuple[float, bool]:
        return log_likelihood(self.params, self.config, self.policy, context, continuation, self.layout)

    def _tokenizer_or_raise(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                f"this model has no tokenizer (n_vocab = {self.config.n_vocab}); give one, or token ids instead of text"
            )
        return self.tokenizer

    def _rows(self, tokens: Any) -> tuple[np.ndarray, tuple[slice, slice]]:
        """Checked, and padded to a power of two so that few shapes are compiled; and where the given ones are."""
        try:
            rows = np.asarray(tokens)
        except ValueError as error:  # NumPy's word for lists of different lengths
            raise UserError("the rows have different lengths; pad the shorter ones on the right with any id") from error
        if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer) or 0 in rows.shape:
            raise UserError(f"tokens are {rows.dtype} {rows.shape}; expected whole numbers [batch, length]")
        if rows.shape[1] > self.config.n_ctx:
            raise UserError(f"rows have {rows.shape[1]} tokens but the model's context holds {self.config.n_ctx}")
        outside = rows[(rows < 0) | (rows >= self.config.n_vocab)]
        if outside.size:
            raise UserError(f"token id {outside[0]} is outside the model's vocabulary of {self.config.n_vocab} ids")
        width = min(self.config.n_ctx, 1 << (rows.shape[1] - 1).bit_length())
        padded = np.zeros((self.layout.padded_rows(rows.shape[0]), width), np.int32)
        given = slice(rows.shape[0]), slice(rows.shape[1])
        padded[given] = rows
        return padded, given


def conversion(
    to: str,
    tokenizer: Tokenizer | None,
    *,
    dtype: str | None = None,
    shards: int = 0,
    with_optimizer: bool = False,
    quantize: str | None = None,
) -> Conversion:
    """What `checkpoint.convert.convert` should make, the tokenizer's files and its end-of-text among it.

    Raises:
        UserError: no such format.
    """
    if to not in TARGETS:
        raise UserError(f"format = {to!r} is not known; expected one of {', '.join(TARGETS)}")
    return Conversion(
        to=cast(Any, to),
        quantize=quantize,
        dtype=jnp.dtype(dtype) if dtype else None,
        n_shards=shards,
        with_optimizer=with_optimizer,
        tokenizer=tokenizer.files() if tokenizer else {},
        end_of_text=tokenizer.end_of_text if tokenizer else None,
    )
