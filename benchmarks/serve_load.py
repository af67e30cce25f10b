"""The server's load in one go: a queue that holds every client, a short queue, and the same requests elsewhere.

    python benchmarks/serve_load.py MODEL [--clients 64] [--seconds 300] [--rounds 3] [--output FILE.json]

Three runs of `mesh-transformer bench load`: with as many places in the queue as clients, where nothing may be refused
and nothing may fail; with eight places, where requests are refused and nothing else; and a short one that compares with
one request at a time and with Hugging Face's `generate` (it needs the extra `peers`). Prints the table of
docs/performance.md. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHORT_QUEUE = 8


def run(model: str, *words: object) -> dict[str, Any]:
    """The result of one run, also if something was wrong in it: then its `faults` say what."""
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "result.json"
        line = [sys.executable, "-m", "mesh_transformer", "bench", "load", model, "--out", result, *words]
        status = subprocess.run(list(map(str, line)), stdout=sys.stderr, check=False).returncode
        if not result.exists():
            raise SystemExit(status)
        return json.loads(result.read_text(encoding="utf-8"))


def row(name: str, result: dict[str, Any]) -> str:
    """A line of the table of loads."""
    load = result["load"]

    def times(figure: str) -> str:
        found = load[figure]
        return f"{1000 * found['p50']:,.0f} / {1000 * found['p99']:,.0f}" if found else "-"

    memory = load["memory"]
    grown = f"{(memory['last_fifth'] - memory['first_fifth']) / 2**20:+.0f} MiB" if memory else "-"
    return (
        f"| {name} | {load['done']:,} | {load['vanished']:,} | {load['refused']:,} | {load['failed']:,} | "
        f"{load['tokens_per_second']:,.0f} | {times('time_to_first_token')} | {times('time_per_token')} | {grown} |"
    )


def main() -> None:
    """Measures, prints the tables, and writes the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compare-seconds", type=float, default=20.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    clients, long = ["--clients", options.clients], ["--seconds", options.seconds]
    runs = {
        f"queue {options.clients}": run(options.model, *clients, *long, "--max-queue", options.clients),
        f"queue {SHORT_QUEUE}": run(options.model, *clients, *long, "--max-queue", SHORT_QUEUE),
    }
    turns = ["--rounds", options.rounds, "--compare-seconds", options.compare_seconds]
    beside = ["--one-by-one", "--against", "hf", *turns, "--max-queue", options.clients]
    runs["compared"] = run(options.model, *clients, "--seconds", options.compare_seconds, *beside)
    print(
        f"| {options.clients} clients | done | vanished | refused | failed | output tokens/s | "
        "first token, ms p50 / p99 | per token, ms p50 / p99 | memory |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in list(runs)[:2]:
        print(row(name, runs[name]))
    print()
    print("| | output tokens/s, median (min to max) |")
    print("| --- | --- |")
    for name, rate in runs["compared"]["comparison"]["tokens_per_second"].items():
        print(f"| {name} | {rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f}) |")
    for name, ratio in runs["compared"]["comparison"]["ratios"].items():
        print(f"| {name} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) |")
    faults = {name: result["faults"] for name, result in runs.items() if result["faults"]}
    if options.output:
        options.output.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    if faults:
        raise SystemExit(f"faults: {faults}")


if __name__ == "__main__":
    main()
