"""The parts of benchmarks/gpu.py by name, in the order in which they matter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import gpu_decode
import gpu_operations
import gpu_start
import gpu_train
from gpu_rows import Rows


@dataclasses.dataclass(frozen=True)
class Part:
    """What a part measures, in a few words, and the function that does."""

    says: str
    run: Callable[[Rows], None]


PARTS: dict[str, Part] = {
    "bandwidth": Part("memory read and copied, the ceiling of decoding", gpu_operations.bandwidth),
    "matmul": Part("GPT-J-6B's own products in bfloat16, the ceiling of training", gpu_operations.matmul),
    "attention": Part("cuDNN against the plain form: speed, and error against float32", gpu_operations.attention),
    "rows": Part("few rows times stacked weights in bfloat16, int8 and int4", gpu_operations.few_rows),
    **{
        f"train-{name}": Part(f"a step of GPT-J-6B: {variant.says}", functools.partial(gpu_train.train, variant))
        for name, variant in gpu_train.VARIANTS.items()
    },
    "train-ablation": Part("four layers of GPT-J-6B, one choice changed at a time, in turns", gpu_train.ablation),
    "decode-bfloat16": Part("GPT-J-6B, one text", functools.partial(gpu_decode.one_text, None)),
    "decode-int8": Part("the same in 8 bits", functools.partial(gpu_decode.one_text, "int8")),
    "decode-int4": Part("the same in 4 bits", functools.partial(gpu_decode.one_text, "int4")),
    "decode-batch": Part("128 tokens in, 128 out, many texts, programs called directly", gpu_decode.many_texts),
    "decode-engine": Part("the same as the server runs it: continuous batching", gpu_decode.engine),
    "startup": Part("import, compile, compile again from the cache", gpu_start.startup),
}
