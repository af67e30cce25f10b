"""The tables of measurements in the documents, made from the results that they show.

    python benchmarks/tables.py [--check]

In a document, what stands between `<!-- table: NAME -->` and `<!-- end -->` is made from the newest result whose file
is `benchmarks/results/DATE-NAME.json`: a table, and how it was measured; where there is none, a line that says so.
--check changes nothing, and ends with status 1 where a document and its results differ.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import PRESETS

ROOT = Path(__file__).parents[1]
_TABLE = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_VERSIONS = ("jax", "torch", "transformers", "ctranslate2")


def rewritten(text: str, results: Path) -> str:
    """A document with its tables as its results say.

    Raises:
        SystemExit: there is a result of a benchmark of which no table is known.
    """

    def one(found: re.Match[str]) -> str:
        path = newest(results, found["name"])
        if path is None:
            return (
                f"{found[1]}\nNot measured: there is no `benchmarks/results/DATE-{found['name']}.json`.\n\n{found[3]}"
            )
        result = json.loads(path.read_text(encoding="utf-8"))
        make = TABLES.get(result.get("benchmark"))
        if make is None:
            raise SystemExit(f"{path.name}: no table is known for benchmark {result.get('benchmark')!r}")
        return found[1] + "\n" + "\n".join(make(result, path.name)) + "\n\n" + found[3]

    return _TABLE.sub(one, text)


def newest(results: Path, name: str) -> Path | None:
    """The result of the latest date; None if there is none."""
    return max(results.glob(f"????-??-??-{name}.json"), default=None)


# ------------------------------------------------------------------------------------------ a table of each benchmark


def train_table(result: dict[str, Any], file: str) -> list[str]:
    """Tokens a second and share of a bare product, then the ratios."""
    rows = [
        [name, spread(c["tokens_per_second"]), f"{c['share_of_matmul']:.0%}"]
        for name, c in result["contenders"].items()
    ]
    size = f"batch {result['batch_size']}, sequence {result['sequence_length']}"
    options = f"--batch-size {result['batch_size']} --sequence-length {result['sequence_length']}"
    return [
        *table(["", "tokens/s, median (min to max)", "of a bare product"], rows),
        "",
        *ratios(result, result["ratios"]),
        caption(result, file, size, options),
    ]


def decode_table(result: dict[str, Any], file: str) -> list[str]:
    """Tokens a second, of the bandwidth, then the best of ours over the best of the peers."""
    rows = [
        [
            name,
            spread(c["tokens_per_second"]),
            number(c["decoded_tokens_per_second"]),
            f"{c['weight_bytes_per_step'] / 1e6:,.0f}",
            "" if c["share_of_bandwidth"] is None else f"{c['share_of_bandwidth']:.0%}",
        ]
        for name, c in result["contenders"].items()
    ]
    head = ["", "tokens/s, median (min to max)", "per decoded token", "MB a step", "of the bandwidth"]
    readable = result["read_bytes_per_second"]
    size = f"batch {result['batch']}, prompt {result['prompt']}, {result['tokens']} tokens written"
    options = f"--batch {result['batch']} --prompt {result['prompt']} --tokens {result['tokens']}"
    return [
        *table(head, rows),
        "",
        *ratios(result, chosen_ratios(result)),
        f"Memory was read at {readable['median'] / 1e9:.1f} GB/s ({readable['way']}).",
        caption(result, file, size, options),
    ]


def chosen_ratios(result: dict[str, Any]) -> list[str]:
    """Names: the fastest of each kind, and ours over a peer in one precision."""
    best, names = result["best"], []
    if "peers" in best:
        names = [f"{best[kind]} over {best['peers']}" for kind in best if kind != "peers"]
    precision = {name: c["precision"] for name, c in result["contenders"].items()}
    for name in result["ratios"]:
        our, _, their = name.partition(" over ")
        if precision[our] == precision[their] and not their.startswith("torch"):
            names.append(name)
    return list(dict.fromkeys(names))


def serve_table(result: dict[str, Any], file: str) -> list[str]:
    """Tokens a second and the time to the first token."""
    rows = [
        [name, spread(c["tokens_per_second"]), f"{first['median']:.2f}", f"{first['max']:.2f}"]
        for name, c in result["contenders"].items()
        for first in [c["first_token_seconds"]]
    ]
    prompt, output = ("-".join(map(str, result[key])) for key in ("prompt_tokens", "output_tokens"))
    size = f"{result['texts']} texts, {prompt} tokens read and {output} written, {result['max_batch']} at once"
    options = f"--texts {result['texts']} --prompt-tokens {prompt} --output-tokens {output}"
    head = ["", "tokens/s, median (min to max)", "first token, s, median", "largest"]
    return [*table(head, rows), "", caption(result, file, size, f"{options} --max-batch {result['max_batch']}")]


def startup_table(result: dict[str, Any], file: str) -> list[str]:
    """Seconds of commands; of a process that generates, with an empty cache of compiled programs and a full one."""
    rows = [[f"{name}, whole process", f"{s['median']:.2f}", ""] for name, s in result["commands"].items()]
    rows += [
        [f"until: {name}", f"{seconds['median']:.2f}", f"{result['warm'][name]['median']:.2f}"]
        for name, seconds in result["cold"].items()
        if name != "python"
    ]
    how = f"`python benchmarks/startup.py --rounds {result['rounds']}`, {result['weights']}, {result['date']}; "
    how += f"`benchmarks/results/{file}`."
    return [*table(["", "seconds, median", "with the cache of the run before"], rows), "", how]


def ablation_table(result: dict[str, Any], file: str) -> list[str]:
    """Tokens a second of the training step with one thing changed, over those of the step as it is."""
    rows = [
        [dtype, form, f"{f['tokens_per_second']:,.0f}", spread_of_ratio(f["ratio"]), f"{f['temporary_mb']:,.0f}"]
        for dtype, forms in result["forms"].items()
        for form, f in forms.items()
    ]
    apart = "; ".join(
        f"{dtype} {found['largest_difference']:.1e} in {found['steps']} steps"
        for dtype, found in result["losses"].items()
    )
    machine = result["machine"]
    how = f"`python benchmarks/train_ablation.py --rounds {result['rounds']}`: {result['preset']}, batch "
    how += f"{result['batch_size']}; {machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
    how += f"jax {result['jax']}, {result['date']}; `benchmarks/results/{file}`."
    head = ["", "changed", "tokens/s", "of the step as it is, median (min to max)", "program's memory, MB"]
    note = f"Losses of the fast and the plain forms are apart by at most: {apart}."
    return [*table(head, rows), "", note, "", how]


TABLES: dict[str, Callable[[dict[str, Any], str], list[str]]] = {
    "train": train_table,
    "decode": decode_table,
    "serve": serve_table,
    "startup": startup_table,
    "train_ablation": ablation_table,
}


# --------------------------------------------------------------------------------------------------------- their parts


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def number(value: float | None) -> str:
    """Three digits, or all before the point."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def spread(found: dict[str, float]) -> str:
    """Median (min to max)."""
    return f"{number(found['median'])} ({number(found['min'])} to {number(found['max'])})"


def spread_of_ratio(found: dict[str, float]) -> str:
    """Median (min to max)."""
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def ratios(result: dict[str, Any], names: Any) -> list[str]:
    """A line of the ratios named, if there are any."""
    found = [f"{name} {result['ratios'][name]['median']:.2f}" for name in names]
    return [f"Ratios round by round, median: {'; '.join(found)}.", ""] if found else []


def caption(result: dict[str, Any], file: str, size: str, options: str) -> str:
    """What, where, with which versions, and the command."""
    cfg = ModelConfig(**result["model"])
    name = next((name for name, known in PRESETS.items() if known == cfg), None)
    machine, described = result["machine"], [c["described"] for c in result["contenders"].values()]
    found = {package: d[package] for package in _VERSIONS for d in described if package in d}
    versions = ", ".join([f"Python {machine['python']}", *(f"{k} {v}" for k, v in found.items())])
    peers = dict.fromkeys(name.split()[0] for name in result["contenders"] if not name.startswith("ours"))
    against = f" --against {','.join(peers)}" if peers else ""
    if "precisions" in result:
        options += f" --precisions {','.join(result['precisions'])}"
    model = f"--preset {name}" if name and result.get("weights", "random") == "random" else "MODEL"
    return (
        f"`mesh-transformer bench {result['benchmark']} {model} {options}{against} --rounds {result['rounds']}`: "
        f"{name or 'a model'}, {size}; {machine['processor']}, {machine['cores']} cores, {versions}, {result['date']}; "
        f"`benchmarks/results/{file}`."
    )


def main() -> None:
    """Rewrites the documents, or compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    differing = []
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text(encoding="utf-8")
        made = rewritten(text, ROOT / "benchmarks" / "results")
        if made != text:
            differing.append(document.relative_to(ROOT))
            if not check:
                document.write_text(made, encoding="utf-8")
    for name in differing:
        print(f"{name} differs from its results" if check else f"{name} written")
    if check and differing:
        sys.exit(1)


if __name__ == "__main__":
    main()
