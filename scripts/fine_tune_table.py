"""Writes the tables of memory in docs/fine-tune-gpt-j.md: what `mesh-transformer plan` says of the file shown there.

    python scripts/fine_tune_table.py

Nothing is compiled, and no device is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "fine-tune-gpt-j.md"
MARKED = re.compile(r"(<!-- plan: (all|adapter) -->\n).*?(<!-- plan: end -->)", re.DOTALL)
SHOWN = re.compile(r"<!-- file: letters\.toml -->\n```toml\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Device, how many, and options beside the page's configuration.
AT_ONCE, FSDP = "train.gradient_accumulation=1", "mesh.fsdp=8 mesh.zero=3"
ALL = (
    ("rtx-4090", 1, "train.moment_dtype=bfloat16"),
    ("h100", 1, f"{AT_ONCE} train.moment_dtype=bfloat16"),
    ("h200", 1, f"{AT_ONCE} train.moment_dtype=bfloat16"),
    ("h200", 1, f"{AT_ONCE} train.moment_dtype=bfloat16 train.remat=dots"),
    ("a100-80gb", 8, f"{AT_ONCE} {FSDP}"),
    ("tpu-v3", 8, f"{AT_ONCE} {FSDP}"),
    ("tpu-v3", 8, f"{AT_ONCE} {FSDP} train.moment_dtype=bfloat16"),
    ("tpu-v3", 8, "mesh.tensor=8"),
    ("tpu-v5p", 8, f"{AT_ONCE} {FSDP}"),
)
LORA = "--base=bfloat16 lora.rank=8"
ADAPTER = (
    ("rtx-4090", 1, LORA),
    ("rtx-4090", 1, f"{LORA} train.remat=dots"),
    ("rtx-4090", 1, "lora.rank=8"),
    ("a100-40gb", 1, f"{LORA} train.gradient_accumulation=4 train.remat=dots"),
    ("tpu-v3", 8, f"{LORA} {AT_ONCE} {FSDP}"),
    ("h200", 1, LORA),
)
CASES = {"all": ALL, "adapter": ADAPTER}
GIB = 2**30


def planned(config: Path, device: str, devices: int, options: str) -> dict[str, Any]:
    """What `plan` says of the configuration as it is given."""
    command = [sys.executable, "-m", "mesh_transformer", "plan", str(config), "--device", device]
    command += ["--devices", str(devices), "--json"]
    for option in options.split():
        command += [option] if option.startswith("--") else ["--set", option]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)["configured"]
    return found


def row(device: str, devices: int, options: str, found: dict[str, Any]) -> str:
    held = {name: size / GIB for name, size in found["bytes"].items()}
    rest = sum(held[name] for name in ("activations", "logits", "workspace"))
    over = held["total"] - held["usable"]
    verdict = "fits" if found["fits"] else f"too large by {over:.1f}"
    sizes = " | ".join(f"{held[name]:.1f}" for name in ("parameters", "optimizer", "gradients"))
    given = ", ".join(f"`{option}`" for option in options.split())
    together = f"{held['total']:.1f} of {held['usable']:.1f}"
    return f"| {devices} x {device} | {given} | {sizes} | {rest:.1f} | {together} | {verdict} |"


def table(page: str, which: str) -> str:
    """The lines between the marks. Raises AssertionError where the page has no configuration."""
    shown = SHOWN.search(page)
    assert shown, "the page shows no letters.toml"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "letters.toml"
        config.write_text(shown[1], encoding="utf-8")
        rows = [row(*case, planned(config, *case)) for case in CASES[which]]
    head = "| devices | beside the file | parameters | moments | gradients | the rest | together | |"
    return "\n".join([head, "| --- " * 8 + "|", *rows, ""])


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKED.sub(lambda match: match[1] + table(page, match[2]) + match[3], page), encoding="utf-8")


if __name__ == "__main__":
    main()
