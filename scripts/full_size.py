"""Measures a GPT-J-6B-sized checkpoint on its way through the command line: seconds, MB/s and peak memory of each step.

    python scripts/full_size.py /data/full_size --output benchmarks/full_size.json    # 12 GB, three times on the disk
    python scripts/full_size.py /tmp/small --small --output /tmp/small.json           # the same in miniature

Steps, each a process of its own whose peak memory is the system's word (resident, in `os.wait4`):

* make: scripts/make_legacy_checkpoint.py writes the original's shards with random weights; left out if they are there;
* convert to native, with a certificate: everything is written, read back and compared;
* inspect --digest of the original and of the native checkpoint: the two must be equal;
* convert the native checkpoint to Hugging Face, with a certificate;
* generate --max-tokens 8 from the result.

A step's bytes are those of the model that it reads (that make writes), as files on the disk; MB/s are these by wall
time, so that a conversion, which also writes and reads back, has done more than they say. The system may hold files in
memory that were just written: a machine with less free memory than a model reads more slowly.

Printed is a table, and written to --output a JSON with the same, the versions, the machine, and what the certificates
say: how many tensors were changed, and the largest error. What this run has made is removed at the end, unless --keep.
Exit status 1 if a step fails or the digests differ. Needs this package and NumPy.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAKE = Path(__file__).resolve().parent / "make_legacy_checkpoint.py"
SMALL = ["--layers", "2", "--d-model", "64", "--heads", "8", "--vocab", "264", "--seq", "32"]
PROMPT = "The quick brown fox"
MAX_TOKENS = 8
ABOUT = """
import importlib.metadata, json, jax
device = jax.devices()[0]
names = ("mesh-transformer", "jax", "numpy", "safetensors", "tensorstore")
versions = {name: importlib.metadata.version(name) for name in names}
print(json.dumps({"device": f"{device.platform}: {device.device_kind}", "versions": versions}))
"""


class Failed(Exception):
    """A step did not end well."""


def measured(name: str, command: list[str], n_bytes: int | None = None) -> tuple[dict[str, Any], str]:
    """Runs a command to its end; returns what it took, and its standard output.

    Args:
        n_bytes: of the model that it reads; None where it is not known before.

    Raises:
        Failed: the exit status is not 0.
    """
    print(f"{name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise Failed(f"{name}: exit status {process.returncode}\n{err.read()[-2000:]}")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB
        taken = {"step": name, "seconds": seconds, "bytes": n_bytes, "peak_resident_bytes": peak}
        return taken | {"cpu_seconds": usage.ru_utime + usage.ru_stime}, out.read()


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def certified(directory: Path) -> dict[str, Any]:
    """What matters of a conversion's certificate."""
    found = json.loads((directory / "conversion.json").read_text(encoding="utf-8"))
    return {
        "digest": found["target"]["digest"],
        "tensors": len(found["tensors"]),
        "tensors_changed": [tensor["name"] for tensor in found["changed"]],
        "largest_error": max((tensor["largest_error"] for tensor in found["changed"]), default=0.0),
    }


def machine() -> dict[str, Any]:
    """The processor, its cores and memory."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"system": platform.platform(), "processor": model, "cores": cores, "memory_bytes": memory}


def run(directory: Path, small: bool) -> dict[str, Any]:
    """All steps in `directory`; the report."""
    command = [sys.executable, "-m", "mesh_transformer"]
    v1, native, hf = directory / "v1", directory / "native", directory / "huggingface"
    steps = []
    if not v1.exists():
        taken, _ = measured("make", [sys.executable, str(MAKE), str(v1), *(SMALL if small else [])])
        steps.append(taken | {"bytes": size_of(v1)})
    size = size_of(v1)
    taken, _ = measured("convert v1 to native", [*command, "convert", str(v1), str(native), "--to", "native"], size)
    steps.append(taken)
    digests = {}
    for name, place in (("v1", v1), ("native", native)):
        taken, told = measured(
            f"inspect --digest {name}", [*command, "inspect", str(place), "--digest"], size_of(place)
        )
        steps.append(taken)
        digests[name] = told.strip()
    to_hf = [*command, "convert", str(native), str(hf), "--to", "huggingface"]
    steps.append(measured("convert native to huggingface", to_hf, size_of(native))[0])
    options = ["--prompt", PROMPT, "--max-tokens", str(MAX_TOKENS), "--ignore-eos", "--json"]
    taken, told = measured("generate", [*command, "generate", str(hf), *options], size_of(hf))
    steps.append(taken)
    for step in steps:
        step["megabytes_per_second"] = step["bytes"] / step["seconds"] / 1e6
    about = json.loads(measured("versions", [sys.executable, "-c", ABOUT])[1].splitlines()[-1])
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "small": small,
        "versions": {"python": platform.python_version(), **about["versions"]},
        "machine": {**machine(), "device": about["device"]},
        "steps": steps,
        "digests": digests,
        "digests_equal": digests["v1"] == digests["native"],
        "certificates": {"native": certified(native), "huggingface": certified(hf)},
        "completion": json.loads(told),
    }


def show(report: dict[str, Any]) -> None:
    """The table."""
    print(f"{'step':<30} {'seconds':>9} {'GB':>8} {'MB/s':>8} {'peak GB':>8}")
    for step in report["steps"]:
        print(
            f"{step['step']:<30} {step['seconds']:9.1f} {step['bytes'] / 1e9:8.3f} "
            f"{step['megabytes_per_second']:8.1f} {step['peak_resident_bytes'] / 1e9:8.2f}"
        )
    for name, found in report["certificates"].items():
        print(
            f"{name}: {len(found['tensors_changed'])} of {found['tensors']} tensors changed, "
            f"largest error {found['largest_error']:.3g}"
        )
    print(f"digests {'equal' if report['digests_equal'] else 'DIFFER'}: {report['digests']['v1']}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="for v1, native and huggingface; 38 GB, unless --small")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the report, as JSON")
    parser.add_argument("--small", action="store_true", help="a model of 2 layers and 120 thousand parameters")
    parser.add_argument("--keep", action="store_true", help="leave what was made where it is")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    directory = args.directory.absolute()
    ours = [directory / name for name in ("native", "huggingface")]
    for path in ours:
        if path.exists():
            print(f"{path} exists; remove it, or choose another directory", file=sys.stderr)
            return 1
    if not (directory / "v1").exists():
        ours.append(directory / "v1")
    directory.mkdir(parents=True, exist_ok=True)
    args.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        report = run(directory, args.small)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        show(report)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for path in ours if not args.keep else []:
            shutil.rmtree(path, ignore_errors=True)
    return 0 if report["digests_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
