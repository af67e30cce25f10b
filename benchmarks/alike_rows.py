"""What it takes for a text's logits to be the same bits in any company on a CPU, and what it costs.

    python benchmarks/alike_rows.py [--preset gpt-j-77m] [--rounds 5] [--tokens 64] [--output FILE]

First, products [rows, k] x [k, m] as XLA compiles them: which numbers of rows up to 40 round a row otherwise than
most do, plainly and with the options of `compat.alike_rows`. The lines that hold at the chosen number of rows are what
the engine relies on. Then the speed: greedy tokens a second of 1, 4 and 8 texts with programs that keep rows alike (the
server's) and without (`Model.generate`'s), in turn, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer import compat

LARGEST = 40
# Widths of the presets' products and some that are no powers of two: (k, m).
SHAPES = [(64, 64), (64, 258), (96, 384), (128, 512), (256, 1024), (320, 1280), (512, 512), (512, 2048), (2048, 512)]
SHAPES += [(768, 3072), (1024, 4096), (2048, 8192), (8192, 2048)]


def odd_rows(k: int, m: int, dtype: str, options: dict[str, str] | None) -> list[int]:
    """Numbers of rows whose products round the first row otherwise than the commonest ones do."""
    import jax
    import jax.numpy as jnp

    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(LARGEST, 1, k)), dtype)
    w = jnp.asarray(random.normal(size=(k, m)), dtype)

    def product(x: Any, w: Any) -> Any:
        return jnp.einsum("bsk,km->bsm", x, w, preferred_element_type=jnp.float32)

    compiled = jax.jit(product, compiler_options=options)
    seen = {n: np.asarray(compiled(x[:n], w))[0].tobytes() for n in range(1, LARGEST + 1)}
    commonest = Counter(seen.values()).most_common(1)[0][0]
    return [n for n, bits in seen.items() if bits != commonest]


def speeds(preset: str, dtype: str, rounds: int, tokens: int) -> dict[str, dict[str, float]]:
    """Tokens a second of texts together, with rows alike and without, by the number of texts."""
    import jax

    from mesh_transformer.config.presets import PRESETS
    from mesh_transformer.engine.generator import Generator
    from mesh_transformer.engine.programs import Programs
    from mesh_transformer.model.params import init_params
    from mesh_transformer.model.policy import ComputePolicy
    from mesh_transformer.sample.options import SamplingOptions

    cfg = PRESETS[preset]
    params = init_params(cfg, jax.random.key(0), dtype)
    policy = ComputePolicy(dtype=dtype)
    generators = {}
    for name in ("alike", "free"):
        generators[name] = Generator(cfg, params, policy, None)
        generators[name].programs = Programs(cfg, policy, alike=name == "alike")
    options = SamplingOptions(temperature=0.0, max_tokens=tokens)
    found: dict[str, dict[str, float]] = {}
    for n in (1, 4, 8):
        prompts = np.random.default_rng(n).integers(0, cfg.n_vocab, (n, 32)).tolist()
        rates: dict[str, list[float]] = {name: [] for name in generators}
        for turn in range(rounds + 1):
            for name, generator in generators.items():
                begun = time.perf_counter()
                generator.generate(prompts, [options] * n)
                if turn:  # the first compiles
                    rates[name].append(n * tokens / (time.perf_counter() - begun))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        found[f"{n} texts"] = medians | {"ratio": medians["alike"] / medians["free"]}
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt-j-77m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    compat.prepare_process()
    result: dict[str, Any] = {"command": " ".join(sys.argv), "versions": compat.version_report().splitlines()}
    for dtype in ("float32", "bfloat16"):
        options, _, _ = compat.alike_rows(dtype)
        rows: list[dict[str, Any]] = []
        for k, m in SHAPES:
            odd = {"plain": odd_rows(k, m, dtype, None), "alike": odd_rows(k, m, dtype, options)}
            rows.append({"k": k, "m": m} | odd)
            print(f"{dtype} {k} x {m}: odd rows {odd['plain']}, with options {odd['alike']}", flush=True)
        rates = speeds(arguments.preset, dtype, arguments.rounds, arguments.tokens)
        for n, rate in rates.items():
            print(
                f"{dtype} {arguments.preset}, {n}: {rate['alike']:.1f} alike, {rate['free']:.1f} free: "
                f"{rate['ratio']:.2f}",
                flush=True,
            )
        result[dtype] = {"products": rows, "tokens_per_second": rates}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
