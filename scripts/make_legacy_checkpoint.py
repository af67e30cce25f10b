"""Writes a checkpoint of mesh-transformer-jax with random weights: GPT-J-6B's shapes, 12 GB, unless told otherwise.

    python scripts/make_legacy_checkpoint.py /data/gptj/step_383500     # a bare step directory, as GPT-J was released
    python scripts/make_legacy_checkpoint.py /data/gptj                 # a model directory: meta.json and step_383500
    python scripts/make_legacy_checkpoint.py /tmp/small --layers 2 --d-model 64 --heads 8 --vocab 264 --seq 32

For measuring how long reading takes and how much memory, without the released file. Slim (no optimizer state) and
bfloat16, with layernorm and rotary; format: docs/formats.md, section 1. config.json is written beside step_N, and never
overwritten.

Values are random bits of which the exponent is mostly set, so that they cost little more than writing them: weights and
biases have both signs, magnitudes from 2^-7 to 2^-5 and a standard deviation of 0.019; the layernorms' scales lie in
[1, 1.25). A forward pass gives finite logits. As in files of the original, each shard has its own part of the summed
biases, and shards but the first hold untrained layernorms of ones and zeros.

Needs NumPy only, and about 50 MB of memory. Exit status 1 if the target exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

N_FILES = 16
PREFIX = "causal_transformer_shard/~/"
CHUNK = 1 << 20  # bytes made and written at a time
# Bits that stay random, and bits that are set, of a bfloat16: sign 1, exponent 8, mantissa 7.
SMALL = (0x80FF, 0x3C00)  # sign, lowest bit of the exponent and mantissa: +-[2^-7, 2^-5)
NEAR_ONE = (0x001F, 0x3F80)  # [1, 1.25)
ONES, ZEROS = (0x0000, 0x3F80), (0x0000, 0x0000)
Bits = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The architecture, under the original's names, and the number of shards."""

    layers: int
    d_model: int
    n_heads: int
    n_vocab: int
    seq: int
    pe_rotary_dims: int
    shards: int


def leaves(cfg: Shape, shard: int) -> list[tuple[str, tuple[int, ...], Bits]]:
    """Name, shape and kind of values of each leaf of a shard but the last (the step), in the order of the files."""
    d, part, ids = cfg.d_model, cfg.d_model // cfg.shards, cfg.n_vocab // cfg.shards
    scale, offset = (NEAR_ONE, SMALL) if shard == 0 else (ONES, ZEROS)
    # (module, parameter) -> shape and values. Modules and parameters are sorted as strings: layer_10 before layer_2.
    found: dict[tuple[str, str], tuple[tuple[int, ...], Bits]] = {
        ("embedding_shard/~/linear", "b"): ((d,), SMALL),
        ("embedding_shard/~/linear", "w"): ((ids, d), SMALL),
        ("projection_shard/~/linear", "b"): ((ids,), SMALL),
        ("projection_shard/~/linear", "w"): ((d, ids), SMALL),
        ("projection_shard/~/replicated_layer_norm", "offset"): ((d,), offset),
        ("projection_shard/~/replicated_layer_norm", "scale"): ((d,), scale),
    }
    for i in range(cfg.layers):
        module = f"layer_{i}/~/"
        found |= {
            (f"{module}linear", "w"): ((d, part), SMALL),  # q
            (f"{module}linear_1", "w"): ((d, part), SMALL),  # v
            (f"{module}linear_2", "w"): ((d, part), SMALL),  # k
            (f"{module}linear_3", "w"): ((part, d), SMALL),
            (f"{module}linear_4", "b"): ((4 * part,), SMALL),
            (f"{module}linear_4", "w"): ((d, 4 * part), SMALL),
            (f"{module}linear_5", "b"): ((d,), SMALL),
            (f"{module}linear_5", "w"): ((4 * part, d), SMALL),
            (f"{module}replicated_layer_norm", "offset"): ((d,), offset),
            (f"{module}replicated_layer_norm", "scale"): ((d,), scale),
        }
    return [(f"{PREFIX}{module}/{name}", *found[module, name]) for module, name in sorted(found)]


def header(shape: tuple[int, ...], descr: str) -> bytes:
    """A .npy version 1.0 header; the data starts at a multiple of 64."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape!r}, }}"
    length = -(-(10 + len(text) + 1) // 64) * 64 - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + text.ljust(length - 1).encode("latin1") + b"\n"


def values(n_bytes: int, bits: Bits, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`n_bytes` of random bfloat16 numbers, in chunks of bytes."""
    random, fixed = (np.uint64(of * 0x0001_0001_0001_0001) for of in bits)
    for start in range(0, n_bytes, CHUNK):
        size = min(CHUNK, n_bytes - start)
        words = rng.integers(0, 2**64, -(-size // 8), dtype=np.uint64)
        words &= random
        words |= fixed
        yield words.view(np.uint8)[:size]


def write_shard(directory: Path, cfg: Shape, shard: int, step: int, seed: int) -> None:
    """The 16 files of one shard: contiguous runs of the leaves, as equal in number as can be, the longer ones first."""
    rng = np.random.Generator(np.random.SFC64([seed, shard]))
    directory.mkdir(parents=True)
    found = leaves(cfg, shard)
    n = len(found) + 1
    short, longer = divmod(n, N_FILES)
    for p in range(N_FILES):
        first = p * short + min(p, longer)
        last = first + short + (p < longer)
        with zipfile.ZipFile(directory / f"{p}.npz", "w", zipfile.ZIP_STORED) as archive:
            for i in range(first, last):
                member = zipfile.ZipInfo(f"arr_{i - first}.npy")
                with archive.open(member, "w", force_zip64=True) as file:
                    if i == n - 1:
                        file.write(header((), "<i4") + struct.pack("<i", step))
                        continue
                    _, shape, bits = found[i]
                    file.write(header(shape, "<V2"))
                    for chunk in values(2 * math.prod(shape), bits, rng):
                        file.write(chunk.data)


def config_of(cfg: Shape) -> dict[str, object]:
    """The original's flat JSON configuration, with GPT-J-6B's training."""
    architecture = {k: v for k, v in dataclasses.asdict(cfg).items() if k != "shards"}
    return architecture | {
        "norm": "layernorm",
        "pe": "rotary",
        "cores_per_replica": cfg.shards,
        "per_replica_batch": 1,
        "gradient_accumulation_steps": 16,
        "warmup_steps": 3000,
        "anneal_steps": 300000,
        "lr": 1.2e-4,
        "end_lr": 1.2e-5,
        "weight_decay": 0.1,
        "total_steps": 350000,
        "tpu_size": 32 * cfg.shards,
        "bucket": "random-weights",
        "model_dir": "random_weights",
        "train_set": "pile.train.index",
        "val_set": {"pile": "pile.val.index"},
        "eval_harness_tasks": [],
        "val_batches": 100,
        "val_every": 500,
        "ckpt_every": 500,
        "keep_every": 10000,
        "name": "random-weights",
        "comment": "",
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="a name step_N: the step directory itself; any other: its parent")
    for name, default in (("layers", 28), ("d-model", 4096), ("heads", 16), ("vocab", 50400), ("seq", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--rotary", type=int, help="default 64, or the head's width if that is less")
    parser.add_argument("--shards", type=int, default=8, help="default 8")
    parser.add_argument("--step", type=int, help="default 383500, or N of a target step_N")
    parser.add_argument("--seed", type=int, default=0, help="default 0; equal seeds give equal files")
    args = parser.parse_args(arguments)
    if min(args.layers, args.d_model, args.heads, args.vocab, args.seq, args.shards) < 1:
        parser.error("sizes must be at least 1")
    for name in ("d_model", "vocab", "heads"):
        if getattr(args, name) % args.shards:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(args, name)} must be divisible by --shards {args.shards}"
            )
    if args.d_model % args.heads:
        parser.error(f"--d-model {args.d_model} must be divisible by --heads {args.heads}")
    width = args.d_model // args.heads
    args.rotary = min(64, width) if args.rotary is None else args.rotary
    if args.rotary % 2 or not 2 <= args.rotary <= width:
        parser.error(f"--rotary {args.rotary} must be even and in 2..{width}, the width of a head")
    named = re.fullmatch(r"step_(\d+)", args.target.absolute().name)
    if named and args.step not in (None, int(named[1])):
        parser.error(f"--step {args.step} is not that of {args.target.name}")
    args.bare = named is not None
    args.step = int(named[1]) if named else 383500 if args.step is None else args.step
    if not 0 <= args.step < 2**31:
        parser.error(f"--step {args.step} must fit the checkpoint's int32")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    model = args.target.absolute().parent if args.bare else args.target
    step = args.target if args.bare else model / f"step_{args.step}"
    for path in (step, model / "config.json", *([] if args.bare else [model / "meta.json"])):
        if path.exists():
            print(f"{path} exists; choose another target, or remove it", file=sys.stderr)
            return 1
    cfg = Shape(
        layers=args.layers,
        d_model=args.d_model,
        n_heads=args.heads,
        n_vocab=args.vocab,
        seq=args.seq,
        pe_rotary_dims=args.rotary,
        shards=args.shards,
    )
    start = time.perf_counter()
    for shard in range(cfg.shards):
        write_shard(step / f"shard_{shard}", cfg, shard, args.step, args.seed)
    (model / "config.json").write_text(json.dumps(config_of(cfg), indent=2) + "\n", encoding="utf-8")
    if not args.bare:
        meta = {"step": args.step, "checkpoints": [args.step], "aux": {str(args.step): {}}}
        (model / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    seconds = time.perf_counter() - start
    n_bytes = sum(path.stat().st_size for path in step.glob("shard_*/*.npz"))
    print(f"{step}: {n_bytes:,} bytes in {seconds:.2f} s, {n_bytes / seconds / 1e6:.0f} MB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
