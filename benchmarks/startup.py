"""What starting costs: import, `--help`, compiling with an empty cache and a full one, opening a model, a first token.

    python benchmarks/startup.py [MODEL | --preset gpt-j-77m] [--rounds 3] [--out FILE]

Every measurement is a process of its own. `help` and `version` are whole commands, `bare python` is the interpreter
alone. `cold` and `warm` are `generate` in Python, with a cache of compiled programs that is empty and with the one that
the cold process left: seconds since the process began when the package was imported, the model opened, the first token
written (32 tokens of prompt), and the next 15. Prints JSON; medians, smallest and largest of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHILD = """
import time
begun = time.time()
import sys
import json
from mesh_transformer import compat
compat.prepare_process()
compat.use_compile_cache()
from mesh_transformer.api import load
how = json.loads(sys.argv[2])
moments = {"import": time.time()}
model = load(sys.argv[1], **how)
moments["open"] = time.time()
options = {"temperature": 0.0, "ignore_eos": True}
prompt = [i % model.config.n_vocab for i in range(7, 39)]
model.generate(prompt, max_tokens=1, **options)
moments["first token"] = time.time()
model.generate(prompt, max_tokens=16, **options)
moments["16 tokens"] = time.time()
model.generate(prompt, max_tokens=16, **options)
moments["16 tokens again"] = time.time()
print(json.dumps(moments | {"python": begun}))
"""


def command(*words: str) -> list[float]:
    """Seconds of the whole process."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return [time.perf_counter() - begun]


def generating(model: str, how: dict[str, Any], cache: Path) -> dict[str, float]:
    """Seconds from the start of the process to each of the child's moments, cache: of compiled programs."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environment["MESH_TRANSFORMER_CACHE"] = str(cache)
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, model, json.dumps(how)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return {name: moment - begun for name, moment in json.loads(done.stdout.splitlines()[-1]).items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(model: str, how: dict[str, Any], rounds: int) -> dict[str, Any]:
    """All measurements in turn, round by round."""
    whole: dict[str, list[float]] = {}
    stages: dict[str, dict[str, list[float]]] = {"cold": {}, "warm": {}}
    commands = {
        "bare python": ("-c", "pass"),
        "help": ("-m", "mesh_transformer", "--help"),
        "version": ("-m", "mesh_transformer", "--version"),
        "import mesh_transformer": ("-c", "import mesh_transformer"),
        "import jax": ("-c", "import jax"),
        "import mesh_transformer.api": ("-c", "import mesh_transformer.api"),
    }
    for i in range(rounds):
        print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, words in commands.items():
            whole.setdefault(name, []).extend(command(*words))
        with tempfile.TemporaryDirectory() as cache:
            for found in stages.values():
                for moment, seconds in generating(model, how, Path(cache)).items():
                    found.setdefault(moment, []).append(seconds)
    return {
        "commands": {name: summary(seconds) for name, seconds in whole.items()},
        **{state: {name: summary(s) for name, s in found.items()} for state, found in stages.items()},
    }


def main() -> None:
    """Measures and prints."""
    from mesh_transformer.bench.export import exported
    from mesh_transformer.bench.machine import machine
    from mesh_transformer.config.presets import preset

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--preset", default="gpt-j-77m", help="random weights, where no MODEL is given")
    parser.add_argument("--dtype")
    parser.add_argument("--quantize")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    how = {key: value for key in ("dtype", "quantize") if (value := getattr(options, key))}
    with contextlib.ExitStack() as stack:
        model, weights = options.model, options.model
        if model is None:
            weights = f"random, {options.preset}"
            note = lambda line: print(line, file=sys.stderr)  # noqa: E731
            made = exported(preset(options.preset), ctranslate2=False, progress=note)
            model = str(stack.enter_context(made).huggingface)
        measured = measure(model, how, options.rounds)
    date = time.strftime("%Y-%m-%d")
    facts = {"benchmark": "startup", "date": date, "machine": machine(), "weights": weights, "options": how}
    text = json.dumps({**facts, "rounds": options.rounds, **measured}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
