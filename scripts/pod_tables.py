"""The tables of docs/parallelism.md, from the report of scripts/plan_pods.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from pod_cases import DEVICES, GIB, LAYERS_FEW, LAYERS_MORE, Case
from pod_links import PAPER, arithmetic_seconds, seconds, traffic


def write_tables(document: Path, report: dict[str, Any]) -> None:
    """Puts the tables between their markers in a document."""
    text = document.read_text(encoding="utf-8")
    for name, table in tables(report).items():
        block = f"<!-- {name} -->\n\n{table}\n\n<!-- end -->"
        text, n = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL)
        if n != 1:
            raise SystemExit(f'{document}: "<!-- {name} -->" and "<!-- end -->" must stand there once')
    document.write_text(text, encoding="utf-8")


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Each table by the name of its marker."""
    cases = report["cases"]
    made = {"pods: tpu": _fits([c for c in cases if c["target"] == "tpu"])}
    made["pods: cpu"] = _fits([c for c in cases if c["target"] == "cpu" and c["device"] == "H100" and not c["length"]])
    made["pods: sent"] = _sent(cases)
    made["pods: paper"] = _paper()
    made["pods: links"] = _links()
    made["pods: strategies"] = _strategies(report.get("strategies", {}))
    return made


def _rows(header: str, rows: list[list[str]]) -> str:
    columns = header.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def _mesh(case: dict[str, Any]) -> str:
    return case["name"].split(": ", 1)[1].split(", ", 1)[1].rsplit(", ", 1)[0]


def _verdict(case: dict[str, Any]) -> str:
    memory, room = DEVICES[case["device"]].memory, case["room_beside_state"]
    compiled = case.get("compiled")
    if room <= 0:
        return f"no: the state and its gradients alone exceed {_gib(memory)} by {_gib(-room)}"
    if compiled is None:
        return "not compiled"
    if "refused" in compiled:
        return f"no, says the compiler: {compiled['refused']}"
    if case["target"] == "tpu":
        return f"yes, peak {_gib(compiled['peak'])} of {_gib(memory)}"
    needed = compiled["arguments"] + compiled["temporaries"]
    return f"{'yes' if needed < memory else 'no'}, estimated {_gib(needed)} of {_gib(memory)}"


def _fits(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        exact, compiled = case["exact"], case.get("compiled", {})
        temporaries = _gib(compiled["temporaries"]) if "temporaries" in compiled else ""
        bytes_held = [_gib(exact[what]) for what in ("params", "moments", "gradients")]
        batch = f"{case['rows']} / {case['batch_size']}"
        rows.append([case["pod"], case["preset"], _mesh(case), batch, *bytes_held, temporaries, _verdict(case)])
    header = "pod | model | mesh | sequences a device / step | parameters | moments | gradients | temporaries | fits"
    return _rows(header, rows)


def _sent(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        found = case.get("compiled", {}).get("collectives")
        if found and not case["length"]:
            kinds = [f"{kind} {of['count']} x, {of['sent'] / 1e9:.1f}" for kind, of in sorted(found.items())]
            total = sum(of["sent"] for of in found.values()) / 1e9
            planned = Case(**{field.name: case[field.name] for field in dataclasses.fields(Case)})
            formulas = sum(traffic(planned, gathered_itemsize=2 if planned.target == "tpu" else 4).values()) / 1e9
            target = case["target"].upper()
            cells = [case["pod"], case["preset"], _mesh(case), str(case["rows"]), target, "; ".join(kinds)]
            rows.append([*cells, f"{total:.1f}", f"{formulas:.1f}"])
    header = "pod | model | mesh | sequences | compiler | collectives, GB sent | GB in all | GB by the formulas"
    return _rows(header, rows)


def _paper() -> str:
    rows = []
    for case in PAPER:
        sent, times = traffic(case), seconds(case)
        parts = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in sent.items())
        total, arithmetic = sum(times.values()), arithmetic_seconds(case)
        cells = [case.pod, case.mesh_name, parts, f"{total:.2f}", f"{arithmetic:.2f}", f"{total / arithmetic:.1f}"]
        rows.append(cells)
    return _rows("pod | mesh | GB sent by a device in a step | seconds | arithmetic, seconds | ratio", rows)


def _links() -> str:
    rows = []
    for name, device in DEVICES.items():
        far = "the same" if device.far == device.near else f"{device.far / 1e9:.0f}"
        cells = [name, _gib(device.memory), f"{device.peak('bfloat16') / 1e12:.1f}", f"{device.near / 1e9:.0f}", far]
        rows.append([*cells, device.source])
    return _rows("device | GiB | Tflop/s bfloat16 | GB/s near | GB/s between nodes | source", rows)


def _strategies(found: dict[str, Any]) -> str:
    def told(counts: dict[str, float]) -> str:
        return ", ".join(f"{n:g} {kind}" for kind, n in sorted(counts.items()) if n) or "none"

    rows = []
    for name, of in found.items():
        few, many = of["few"], of["many"]
        looped = [sum(kind["in_loops"] for kind in counted.values()) for counted in (few, many)]
        layer = (looped[1] - looped[0]) / LAYERS_MORE
        beside = sum(kind["sent"] for kind in few.values()) - LAYERS_FEW * layer
        rows.append([name, told(of["a_layer"]), f"{layer / 1e6:.2f}", told(of["a_step"]), f"{beside / 1e6:.1f}"])
    return _rows("mesh | in each layer | MB | in each step beside | MB", rows)
