"""What the allocator setting of the command line is worth: the same training steps with and without it, in turn.

    python benchmarks/allocator.py [--preset gpt-j-77m] [--rounds 3] [--steps 5]

Each measurement is a process of its own, because a process cannot go back; they alternate, so that a machine whose
speed drifts slows all alike. `small pages` keeps freed memory as the command does, but without huge pages;
`environment` is glibc told by its own variables, as every contender of `bench` is. Prints tokens a second of every
process and the ratios of the medians to `default`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from mesh_transformer.bench.rounds import ALLOCATOR

CHILD = """
import sys, time
from mesh_transformer import compat
if sys.argv[3] == "small pages":
    compat._ask_for_huge_pages = lambda: False
compat.prepare_process()
from mesh_transformer.bench.ours import TrainContender
from mesh_transformer.config.presets import preset
model, steps = preset(sys.argv[1]), int(sys.argv[2])
spec = {"model": model.to_dict(), "batch_size": 8, "sequence_length": model.n_ctx, "dtype": "float32"}
contender = TrainContender(spec)
contender.step()
begun = time.perf_counter()
for _ in range(steps):
    contender.step()
print(8 * model.n_ctx * steps / (time.perf_counter() - begun))
"""


def measure(preset: str, steps: int, allocator: str) -> float:
    """Tokens a second of one process."""
    by_itself = allocator in ("command", "small pages")
    environment = os.environ | {"MESH_TRANSFORMER_ALLOCATOR": "" if by_itself else "default"}
    environment |= ALLOCATOR if allocator == "environment" else {}
    command = [sys.executable, "-c", CHILD, preset, str(steps), allocator]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt-j-77m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"command": [], "small pages": [], "environment": [], "default": []}
    for i in range(options.rounds):
        for allocator, found in rates.items():
            found.append(measure(options.preset, options.steps, allocator))
            print(f"round {i + 1}: {allocator:12} {found[-1]:10,.0f} tokens/s", flush=True)
    for allocator, found in rates.items():
        ratio = statistics.median(found) / statistics.median(rates["default"])
        print(f"{allocator} over default, {options.preset}: {ratio:.2f}")


if __name__ == "__main__":
    main()
