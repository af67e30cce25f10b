"""What one GPU does with GPT-J-6B, in parts of under four minutes, for a machine that is lent for minutes.

    python benchmarks/gpu.py --list                          # the parts, in the order in which they matter
    python benchmarks/gpu.py train-default --out results/    # one part: results/train-default.json
    python benchmarks/gpu.py all --out results/              # every part, each in a process of its own
    python benchmarks/gpu.py all --out results/ --rehearse   # the same in one process, in tiny shapes on a CPU

Runs from a source tree without installing anything (it puts src/ on the path itself) and imports jax, numpy and optax
alone. A row is measured, and the file written anew, one after the other: what is done when time runs out is there.
A row that fails is written with its error, the next ones go on, and the exit status is 1. Rows for which no time is
left are written as not begun. All data are random; FLOPs and bytes are counted by the formulas of
`train.metrics.flops_per_token` and `bench.work.weight_bytes`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src"
TIMEOUT_S = 285  # of a part in a process of its own; it stops beginning rows after --seconds


def main() -> int:
    """Runs what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="names of parts, or all")
    parser.add_argument("--list", action="store_true", help="say which parts there are")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="directory of the JSON files")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--seconds", type=float, default=200, help="after which a part begins no further row")
    arguments = parser.parse_args()
    prepare(arguments.rehearse)
    from gpu_parts import PARTS

    if arguments.list:
        for name, part in PARTS.items():
            print(f"{name:22} {part.says}")
        return 0
    wanted = list(PARTS) if arguments.parts == ["all"] else arguments.parts
    unknown = [name for name in wanted if name not in PARTS]
    if unknown or not wanted:
        parser.error(f"unknown part {unknown[0]!r}; --list says which there are" if unknown else "name a part")
    if len(wanted) > 1 and not arguments.rehearse:
        return max(run_apart(name, arguments) for name in wanted)
    from gpu_rows import Rows

    status = 0
    for name in wanted:
        rows = Rows(name, arguments.out, seconds=arguments.seconds, rehearse=arguments.rehearse)
        PARTS[name].run(rows)
        status = max(status, rows.finish())
    return status


def prepare(rehearse: bool) -> None:
    """Paths and the environment, before JAX is imported."""
    sys.path[:0] = [str(SOURCE), str(Path(__file__).resolve().parent)]
    if rehearse:
        os.environ["JAX_PLATFORMS"] = "cpu"
    # A model of this size leaves less than the quarter that JAX does not take by default.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    from mesh_transformer.compat import prepare_process

    prepare_process()


def run_apart(name: str, arguments: argparse.Namespace) -> int:
    """One part in a process of its own, which has the whole GPU; its exit status, 124 if it had to be ended."""
    command = [sys.executable, __file__, name, "--out", str(arguments.out), "--seconds", str(arguments.seconds)]
    try:
        done = subprocess.run(command, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name}: ended after {TIMEOUT_S} s", file=sys.stderr)
        return 124
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
