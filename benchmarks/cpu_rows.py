"""The measurements on a CPU that the documents show, one after the other: run it on a machine that does nothing else.

    python benchmarks/cpu_rows.py [--list] [ROW...]

Each row writes `benchmarks/results/DATE-ROW.json`; without rows, all are measured. Then the tables of the documents are
made again. It needs the extra `peers` and a C++ compiler, and for the rows of 0.6 billion parameters 20 GB of memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BENCH = ("-m", "mesh_transformer", "bench")
_DECODE = (*_BENCH, "decode", "--preset")
_ALL = ("--against", "hf,ctranslate2,torch")
# The larger model: as many contenders as fit into 24 GB.
_LARGE = ("--precisions", "bfloat16,int8,int4", "--against", "hf,ctranslate2")
# Row -> what Python is given; --out FILE is added.
ROWS: dict[str, tuple[str, ...]] = {
    "train-gpt-j-77m-cpu": (*_BENCH, "train", "--preset", "gpt-j-77m", "--against", "hf,torch", "--rounds", "7"),
    "train-llama-77m-cpu": (*_BENCH, "train", "--preset", "llama-77m", "--against", "hf", "--rounds", "5"),
    "decode-gpt-j-77m-cpu": (*_DECODE, "gpt-j-77m", *_ALL),
    "decode-gpt-j-77m-batch-8-cpu": (*_DECODE, "gpt-j-77m", "--batch", "8", *_ALL),
    "decode-llama-77m-cpu": (*_DECODE, "llama-77m", *_ALL),
    "decode-gpt-j-0.6b-cpu": (*_DECODE, "gpt-j-0.6b", "--tokens", "48", *_LARGE),
    "serve-gpt-j-77m-cpu": (*_BENCH, "serve", "--preset", "gpt-j-77m", "--against", "hf,ctranslate2"),
    "startup-gpt-j-77m-cpu": ("benchmarks/startup.py", "--preset", "gpt-j-77m"),
}


def main() -> None:
    """Measures, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--list", action="store_true", help="name the rows and their commands, and measure nothing")
    options = parser.parse_args()
    if unknown := [row for row in options.rows if row not in ROWS]:
        parser.error(f"{unknown[0]!r} is not known; expected some of: {', '.join(ROWS)}")
    for row in options.rows or ROWS:
        out = ROOT / "benchmarks" / "results" / f"{time.strftime('%Y-%m-%d')}-{row}.json"
        words = [*ROWS[row], "--out", str(out.relative_to(ROOT))]
        print(f"{row}: python {' '.join(words)}", flush=True)
        if not options.list:
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    if not options.list:
        subprocess.run([sys.executable, "benchmarks/tables.py"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
