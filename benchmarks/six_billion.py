"""GPT-J-6B on a CPU: quantised while it is converted, opened by memory map, and how fast it writes.

    python benchmarks/six_billion.py /data/six --output FILE          # 12 GB and 10 GB on the disk
    python benchmarks/six_billion.py /tmp/two --layers 2 --output FILE   # two of its 28 layers
    python benchmarks/six_billion.py /data/six --keep --part convert --output FILE     # in two goes
    python benchmarks/six_billion.py /data/six --part run --output FILE

Steps, each a process of its own, whose peak memory is the system's word (resident, pages of mapped files included):

* make: scripts/make_legacy_checkpoint.py writes the original's slim shards in bfloat16 with random weights, unless they
  are there;
* convert to int8 and to int4 (--quantize names others), with certificates: the source is read and rounded, then read
  and hashed, and the result is read back, hashed, and compared with the source;
* run each, twice: the second finds the compiled programs in the cache. Timed from the process' start: the import, the
  opening, the first token after a prompt of 32 ids, which compiles or loads the programs; then, with everything warm,
  another first token, and the tokens of a continuation, batch 1, greedy, by the difference of two lengths.

The files were just written, so that the system holds what of them its memory has room for. A token needs all quantised
values and scales once: the bandwidth, measured in the same process before and after the decoding (the fastest of XLA's
and the native product with a float32 matrix, and its sum), over the bytes of these is the bound. Models are removed at
the end, unless --keep.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.time()
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PROMPT = 32
PACKAGES = ("mesh-transformer", "jax", "jaxlib", "numpy")


def script(name: str) -> Any:
    """A module of the directory scripts/."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_model(path: str, tokens: int, rounds: int) -> dict[str, Any]:
    """What the process that runs a model finds, as JSON."""
    from mesh_transformer import compat

    compat.prepare_process()
    compat.use_compile_cache()
    import jax
    import numpy as np

    import mesh_transformer as mt
    from mesh_transformer.bench.ours_decode import Bandwidth
    from mesh_transformer.kernels import native
    from mesh_transformer.model.quantize import Quantized

    imported = time.time()
    model = mt.load(path)
    opened = time.time()
    prompt = np.random.default_rng(0).integers(0, model.config.n_vocab, PROMPT).tolist()

    def write(n: int) -> float:
        begun = time.perf_counter()
        (made,) = model.generate([prompt], max_tokens=n, temperature=0.0, ignore_eos=True)
        assert len(made.tokens) == n
        return time.perf_counter() - begun

    write(1)
    first = time.time()
    write(2)  # the programs of what follows the first token
    answered = peak()
    bandwidth = Bandwidth({})
    before = bandwidth.step()["bytes_per_second"]
    firsts, rates = [], []
    for _ in range(rounds):
        firsts.append(write(1))
        rates.append(tokens / (write(tokens + 1) - firsts[-1]))
    after = bandwidth.step()["bytes_per_second"]
    leaves = jax.tree.leaves(model.params, is_leaf=lambda w: isinstance(w, Quantized))
    n_bytes = sum(w.values.nbytes + w.scale.nbytes for w in leaves if isinstance(w, Quantized))
    best = max(*before.values(), *after.values())
    return {
        "seconds_to_import": imported - STARTED,
        "seconds_to_open": opened - imported,
        "seconds_to_first_token": first - STARTED,
        "seconds_of_a_warm_first_token": statistics.median(firsts),
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_all": rates,
        "bytes_a_token": n_bytes,
        "bandwidth": {"before": before, "after": after},
        "bound_tokens_per_second": best / n_bytes,
        "share_of_bound": statistics.median(rates) * n_bytes / best,
        "peak_resident_bytes": answered,
        "native": native.description(),
    }


def peak() -> int:
    """The most that was resident in this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """All steps in `args.directory`; the report."""
    full_size = script("full_size")
    cache = args.directory / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["MESH_TRANSFORMER_CACHE"] = str(cache)  # of the steps' processes
    command, v1 = [sys.executable, "-m", "mesh_transformer"], args.directory / "v1"
    earlier = json.loads(args.output.read_bytes()) if args.part == "run" and args.output.exists() else {}
    steps: list[dict[str, Any]] = earlier.get("steps", [])
    if args.part != "run" and not v1.exists():
        made = [sys.executable, str(SCRIPTS / "make_legacy_checkpoint.py"), str(v1), "--layers", str(args.layers)]
        steps.append(full_size.measured("make", made)[0])
        steps[-1]["bytes"] = full_size.size_of(v1)
    runs: dict[str, Any] = earlier.get("runs", {})
    for name in args.quantize:
        target = args.directory / name
        if args.part != "run" and not target.exists():
            convert = [*command, "convert", str(v1), str(target), "--to", "native", "--quantize", name]
            step = full_size.measured(f"convert to {name}", convert, full_size.size_of(v1))[0]
            changed = json.loads((target / "conversion.json").read_bytes())["changed"]
            step |= {"bytes_written": full_size.size_of(target / "weights")}
            steps.append(step | {"largest_error": max(entry["largest_error"] for entry in changed)})
        if args.part == "convert":
            continue
        child = [sys.executable, __file__, str(args.directory), "--run", str(target)]
        child += ["--tokens", str(args.tokens), "--rounds", str(args.rounds)]
        told = [full_size.measured(f"run {name}, {which}", child)[1] for which in ("cold programs", "warm programs")]
        runs[name] = dict(zip(("cold_programs", "warm_programs"), map(json.loads, told), strict=True))
    for step in steps:
        step["megabytes_per_second"] = step["bytes"] / step["seconds"] / 1e6
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "layers": args.layers,
        "prompt_tokens": PROMPT,
        "tokens": args.tokens,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": full_size.machine(),
        "steps": steps,
        "runs": runs,
    }


def show(report: dict[str, Any]) -> None:
    """Two tables in Markdown."""
    print("| step | seconds | GB read | MB/s | GB written | peak resident GB |\n" + "| --- " * 6 + "|")
    for step in report["steps"]:
        written = step.get("bytes_written", step["bytes"])
        print(f"| {step['step']} | {step['seconds']:.0f} | {step['bytes'] / 1e9:.1f} |", end="")
        print(f" {step['megabytes_per_second']:.0f} | {written / 1e9:.2f} | {step['peak_resident_bytes'] / 1e9:.2f} |")
    print(
        "\n| weights | open, s | first token, s: programs compiled | from the cache | all warm | tokens/s | bound |",
        end="",
    )
    print(" share | peak resident GB |\n" + "| --- " * 9 + "|")
    for name, both in report["runs"].items():
        cold, warm = both["cold_programs"], both["warm_programs"]
        print(
            f"| {name} | {warm['seconds_to_open']:.2f} | {cold['seconds_to_first_token']:.1f} "
            f"| {warm['seconds_to_first_token']:.1f} | {warm['seconds_of_a_warm_first_token']:.2f} "
            f"| {warm['tokens_per_second']:.2f} | {warm['bound_tokens_per_second']:.2f} "
            f"| {warm['share_of_bound']:.0%} | {warm['peak_resident_bytes'] / 1e9:.2f} |"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="for the models: v1, int8, int4; what is there is used")
    parser.add_argument("--layers", type=int, default=28, help="default 28")
    parser.add_argument("--quantize", nargs="+", default=["int8", "int4"], metavar="NAME", help="default int8 int4")
    parser.add_argument("--tokens", type=int, default=24, help="of a timed continuation; default 24")
    parser.add_argument("--rounds", type=int, default=3, help="continuations; medians are told; default 3")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the report, as JSON; default DIRECTORY.json")
    parser.add_argument(
        "--part",
        choices=["all", "convert", "run"],
        default="all",
        help="run: of models that are there; FILE is completed",
    )
    parser.add_argument("--keep", action="store_true", help="leave the models where they are")
    parser.add_argument("--run", metavar="MODEL", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.run:
        print(json.dumps(run_model(args.run, args.tokens, args.rounds)))
        return
    args.directory = args.directory.absolute()
    args.directory.mkdir(parents=True, exist_ok=True)
    args.output = args.output or args.directory.with_suffix(".json")
    made = [args.directory / name for name in ("v1", *args.quantize) if not (args.directory / name).exists()]
    try:
        report = benchmark(args)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        show(report)
    finally:
        for path in [args.directory / "cache", *(made if not args.keep else [])]:
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
