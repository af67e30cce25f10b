"""Hugging Face's `generate` on PyTorch as a contender, eager or compiled, whichever is faster here."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from mesh_transformer.bench.rounds import cpp_compiler
from mesh_transformer.bench.work import prompts, texts

_EAGER = "eager mode, growing cache"
_COMPILED = "static cache, torch.compile"
_TRIALS = 2  # timed generations of each way, of which the fastest counts


class _Generator:
    """float32, bfloat16, or "int8": PyTorch's dynamic quantisation of every linear layer, activations too."""

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(spec["threads"])
        precision = spec["precision"]
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._model = transformers.AutoModelForCausalLM.from_pretrained(spec["directory"], dtype=dtype).eval()
        # Every completion has the length asked for, on all sides.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self._how: Mapping[str, Any] = {}
        self._said = f"{precision}, {_EAGER}"
        if precision == "int8":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.ao.quantization.quantize_dynamic(self._model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
            self._said = f"int8 by quantize_dynamic ({torch.backends.quantized.engine}), {_EAGER}"

    @torch.inference_mode()
    def generate(self, rows: list[list[int]], n_tokens: int) -> list[list[int]]:
        """Greedy; shorter prompts are padded on the left."""
        longest = max(map(len, rows))
        padding = [longest - len(row) for row in rows]
        ids = torch.tensor([[0] * n + row for n, row in zip(padding, rows, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        written = self._model.generate(
            ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, use_cache=True, **self._how
        )
        return written[:, longest:].tolist()

    def describe(self) -> dict[str, Any]:
        """Versions and settings."""
        attention = getattr(self._model.config, "_attn_implementation", "?")
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "settings": f"generate, {self._said}, attention {attention}",
        }


class DecodeContender(_Generator):
    """Greedy continuation of a batch of prompts, in the way that is faster when both are tried in the first turn.

    Compiling is done before; the trial is not, because other contenders may still be starting then.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self._rows = prompts(spec["n_vocab"], spec["batch"], spec["prompt"])
        self._n_tokens, self._precision = spec["tokens"], spec["precision"]
        self._ways: dict[str, Mapping[str, Any]] = {_EAGER: {}}
        if self._precision == "int8":
            pass  # its products are not compiled
        elif cpp_compiler() is None:
            self._said += "; torch.compile was not tried, for there is no C++ compiler"
        else:
            compile_: Any = transformers.CompileConfig()
            compile_._compile_all_devices = True  # without it `generate` compiles on accelerators only
            self._ways[_COMPILED] = {"cache_implementation": "static", "compile_config": compile_}
        for how in self._ways.values():
            self._how = how
            self.generate(self._rows, self._n_tokens)
            self.generate(self._rows, 1)
        self._how = self._ways[_EAGER]

    def step(self) -> dict[str, Any]:
        if len(self._ways) > 1:
            self._choose()
        begun = time.perf_counter()
        self.generate(self._rows, 1)
        first = time.perf_counter()
        tokens = self.generate(self._rows, self._n_tokens)
        return {"first": first - begun, "whole": time.perf_counter() - first, "tokens": tokens}

    def _choose(self) -> None:
        seconds = {}
        for name, how in self._ways.items():
            self._how, found = how, []
            for _ in range(_TRIALS):
                begun = time.perf_counter()
                self.generate(self._rows, self._n_tokens)
                found.append(time.perf_counter() - begun)
            seconds[name] = min(found)
        best = min(seconds, key=lambda name: seconds[name])
        self._how, self._ways = self._ways[best], {best: self._ways[best]}
        tried = ", ".join(f"{name} {s:.3g} s" for name, s in seconds.items())
        self._said = f"{self._precision}, {best} (tried: {tried})"


class ServeContender(_Generator):
    """Texts of mixed lengths in batches; sorted by how much they ask for, so that little is written in vain."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self._spec, self._turn = spec, 0
        self._said += ", batches sorted by the number of tokens asked for"

    def step(self) -> dict[str, Any]:
        wanted = sorted(texts(self._spec, self._turn), key=lambda text: (text.n_tokens, len(text.prompt)))
        self._turn += 1
        size = self._spec["max_batch"]
        begun = time.perf_counter()
        firsts: list[float] = []
        written = 0
        for i in range(0, len(wanted), size):
            group = wanted[i : i + size]
            made = self.generate([text.prompt for text in group], max(text.n_tokens for text in group))
            firsts += [time.perf_counter() - begun] * len(group)
            written += sum(min(len(ids), text.n_tokens) for ids, text in zip(made, group, strict=True))
        return {"whole": time.perf_counter() - begun, "written": written, "firsts": firsts}


def make(spec: dict[str, Any]) -> DecodeContender | ServeContender:
    """The contender that `spec["kind"]` names."""
    return ServeContender(spec) if spec["kind"] == "serve" else DecodeContender(spec)
