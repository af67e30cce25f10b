"""Fine-tuning a model on a folder of text, all its parameters and by low-rank adaptation, one after the other.

    python benchmarks/fine_tune.py MODEL TEXT... --out DIR [--steps N] [--rank R] [--output FILE]

Runs `prepare` and `train --init-from MODEL` as a user would, each training in a process of its own, and prints JSON:
of both, the mean validation loss before and after in nats a token, the largest memory that the process held, tokens a
second (the median over steps, the first two left out), bytes of the newest checkpoint, and the values that were
trained. Learning rates are in the ranges that the project advises; `--full-rate` and `--lora-rate` set others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

PROGRAM = [sys.executable, "-m", "mesh_transformer"]


def run_program(*arguments: str) -> int:
    """Runs a command of this project; returns the most memory that its process held, in bytes.

    Raises:
        SystemExit: it failed.
    """
    child = os.spawnv(os.P_NOWAIT, sys.executable, [*PROGRAM, *arguments])
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"mesh-transformer {' '.join(arguments)} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


def validation_losses(run: Path) -> list[float]:
    """The mean losses on the validation set, in the order of the steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "validation" in line]


def measure(run: Any, model: str) -> dict[str, Any]:
    """Trains `run` from `model`; what it cost and what it brought."""
    from mesh_transformer.config.load import to_toml

    directory = run.run_directory
    config = directory.with_suffix(".toml")
    config.write_text(to_toml(run), encoding="utf-8")
    peak = run_program("train", str(config), "--init-from", model, "--fresh-optimizer")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "validation" not in line][2:]
    newest = max((directory / "checkpoints").iterdir(), key=lambda path: int(path.name))
    arrays = json.loads((newest / "checkpoint.json").read_text())["arrays"]
    trained = [entry["shape"] for name, entry in arrays.items() if name.startswith("params/")]
    return {
        "learning_rate": run.train.learning_rate,
        "validation_loss": validation_losses(directory)[-1],
        "peak_memory_bytes": peak,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "checkpoint_bytes": sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()),
        "trained_parameters": sum(_product(shape) for shape in trained),
    }


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", nargs="+", help="files or folders of text")
    parser.add_argument("--out", type=Path, required=True, help="data and runs are written here; emptied first")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="q,k,v,o,w_in,w_out")
    parser.add_argument("--full-rate", type=float, default=5e-5)
    parser.add_argument("--lora-rate", type=float, default=5e-4)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()

    from mesh_transformer.checkpoint.models import open_weights
    from mesh_transformer.config.run import DataConfig, LogConfig, RunConfig, TrainConfig
    from mesh_transformer.config.tuning import LoraConfig
    from mesh_transformer.model.params import count_params

    weights = open_weights(given.model)
    tokenizer = weights.tokenizer_file()
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    how = ["--tokenizer", str(tokenizer)] if tokenizer else []
    how += ["--sequence-length", str(weights.cfg.n_ctx), "--validation-fraction", "0.1"]
    run_program("prepare", *given.text, "--out", str(given.out / "data" / "text"), *how)
    train, validation = (given.out / "data" / f"text{kind}.index" for kind in ("", ".val"))

    def run(name: str, rate: float, lora: LoraConfig | None = None, steps: int = given.steps) -> RunConfig:
        return RunConfig(
            name=name,
            model=weights.cfg,
            data=DataConfig(train=str(train), validation={"text": str(validation)}, sequence_length=weights.cfg.n_ctx),
            train=TrainConfig(
                steps=steps,
                batch_size=given.batch_size,
                learning_rate=rate,
                warmup_steps=max(1, steps // 15),
                validate_every=steps,
                checkpoint_every=steps,
            ),
            log=LogConfig(directory=str(given.out.absolute()), tensorboard=False),
            lora=lora,
        )

    # The rate of the first update is zero: what is validated after it is the model that was given.
    before = measure(run("before", given.full_rate, steps=1), given.model)["validation_loss"]
    lora = LoraConfig(rank=given.rank, targets=tuple(given.targets.split(",")))
    results = {
        "full": measure(run("full", given.full_rate), given.model),
        "lora": measure(run("lora", given.lora_rate, lora), given.model),
    }
    report = {
        "model": {"path": given.model, "parameters": count_params(weights.cfg), "stored": weights.main_dtype.name},
        "steps": given.steps,
        "batch_size": given.batch_size,
        "sequence_length": weights.cfg.n_ctx,
        "adapter": dataclasses.asdict(lora),
        "validation_loss_before": before,
        **results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
