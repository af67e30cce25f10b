"""The plan's bytes beside those of compiled training steps on eight fake CPU devices."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plan_calibration as calibration  # noqa: E402

from mesh_transformer.config.devices import device  # noqa: E402
from mesh_transformer.plan import search  # noqa: E402

RESULT = ROOT / "benchmarks/results/2026-11-22-plan-calibration-cpu.json"


def case(remat: str, parts: int = 1, *, n_layers: int = 2, d_model: int = 256, length: int = 128, **mesh: Any) -> Any:
    model = {"n_layers": n_layers, "d_model": d_model, "n_heads": 8, "n_vocab": 2048, "n_ctx": length, "d_rotary": 32}
    train = {"batch_size": 16, "gradient_accumulation": parts, "remat": remat}
    return {"model": model, "train": train, "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "pipeline": 1, **mesh}}


@pytest.mark.parametrize(
    "planned",
    [
        case("full", fsdp=2, tensor=4),
        pytest.param(case("dots", 2, data=2, fsdp=4, zero=3, d_model=512), marks=pytest.mark.long),
        pytest.param(case("none", data=8, length=256), marks=pytest.mark.long),
    ],
    ids=["full", "dots", "none"],
)
def test_bytes_are_those_of_the_compiled_step(planned: Any) -> None:
    compiled = calibration.compiled_bytes(calibration.run_config(planned))
    assert calibration.predicted(planned).total == pytest.approx(compiled, rel=0.12)


def test_the_stored_calibration_is_within_its_bound() -> None:
    report = json.loads(RESULT.read_text())
    cases = report["all"]
    assert len(cases) >= 40
    for one in cases:  # the formulas of today give what the result says
        assert calibration.predicted(one).total / one["compiled"] == pytest.approx(one["ratio"], abs=1e-3)
    found = calibration.summary([one for one in cases if "lora" not in one])
    assert found == report["summary"] and found["cases"] == 62
    assert found["median"] < 0.05 and found["nine_of_ten"] < 0.1
    adapters = calibration.summary([one for one in cases if "lora" in one])
    assert adapters == report["adapters"] and adapters["cases"] == 18
    assert adapters["median"] < 0.1


def test_bytes_on_one_h200_are_near_those_of_a_gpus_compiler() -> None:
    rows = calibration.of_gpus()
    assert {row.get("base") for row in rows} == {None, "bfloat16", "float32"} and len(rows) == 8
    assert all(0.95 < row["predicted"] / row["compiled"] < 1.18 for row in rows)
    # The command takes the same way.
    run = calibration.run_config(case("full"))
    gpu, cpu = (search.plan(run, device(name), 1).bytes for name in ("h200", "cpu"))
    assert gpu.moment != "update" and gpu.total <= cpu.total


def test_bytes_of_large_models_are_near_those_of_a_tpus_compiler() -> None:
    rows = calibration.of_pods()
    fits = [row["predicted"] / row["compiled"] for row in rows if row["compiled"]]
    assert len(fits) > 20 and all(0.88 < ratio < 1.16 for ratio in fits)
    refused = [row for row in rows if not row["compiled"]]
    assert len(refused) == 2 and all(row["predicted"] > 15.48 / 16 * row["memory"] for row in refused)


def test_tables_of_the_document_are_those_of_the_formulas() -> None:
    report = json.loads(RESULT.read_text())
    assert report["pods"] == calibration.of_pods() and report["published"] == calibration.of_published()
    assert report["gpus"] == calibration.of_gpus()
    text = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    for name, table in calibration.tables(report).items():
        assert f"<!-- {name} -->\n\n{table}\n\n<!-- end -->" in text, name


@pytest.mark.long
def test_every_case_of_the_calibration_compiles_to_what_is_stored() -> None:
    for one in json.loads(RESULT.read_text())["all"]:
        compiled = calibration.compiled_bytes(calibration.run_config(one), one.get("base"))
        assert compiled == pytest.approx(one["compiled"], rel=1e-3)
