"""What a run reports of itself."""

from __future__ import annotations

import contextlib
import json
import math
import types
from pathlib import Path

import jax
import pytest

from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.train.metrics import (
    EvaluationMetrics,
    MetricsFile,
    StepMetrics,
    curves_of,
    flops_per_token,
    peak_flops,
    read_metrics,
    validation_metrics,
)


def step_metrics(step: int, mfu: float | None = None) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=2.5,
        last_loss=2.0,
        z_loss=0.25,
        total_loss=2.75,
        grad_norm=1.5,
        learning_rate=1e-3,
        tokens=64 * step,
        tokens_per_second=1000.0,
        step_time=0.064,
        mfu=mfu,
    )


def test_flops_per_token_of_gpt_j_6b_by_hand() -> None:
    attention = 4 * 4096 * 4096  # q, k, v, o
    feed_forward = 2 * 4096 * 16384
    head = 4096 * 50400
    matrices = 28 * (attention + feed_forward) + head
    assert matrices == 5_843_582_976
    assert flops_per_token(preset("gpt-j-6b"), 2048) == 6 * matrices + 12 * 28 * 2048 * 4096 == 37_880_070_144


def test_flops_per_token_counts_no_table_and_no_vector() -> None:
    rotary = ModelConfig(n_layers=3, d_model=8, n_heads=2, d_ff=20, n_vocab=11, n_ctx=6, d_rotary=2)
    by_hand = 6 * (3 * (4 * 8 * 8 + 2 * 8 * 20) + 8 * 11) + 12 * 3 * 5 * 8
    assert flops_per_token(rotary, 5) == by_hand
    fixed = ModelConfig(n_layers=3, d_model=8, n_heads=2, d_ff=20, n_vocab=11, n_ctx=6, position="fixed")
    assert flops_per_token(fixed, 5) == by_hand


def test_peak_flops_is_of_the_devices_used_and_of_known_ones_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(8) is None  # a CPU
    for kind, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("TPU v3", 61.5e12)):
        device = types.SimpleNamespace(device_kind=kind)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device, device, device])
        assert peak_flops(2) == 2 * peak


def test_a_line_stands_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(step_metrics(1))
    assert json.loads(path.read_bytes()) == {
        "step": 1,
        "loss": 2.5,
        "last_loss": 2.0,
        "z_loss": 0.25,
        "total_loss": 2.75,
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "tokens": 64,
        "tokens_per_second": 1000.0,
        "step_time": 0.064,
    }
    file.write(validation_metrics(1, "pile \u2028 \u00e9", 2.0))
    file.write(step_metrics(2, mfu=0.5))
    file.close()
    again = MetricsFile(path)  # appends
    again.write(step_metrics(3))
    again.close()
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 1, 2, 3]
    assert lines[1] == {"step": 1, "validation": "pile \u2028 \u00e9", "loss": 2.0, "perplexity": math.exp(2.0)}
    assert lines[2]["mfu"] == 0.5


def test_every_line_is_json_that_any_reader_takes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(validation_metrics(1, "pile", 800.0))  # its perplexity is more than a float holds
    file.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_bytes(), parse_constant=refuse)["perplexity"] is None


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2', "{", '{"step": 2, "validation": "a\\'])
def test_read_metrics_leaves_out_a_torn_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "loss": 3.0}\n' + torn)
    assert read_metrics(path) == [{"step": 1, "loss": 3.0}]


def test_a_full_disk_is_named() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    file = MetricsFile(full)
    with pytest.raises(CheckpointError, match=r"^/dev/full: cannot be written \(No space left on device\)") as caught:
        file.write(step_metrics(1))
    assert str(caught.value).count("\n") == 1
    with contextlib.suppress(CheckpointError):  # a device cannot be synced
        file.close()


def test_lines_of_all_kinds_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(step_metrics(1))
    for name in ("b", "a"):
        file.write(validation_metrics(1, name, 2.0))
    scores = {"acc": 0.5, "acc_stderr": math.nan, "step": 9.0, "evaluation": 1.0}
    file.write(EvaluationMetrics(step=1, evaluation="piqa", metrics=scores))
    file.write(step_metrics(2))
    file.close()
    curves = curves_of(read_metrics(path))
    assert [line["step"] for line in curves.training] == [1, 2]
    assert list(curves.validation) == ["b", "a"] and len(curves.validation["a"]) == 1
    # A metric cannot take the place of the step or of the task.
    assert curves.evaluation == {"piqa": [{"step": 1, "evaluation": "piqa", "acc": 0.5, "acc_stderr": None}]}
