"""How fast `prepare` is, against the tokenizers library's own encode_batch on the same text and cores, and its memory.

    python benchmarks/prepare_speed.py --megabytes 200 --out prepare_speed.json

The text is this Python's standard library, its lines shuffled with a fixed seed so that no two megabytes are the same,
in documents of about four kilobytes. It is made in a temporary directory and removed. Each measurement is a process of
its own, whose processor time counts its start too; memory is the peak of its resident set, with that of its workers,
sampled ten times a second. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import psutil

_DOCUMENT = 4000  # characters
_BASELINE_BATCH = 4_000_000  # characters that encode_batch takes at once

_BASELINE = """
import sys, time
from mesh_transformer.data.tokenizer import load_tokenizer
backend = load_tokenizer("gpt2").backend
begun, tokens, waiting, size = time.monotonic(), 0, [], 0
for document in open(sys.argv[1], encoding="utf-8").read().split("<|endoftext|>"):
    waiting.append(document)
    size += len(document)
    if size >= int(sys.argv[2]):
        tokens += sum(len(e) for e in backend.encode_batch(waiting, add_special_tokens=False))
        waiting, size = [], 0
tokens += sum(len(e) for e in backend.encode_batch(waiting, add_special_tokens=False))
print(time.monotonic() - begun, tokens)
"""
_PREPARE = """
import sys, time
from mesh_transformer.data.prepare import prepare
from mesh_transformer.data.tokenizer import load_tokenizer
if __name__ == "__main__":
    tokenizer, stages = load_tokenizer("gpt2"), {}
    def progress(stage, done, total):
        first, _ = stages.get(stage, (time.monotonic(), 0))
        stages[stage] = first, time.monotonic()
    report = prepare([sys.argv[1]], sys.argv[2], tokenizer=tokenizer, workers=int(sys.argv[3]), progress=progress)
    tokenizing, writing = (stages[stage][1] - stages[stage][0] for stage in ("tokenizing", "writing"))
    print(report.seconds, report.tokens, tokenizing, writing)
"""


def make_text(path: Path, megabytes: float) -> int:
    """Writes documents with `<|endoftext|>` between them; returns the size in bytes."""
    generator = random.Random(0)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    lines = [line for source in sources for line in source.read_text("utf-8", "ignore").splitlines(keepends=True)]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            document: list[str] = []
            size = 0
            while size < _DOCUMENT:
                begin = generator.randrange(len(lines))
                piece = lines[begin : begin + 5]
                document += piece
                size += sum(map(len, piece))
            written += file.write("".join(document) + "<|endoftext|>")
    return path.stat().st_size


def measured(script: str, *arguments: str) -> tuple[list[float], dict[str, float]]:
    """(the numbers that a script prints, what it used: processor time and memory, with its workers)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "measured.py"
        path.write_text(script)
        process = subprocess.Popen([sys.executable, str(path), *arguments], stdout=subprocess.PIPE, text=True)
        peak = [0.0, 0.0]
        ended = threading.Event()

        def watch() -> None:
            parent = psutil.Process(process.pid)
            while not ended.wait(0.1):
                sizes = []
                try:
                    for each in [parent, *parent.children(recursive=True)]:
                        sizes.append(each.memory_info().rss)
                except psutil.Error:
                    continue
                peak[0], peak[1] = max(peak[0], sum(sizes)), max(peak[1], max(sizes))

        thread = threading.Thread(target=watch)
        thread.start()
        printed, _ = process.communicate()
        ended.set()
        thread.join()
        if process.returncode:
            raise SystemExit(f"a measurement failed with status {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = {
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_megabytes_of_all_processes": peak[0] / 1e6,
        "peak_megabytes_of_the_largest": peak[1] / 1e6,
    }
    return [float(word) for word in printed.split()], used


def main() -> None:
    """Measures and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--workers", type=int, nargs="*", default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--no-baseline", action="store_true", help="leave encode_batch out")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory) / "text.txt"
        size = make_text(text, asked.megabytes)
        found: dict[str, object] = {
            "megabytes": size / 1e6,
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "load_before": os.getloadavg()[0],
        }
        baseline = None
        if not asked.no_baseline:
            (seconds, tokens), used = measured(_BASELINE, str(text), str(_BASELINE_BATCH))
            baseline = size / 1e6 / seconds
            found["encode_batch"] = {"mb_per_second": baseline, "seconds": seconds, "tokens": tokens, **used}
        for workers in asked.workers:
            out = Path(directory) / f"set{workers}"
            begun = time.monotonic()
            (seconds, tokens, tokenizing, writing), used = measured(_PREPARE, str(text), str(out), str(workers))
            found[f"prepare, {workers} workers"] = {
                "mb_per_second": size / 1e6 / seconds,
                "ratio_to_encode_batch": size / 1e6 / seconds / baseline if baseline else None,
                "seconds": seconds,
                "seconds_with_start": time.monotonic() - begun,
                "tokenizing_seconds": tokenizing,
                "writing_seconds": writing,
                "tokens": tokens,
                **used,
            }
    content = json.dumps(found, indent=2)
    print(content)
    if asked.out:
        asked.out.write_text(content + "\n")


if __name__ == "__main__":
    main()
