"""What narrower weights cost in quality: one text scored in float32, in bfloat16 and with int8 and int4 weights.

    python benchmarks/quantize_quality.py MODEL DATA [--rows N] [--output FILE]

DATA is a text file, or records as `prepare` makes them (an index, a .tfrecords file, a glob, a directory). It is cut
into rows of the model's context; every token of a row but its first is predicted from those before it in the row.
Prints a table: nats a token, their exponential (perplexity), and beside float32 the share of positions with the same
likeliest token, the mean Kullback-Leibler divergence in nats, and the mean and largest difference of logits; the JSON
has bits a byte too, of the text that the tokens spell (end-of-text spells nothing). "bfloat16" rounds the factors of
products too, not the weights alone; int4 is computed in float32. All the models are in memory at once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer import compat

BATCH = 16  # rows at a time
HOW: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8, float32 arithmetic": {"dtype": "float32", "quantize": "int8"},
    "int8, bfloat16 arithmetic": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "float32", "quantize": "int4"},
    "int4-128": {"dtype": "float32", "quantize": "int4-128"},
}


def rows_of(data: str, model: Any) -> np.ndarray:
    """Token ids [rows, at most context + 1]; what is left over at the end of a text is not used."""
    from mesh_transformer.data.source import is_record_file, open_source

    cfg = model.config
    if Path(data).is_file() and not is_record_file(data) and not data.endswith(".index"):
        ids = np.asarray(model.encode(Path(data).read_text(encoding="utf-8")))
        width = min(cfg.n_ctx + 1, len(ids))
        return ids[: len(ids) // width * width].reshape(-1, width)
    source = open_source(data, sequence_length=cfg.n_ctx, n_vocab=cfg.n_vocab)
    return np.stack([source[i] for i in range(len(source))])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def measure(models: dict[str, Any], rows: np.ndarray) -> dict[str, dict[str, float]]:
    """The sums of everything that the table divides by the number of tokens, and the largest difference."""
    sums = {name: dict.fromkeys(("nats", "same", "divergence", "difference", "largest"), 0.0) for name in models}
    for batch in _batches(rows):
        targets = batch[:, 1:, None]
        logits = {name: model.logits(batch[:, :-1]) for name, model in models.items()}
        plain = log_softmax(logits["float32"])
        for name, found in logits.items():
            scores, into = log_softmax(found), sums[name]
            apart = np.abs(found - logits["float32"])
            into["nats"] -= float(np.take_along_axis(scores, targets, -1).sum())
            into["same"] += float((found.argmax(-1) == logits["float32"].argmax(-1)).sum())
            into["divergence"] += float((np.exp(plain) * (plain - scores)).sum())
            into["difference"] += float(apart.mean(-1).sum())
            into["largest"] = max(into["largest"], float(apart.max()))
    return sums


def _batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), BATCH):
        print(f"\r{start:,} of {len(rows):,} rows", end="", file=sys.stderr, flush=True)
        yield rows[start : start + BATCH]
    print(file=sys.stderr)


def figures(models: dict[str, Any], rows: np.ndarray) -> tuple[int, dict[str, dict[str, float]]]:
    """(tokens predicted, what the table shows of each model)."""
    import jax

    tokens = rows[:, 1:].size
    tokenizer = models["float32"].tokenizer
    spelled = np.asarray([len(tokenizer.token_bytes(i)) for i in range(models["float32"].config.n_vocab)])
    if tokenizer.end_of_text is not None:
        spelled[tokenizer.end_of_text] = 0
    n_bytes = int(spelled[rows[:, 1:]].sum())
    sums = measure(models, rows)
    table = {}
    for name, found in sums.items():
        nats = found["nats"] / tokens
        table[name] = {
            "nats_per_token": nats,
            "bits_per_byte": found["nats"] / n_bytes / math.log(2),
            "more_nats_per_token": nats - sums["float32"]["nats"] / tokens,
            "same_likeliest_token": found["same"] / tokens,
            "mean_divergence_nats": found["divergence"] / tokens,
            "mean_logit_difference": found["difference"] / tokens,
            "largest_logit_difference": found["largest"],
            "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(models[name].params)),
        }
    return tokens, table


def show(table: dict[str, dict[str, float]]) -> None:
    """The table in Markdown."""
    print("| weights | MB | nats a token | more | perplexity | same likeliest token | divergence, nats |", end="")
    print(" logits differ: mean | largest |")
    print("| --- " * 9 + "|")
    for name, found in table.items():
        print(
            f"| {name} | {found['parameter_bytes'] / 1e6:.1f} | {found['nats_per_token']:.4f} "
            f"| {found['more_nats_per_token']:+.5f} | {math.exp(found['nats_per_token']):.2f} "
            f"| {found['same_likeliest_token']:.2%} | {found['mean_divergence_nats']:.1e} "
            f"| {found['mean_logit_difference']:.4f} | {found['largest_logit_difference']:.3f} |"
        )


def main() -> None:
    """Scores, prints the table, and writes the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, help="The first rows alone.")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    compat.prepare_process()
    import jax

    from mesh_transformer.api import load
    from mesh_transformer.config.errors import UserError

    try:
        models = {name: load(options.model, **how) for name, how in HOW.items()}
        if models["float32"].tokenizer is None or not models["float32"].tokenizer.byte_level:
            parser.error("bits a byte need a tokenizer whose tokens stand for bytes, and this model has none")
        rows = rows_of(options.data, models["float32"])[: options.rows]
    except UserError as error:
        parser.error(str(error))
    tokens, table = figures(models, rows)
    show(table)
    print(f"{tokens:,} tokens in {len(rows)} rows; jax {jax.__version__}, {jax.default_backend()}")
    if options.output:
        facts = {
            "model": models["float32"].config.to_dict(),
            "step": models["float32"].source.step,
            "data": Path(options.data).name,
            "rows": len(rows),
            "tokens": tokens,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": sys.version.split()[0],
            "device": jax.devices()[0].device_kind,
        }
        options.output.write_text(json.dumps({**facts, "measured": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
