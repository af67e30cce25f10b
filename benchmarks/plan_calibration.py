"""Compares what `mesh-transformer plan` predicts with what XLA allots to the training step.

    python benchmarks/plan_calibration.py --output benchmarks/results/DATE-plan-calibration-cpu.json
    python benchmarks/plan_calibration.py --output THE_SAME --tables docs/planning.md    # its tables anew

Random small models of several families on random meshes of up to eight fake CPU devices, with random remat,
accumulation, ZeRO stage and moment dtype; the real training step, its layers looped over as on accelerators, compiled
from abstract states. Bytes on a device are the compiled program's arguments, outputs that are not arguments written
anew, and temporaries (`memory_analysis`). Nothing is run. A CPU's program is not a TPU's: XLA schedules, fuses and lays
out otherwise there. The cases are told by a seed; those with which the plan's counts were adjusted had others
(docs/planning.md). What --output holds already is kept, so that the work can be done in pieces (--cases).

Beside that, without compiling: the stored programs of the TPU's own compiler (scripts/plan_pods.py) and of XLA's for an
H200 (benchmarks/gpu_ahead.py), and what the original published.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import random
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
N_DEVICES = 8
# Cases of GPT-J's architecture, of other families, and with low-rank adaptation.
N_GPT_J, N_FAMILIES, N_ADAPTERS = 44, 18, 18
# Positions whose logits exist at one time.
CHUNK = 1024
# Buffers are allotted before machine code is made, so that cheap machine code changes no figure.
CHEAP_CODE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def random_case(seed: int, number: int) -> dict[str, Any]:
    """A configuration: the arguments of `run_config`."""
    rng = random.Random(seed * 10_000 + number)
    mesh = dict.fromkeys(("data", "fsdp", "tensor", "pipeline"), 1)
    left = rng.choice([1, 2, 4, 8, 8, 8])
    while left > 1:
        mesh[rng.choices(list(mesh), [3, 3, 3, 1])[0]] *= 2
        left //= 2
    stages = mesh["pipeline"]
    n_layers = max(stages, rng.choice([2, 4, 6, 8, 12]) // stages * stages)
    d_model = rng.choice([128, 256, 384, 512, 768])
    n_heads = max(rng.choice([4, 8, 16]), mesh["tensor"])
    n_vocab, length = rng.choice([512, 2048, 8192, 16384]), rng.choice([64, 128, 256, 512])
    parts, rows = rng.choice([1, 1, 2, 4]), rng.choice([1, 2, 4, 8]) * stages
    zero = rng.choice([1, 3]) if mesh["fsdp"] > 1 else 1
    gather = rng.choice(["per_layer", "per_layer", "per_step"]) if zero == 3 else "per_layer"
    divided = mesh["tensor"] > 1 and rng.random() < 0.3
    if rows * length > 4096:
        rows = max(stages, 4096 // length // stages * stages)
    return {
        "model": {
            "n_layers": n_layers,
            "d_model": d_model,
            "n_heads": n_heads,
            "n_vocab": n_vocab,
            "n_ctx": length,
            "d_ff": d_model * rng.choice([2, 4, 4, 4]),
            "d_rotary": min(64, d_model // n_heads),
        },
        "train": {
            "batch_size": rows * parts * mesh["data"] * mesh["fsdp"],
            "gradient_accumulation": parts,
            "remat": rng.choice(["none", "dots", "full"]),
            "gather": gather,
            "moment_dtype": rng.choice(["float32", "float32", "float32", "bfloat16"]),
        },
        "mesh": {**mesh, "zero": zero, "shard_sequence": divided},
    }


def family_case(seed: int, number: int) -> dict[str, Any]:
    """As `random_case`, with an architecture of another family."""
    rng = random.Random(seed * 10_000 + number + 5_000)
    case = random_case(seed, number + 5_000)
    model, tensor = case["model"], case["mesh"]["tensor"]
    width, length = model["d_model"] // model["n_heads"], model["n_ctx"]
    kinds: list[dict[str, Any]] = [
        {"position": "fixed", "residual": "serial", "tied_head": True, "biases": ["qkv", "out", "mlp"]},
        {"residual": "parallel-two-norms", "rotary_layout": "half", "feed_forward": "gelu", "biases": ["qkv", "mlp"]},
        {"residual": "serial", "norm": "rms", "rotary_layout": "half", "feed_forward": "glu_silu", "biases": []},
    ]
    kind = kinds[number % 3]
    if number % 3 == 0 and rng.random() < 0.5:
        kind |= {"window": length // 2, "windowed_layers": "odd", "scale_scores": False}
    if number % 3 == 2:
        kind |= {"n_kv_heads": max(model["n_heads"] // rng.choice([1, 2, 4]), tensor), "tied_head": rng.random() < 0.5}
        kind |= {"qk_norm": rng.random() < 0.5, "window": rng.choice([0, 0, length // 2])}
        model["d_ff"] = model["d_ff"] * 3 // 4
    if kind.get("position") == "fixed":
        del model["d_rotary"]
    else:
        kind["d_rotary"] = max(2, width // rng.choice([1, 4]) // 2 * 2)
    if kind.get("windowed_layers") == "odd" and model["n_layers"] // case["mesh"]["pipeline"] % 2:
        model["n_layers"] *= 2
    return case | {"model": model | kind}


def adapter_case(seed: int, number: int) -> dict[str, Any]:
    """As `random_case` or `family_case`, by turns, with low-rank adaptation instead, on a base in 32 or 16 bits."""
    rng = random.Random(seed * 10_000 + number + 8_000)
    case = (random_case, family_case)[number % 2](seed, number + 1_000)
    mesh = case["mesh"]
    mesh |= {"data": mesh["data"] * mesh["pipeline"], "pipeline": 1}  # no adapter in a pipeline
    targets = rng.choice([["q", "v"], ["q", "k", "v", "o"], ["w_in", "w_out"]])
    lora = {"rank": rng.choice([4, 8, 16]), "targets": targets}
    return case | {"lora": lora, "base": rng.choice(["float32", "bfloat16"])}


def case_of(seed: int, number: int) -> dict[str, Any]:
    """The cases in their order: of GPT-J's architecture, of other families, with an adapter."""
    if number < N_GPT_J:
        return random_case(seed, number)
    if number < N_GPT_J + N_FAMILIES:
        return family_case(seed, number - N_GPT_J)
    return adapter_case(seed, number - N_GPT_J - N_FAMILIES)


def run_config(case: dict[str, Any]) -> Any:
    """The run of a case."""
    from mesh_transformer.config.model import GPTJ_BIASES, ModelConfig
    from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
    from mesh_transformer.config.tuning import LoraConfig

    model = ModelConfig(**{**case["model"], "biases": tuple(case["model"].get("biases", GPTJ_BIASES))})
    train = TrainConfig(steps=10, learning_rate=1e-3, compute_dtype="float32", **case["train"])
    data = DataConfig(train="none", sequence_length=model.n_ctx)
    lora = case.get("lora")
    adapter = LoraConfig(rank=lora["rank"], targets=tuple(lora["targets"])) if lora else None
    return RunConfig(name="plan", model=model, data=data, train=train, mesh=MeshConfig(**case["mesh"]), lora=adapter)


def n_devices(case: dict[str, Any]) -> int:
    """Devices of a case's mesh."""
    return math.prod(case["mesh"][axis] for axis in ("data", "fsdp", "tensor", "pipeline"))


def compiled_bytes(run: Any, base: str | None = None) -> int:
    """Bytes on a device by the compiled step; base: the dtype of a model that rests beside an adapter."""
    import jax

    from mesh_transformer.model.policy import ComputePolicy
    from mesh_transformer.sharding.layout import layout_for
    from mesh_transformer.train.loop import train_batches
    from mesh_transformer.train.state import abstract_state
    from mesh_transformer.train.step import make_train_step

    layout = layout_for(run)
    policy = ComputePolicy(dtype=run.train.compute_dtype, remat=run.train.remat, unroll=False, loss_chunk=CHUNK)
    state = adapted(run, layout, base or "float32") if run.lora else abstract_state(run, layout)
    with layout.using():
        step = jax.jit(make_train_step(run.model, run.train, policy, layout.rules, lora=run.lora), donate_argnums=0)
        lowered = step.lower(state, train_batches(run, layout).abstract)
    memory = lowered.compile().memory_analysis()
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + own + memory.temp_size_in_bytes


def adapted(run: Any, layout: Any, base: str) -> Any:
    """The abstract state of a run with an adapter, on a model in the dtype `base`."""
    import jax

    from mesh_transformer.checkpoint.lora import record_of
    from mesh_transformer.model.lora import adapt
    from mesh_transformer.model.params import map_table, shape
    from mesh_transformer.train.state import abstract_state

    def resting(spec: Any) -> jax.ShapeDtypeStruct:
        where = layout.sharding(layout.rules.param(spec.axes))
        return jax.ShapeDtypeStruct(shape(spec, run.model), base, sharding=where)

    state = abstract_state(run, layout)
    record = record_of(run.lora, run.model)
    return dataclasses.replace(state, params=adapt(map_table(resting, run.model), state.params, record.scale))


def predicted(case: dict[str, Any]) -> Any:
    """`plan.memory.StepBytes` of a case."""
    from mesh_transformer.plan.memory import step_bytes
    from mesh_transformer.plan.work import work_of

    run = run_config(case)
    base = case.get("base")
    return step_bytes(run, work_of(run, n_devices(case), dtype="float32", kernel="plain", chunk=CHUNK, base=base))


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The errors, |predicted / compiled - 1|: the middle one, the one that nine of ten do not exceed, the worst."""
    errors = sorted(abs(case["ratio"] - 1) for case in cases)
    worst = max(cases, key=lambda case: abs(case["ratio"] - 1))
    return {
        "cases": len(errors),
        "median": statistics.median(errors),
        "nine_of_ten": errors[math.ceil(0.9 * len(errors)) - 1],
        "within_10_percent": sum(error <= 0.1 for error in errors),
        "worst": worst,
    }


def of_pods() -> list[dict[str, Any]]:
    """Predictions beside the programs that scripts/plan_pods.py compiled: bfloat16 products, plain attention."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from pod_cases import DEVICES, Case
    from pod_cases import run_config as pod_run

    from mesh_transformer.plan.memory import step_bytes
    from mesh_transformer.plan.work import work_of

    stored = json.loads((ROOT / "benchmarks/results/2026-11-21-pods.json").read_text())["cases"]
    fields = [field.name for field in dataclasses.fields(Case)]
    rows = []
    for told in stored:
        compiled = told.get("compiled", {})
        case = Case(**{name: told[name] for name in fields})
        if not compiled:
            continue
        run = pod_run(case)
        total = step_bytes(run, work_of(run, case.n_devices, dtype="bfloat16", kernel="plain", chunk=CHUNK)).total
        by_compiler = compiled.get("arguments", 0) + compiled.get("temporaries", 0)
        peak = compiled.get("peak") if case.target == "tpu" else by_compiler
        row = {"name": case.name, "target": case.target, "memory": DEVICES[case.device].memory}
        rows.append(row | {"predicted": round(total), "compiled": peak or None})
    return rows


def of_gpus() -> list[dict[str, Any]]:
    """Predictions beside the steps of GPT-J-6B that benchmarks/gpu_ahead.py compiled for one H200."""
    from mesh_transformer.config.presets import preset
    from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
    from mesh_transformer.config.tuning import LoraConfig
    from mesh_transformer.plan.memory import step_bytes
    from mesh_transformer.plan.work import work_of

    rows = []
    for program in json.loads((ROOT / "benchmarks/results/2026-11-22-gpu-ahead-of-time.json").read_text())["programs"]:
        told = program.get("step")
        if told is None or told["unroll"]:  # the plan's counts are of layers that are looped over
            continue
        chosen = {name: told[name] for name in ("batch_size", "remat", "moment_dtype")}
        run = RunConfig(
            name="plan",
            model=preset("gpt-j-6b"),
            data=DataConfig(train="none", sequence_length=2048),
            train=TrainConfig(steps=1, learning_rate=1e-4, compute_dtype="bfloat16", **chosen),
            mesh=MeshConfig(),
            lora=LoraConfig(rank=8) if "base" in told else None,
        )
        how = {"kernel": told["attention"], "chunk": told["loss_chunk"], "base": told.get("base")}
        total = step_bytes(run, work_of(run, 1, dtype="bfloat16", **how), update_in_place=True).total
        compiled = program["arguments"] + program["temporaries"]
        rows.append({**told, "predicted": round(total), "compiled": compiled})
    return rows


def of_published() -> list[dict[str, Any]]:
    """Predictions beside the throughput that the original published."""
    from mesh_transformer.config.devices import device

    blog = "https://arankomatsuzaki.wordpress.com/2021/06/04/gpt-j/"
    page = "https://github.com/kingoflolz/mesh-transformer-jax, "
    tokens = 32 * 2048  # of a step on v3-32
    told = (
        ("v3-256, pretraining", "gpt-j-6b", 256, 8, 512, 16, 151_000, blog),
        ("v3-8, tuning", "gpt-j-6b", 8, 8, 16, 16, 5_000, page + "README.md"),
        ("v3-32, 6B", "gpt-j-6b", 32, 8, 32, 8, tokens / 3.37298, page + "benchmarks.md"),
        ("v3-32, 13B", "gpt-j-13b", 32, 16, 32, 16, tokens / 7.83937, page + "benchmarks.md"),
        ("v3-32, 23B", "gpt-j-23b", 32, 32, 32, 32, tokens / 13.8331, page + "benchmarks.md"),
        ("v3-32, 13B, 8 cores a replica", "gpt-j-13b", 32, 8, 32, 8, None, page + "benchmarks.md"),
        ("v3-32, 23B, 8 cores a replica", "gpt-j-23b", 32, 8, 32, 8, None, page + "benchmarks.md"),
        ("one H200", "gpt-j-6b", 1, 1, 32, 16, None, ""),
    )
    rows = []
    for name, model, n, tensor, batch, parts, published, source in told:
        accelerator = device("h200" if "H200" in name else "tpu-v3")
        one = published_plan(model, n, tensor, batch, parts, accelerator)
        row = {"name": name, "model": model, "devices": n, "tensor": tensor, "fits": one.fits, "source": source}
        row |= {"bytes": round(one.bytes.total), "usable": round(accelerator.usable), "mfu": one.time.mfu}
        rows.append(row | {"tokens_per_second": one.time.tokens_per_second, "published": published})
    return rows


def published_plan(model: str, n: int, tensor: int, batch: int, parts: int, accelerator: Any) -> Any:
    """The plan of a preset with the original's sequences of 2048 and remat."""
    from mesh_transformer.config.presets import preset
    from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
    from mesh_transformer.plan.search import plan

    train = TrainConfig(steps=1, learning_rate=1e-4, batch_size=batch, gradient_accumulation=parts, remat="full")
    data = DataConfig(train="none", sequence_length=2048)
    run = RunConfig(name="plan", model=preset(model), data=data, train=train, mesh=MeshConfig(tensor=tensor))
    return plan(run, accelerator, n)


def tables(report: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/planning.md by the name of their markers."""
    both = [report["summary"], report["adapters"]]
    rows = [
        ["cases", *(str(one["cases"]) for one in both)],
        ["median of \\|predicted / compiled - 1\\|", *(f"{one['median']:.1%}" for one in both)],
        ["nine of ten within", *(f"{one['nine_of_ten']:.1%}" for one in both)],
        ["within 10 %", *(f"{one['within_10_percent']} of {one['cases']}" for one in both)],
        ["worst", *(f"{one['worst']['ratio']:.2f}, case {one['worst']['number']}" for one in both)],
        ["its fullest moment by the plan", *(one["worst"]["moment"] for one in both)],
    ]
    made = {"plan: calibration": _table("|all parameters|an adapter", rows)}
    gpus = []
    for row in report["gpus"]:
        trained = f"an adapter, base in {row['base']}" if "base" in row else f"all, moments in {row['moment_dtype']}"
        held = [f"{row[name] / GIB:.2f}" for name in ("predicted", "compiled")]
        ratio = f"{row['predicted'] / row['compiled']:.2f}"
        gpus.append([trained, row["remat"], row["attention"], str(row["batch_size"]), *held, ratio])
    made["plan: gpus"] = _table("trained|remat|attention|sequences|predicted GiB|compiler's GiB|ratio", gpus)
    pods = []
    for row in report["pods"]:
        ratio = f"{row['predicted'] / row['compiled']:.2f}" if row["compiled"] else "the compiler refuses it"
        found = f"{row['compiled'] / GIB:.2f}" if row["compiled"] else ""
        pods.append([row["name"], f"{row['predicted'] / GIB:.2f}", found, ratio])
    made["plan: pods"] = _table("program|predicted GiB|compiler's GiB|ratio", pods)
    published = []
    for row in report["published"]:
        held = f"{row['bytes'] / GIB:.2f} of {row['usable'] / GIB:.2f}"
        told, ratio = "", ""
        if row["published"]:
            told = f"{row['published']:,.0f}"
            ratio = f"{row['tokens_per_second'] / row['published']:.2f}"
        cells = [row["name"], row["model"], str(row["tensor"]), held, "yes" if row["fits"] else "no"]
        published.append([*cells, f"{row['tokens_per_second']:,.0f}", told, ratio])
    made["plan: devices"] = _devices()
    header = "devices|model|tensor|GiB a device|fits|tokens/s predicted|published|predicted / published"
    made["plan: published"] = _table(header, published)
    return made


def _devices() -> str:
    from mesh_transformer.config.devices import DEVICES

    rows = []
    for one in DEVICES.values():
        flops = f"{one.peak('bfloat16') / 1e12:,.4g}"
        links = f"{one.near / 1e9:.4g}", "the same" if one.far == one.near else f"{one.far / 1e9:.4g}"
        held = f"{one.memory / GIB:.1f}"
        rows.append([f"`{one.name}`", held, flops, f"{one.bandwidth / 1e9:,.0f}", *links, one.source])
    return _table("device|GiB|bfloat16 Tflop/s|GB/s of memory|GB/s near|GB/s between machines|source", rows)


def _table(header: str, rows: list[list[str]]) -> str:
    columns = header.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_tables(document: Path, report: dict[str, Any]) -> None:
    """Puts the tables between their markers."""
    text = document.read_text(encoding="utf-8")
    for name, table in tables(report).items():
        block = f"<!-- {name} -->\n\n{table}\n\n<!-- end -->"
        text, n = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL)
        if n != 1:
            raise SystemExit(f'{document}: "<!-- {name} -->" and "<!-- end -->" must stand there once')
    document.write_text(text, encoding="utf-8")


def main() -> None:
    """Compiles what is missing, predicts everything anew, and writes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=2022)
    n_cases = N_GPT_J + N_FAMILIES + N_ADAPTERS
    parser.add_argument("--cases", type=int, default=n_cases, help="how many there are to be in the end")
    parser.add_argument("--tables", type=Path, help="a document, whose tables between markers are written anew")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={N_DEVICES} {CHEAP_CODE}"
    there = json.loads(options.output.read_text())["all"] if options.output.exists() else []
    known = {case["number"]: case["compiled"] for case in there}
    found: list[dict[str, Any]] = []
    for number in range(options.cases):
        case = case_of(options.seed, number)
        begun = time.perf_counter()
        compiled = known.get(number) or compiled_bytes(run_config(case), case.get("base"))
        plan = predicted(case)
        ratio = plan.total / compiled
        found.append(
            {"number": number, **case, "compiled": compiled, "predicted": round(plan.total), "moment": plan.moment}
            | {"ratio": round(ratio, 4)}
        )
        print(f"{number}: {ratio:.3f} ({time.perf_counter() - begun:.0f} s)", file=sys.stderr, flush=True)
        report = {
            "command": f"python benchmarks/plan_calibration.py --output FILE --seed {options.seed}",
            "date": datetime.date.today().isoformat(),
            "device": f"{N_DEVICES} fake CPU devices",
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
            "summary": summary([case for case in found if "lora" not in case]),
            "adapters": summary(adapters) if (adapters := [case for case in found if "lora" in case]) else None,
            "gpus": of_gpus() if number == options.cases - 1 else [],
            "pods": of_pods() if number == options.cases - 1 else [],
            "published": of_published() if number == options.cases - 1 else [],
            "all": found + [case for case in there if case["number"] > number],
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    if options.tables:
        write_tables(options.tables, report)


if __name__ == "__main__":
    main()
