"""CTranslate2 as a contender; the only module that imports it.

    python -m mesh_transformer.bench.ct2 HUGGINGFACE_DIRECTORY TARGET

converts, by CTranslate2's own converter. Tokens are named by their numbers: no tokenizer is needed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2

from mesh_transformer.bench.work import prompts, texts

# "int8_float32" is what "int8" means for float32 weights.
_SAME = {"int8_float32"}


def compute_types() -> list[str]:
    """What CTranslate2 computes in on this machine, each meaning once."""
    return sorted(ctranslate2.get_supported_compute_types("cpu") - _SAME)


class _Numbers:
    """A tokenizer whose tokens are their own ids."""

    bos_token = eos_token = unk_token = "0"

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        return {str(i): i for i in range(self._n_vocab)}


class _Converter(ctranslate2.converters.TransformersConverter):
    def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> _Numbers:
        config = json.loads((Path(model_name_or_path) / "config.json").read_text(encoding="utf-8"))
        return _Numbers(config["vocab_size"])


class _Generator:
    """One generator with as many threads as cores, weights rounded to the compute type as it loads them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._generator = ctranslate2.Generator(
            spec["directory"],
            device="cpu",
            compute_type=spec["precision"],
            inter_threads=1,
            intra_threads=spec["threads"],
        )

    def generate(self, rows: list[list[str]], n_tokens: int, callback: Any = None) -> list[list[int]]:
        """Greedy, prompts read at once, no end-of-text: the shortest length is the longest."""
        results = self._generator.generate_batch(
            rows,
            beam_size=1,
            sampling_topk=1,
            max_length=n_tokens,
            min_length=n_tokens,
            include_prompt_in_result=False,
            callback=callback,
        )
        return [result.sequences_ids[0] for result in results]

    def describe(self) -> dict[str, Any]:
        """Versions and settings."""
        return {
            "ctranslate2": ctranslate2.__version__,
            "settings": f"compute type {self._generator.compute_type}, inter_threads 1, intra_threads = cores, "
            "prompt read at once (include_prompt_in_result false)",
        }


class DecodeContender(_Generator):
    """Greedy continuation of a batch of prompts."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        rows = prompts(spec["n_vocab"], spec["batch"], spec["prompt"])
        self._rows, self._n_tokens = [[str(t) for t in row] for row in rows], spec["tokens"]

    def step(self) -> dict[str, Any]:
        begun = time.perf_counter()
        self.generate(self._rows, 1)
        first = time.perf_counter()
        tokens = self.generate(self._rows, self._n_tokens)
        return {"first": first - begun, "whole": time.perf_counter() - first, "tokens": tokens}


class ServeContender(_Generator):
    """Texts of mixed lengths in batches sorted by the length of the prompt, as `max_batch_size` sorts them.

    A callback ends each text where its length is reached; CTranslate2 then leaves it out of the batch.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self._spec, self._turn = spec, 0

    def step(self) -> dict[str, Any]:
        wanted = sorted(texts(self._spec, self._turn), key=lambda text: len(text.prompt))
        self._turn += 1
        size = self._spec["max_batch"]
        begun = time.perf_counter()
        firsts: list[float] = []
        written = 0
        for i in range(0, len(wanted), size):
            group = wanted[i : i + size]

            counts = [0] * len(group)

            def ends(result: Any, group: Any = group, counts: Any = counts) -> bool:
                row = result.batch_id
                if counts[row] == 0:
                    firsts.append(time.perf_counter() - begun)
                counts[row] += 1
                return bool(counts[row] >= group[row].n_tokens)

            rows = [[str(t) for t in text.prompt] for text in group]
            # Steps are counted from the end of the shortest prompt of a batch.
            longer = max(map(len, rows)) - min(map(len, rows))
            made = self.generate(rows, max(text.n_tokens for text in group) + longer, ends)
            written += sum(min(len(ids), text.n_tokens) for ids, text in zip(made, group, strict=True))
        return {"whole": time.perf_counter() - begun, "written": written, "firsts": firsts}


def make(spec: dict[str, Any]) -> DecodeContender | ServeContender:
    """The contender that `spec["kind"]` names."""
    return ServeContender(spec) if spec["kind"] == "serve" else DecodeContender(spec)


if __name__ == "__main__":
    _Converter(sys.argv[1]).convert(sys.argv[2])
