"""scripts/plan_pods.py: what it says of memory and of sending is what the programs hold and send."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mesh_transformer.config.presets import PRESETS
from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.model.params import count_params, named_specs, shape
from mesh_transformer.sharding.layout import layout_for
from mesh_transformer.sharding.memory import state_bytes
from mesh_transformer.sharding.mesh import Sizes
from mesh_transformer.sharding.rules import rules_for
from mesh_transformer.train.state import abstract_state

SCRIPTS = Path(__file__).parents[2] / "scripts"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-21-pods.json"
DOCUMENT = Path(__file__).parents[2] / "docs" / "parallelism.md"
MESHES: list[dict[str, Any]] = [
    {"data": 8},
    {"fsdp": 8},
    {"fsdp": 8, "zero": 3},
    {"tensor": 4, "fsdp": 2, "zero": 3},
    {"tensor": 2, "pipeline": 2, "data": 2},
]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_forty_billion_parameters_that_meshes_can_divide() -> None:
    cfg = PRESETS["gpt-j-40b"]
    per_layer = 12 * 7168**2 + 2 * 7168 + 4 * 7168 + 7168  # matrices; norm; both biases of the feed-forward
    outside = 2 * 50400 * 7168 + 7168 + 2 * 7168 + 50400  # embedding, head; their biases and the norm between
    assert count_params(cfg) == 64 * per_layer + outside == 40_185_829_600
    for size in (cfg.n_heads, cfg.d_ff, cfg.n_vocab, cfg.n_layers, cfg.d_model):
        assert size % 8 == size % 16 == 0


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_bytes_of_the_state_are_those_of_its_arrays(mesh: dict[str, Any]) -> None:
    model = PRESETS["gpt-j-tiny"]
    train = TrainConfig(steps=10, learning_rate=1e-4, batch_size=16, moment_dtype="bfloat16")
    data = DataConfig(train="none", sequence_length=model.n_ctx)
    run = RunConfig(name="r", model=model, data=data, train=train, mesh=MeshConfig(**{"data": 1, **mesh}))
    layout = layout_for(run)
    table = [(spec.axes, shape(spec, model)) for spec in named_specs(model).values()]
    held = state_bytes(table, layout.rules, layout.sizes, moment_itemsize=2)
    state = abstract_state(run, layout)

    def resting(tree: Any) -> int:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.shape]
        return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)

    assert held.params == resting(state.params)
    assert held.moments == resting(state.opt_state)
    assert held.gradients == held.moments  # one value in four bytes, as two moments in two each


def test_state_of_six_billion_parameters_without_sharding_and_with() -> None:
    model = PRESETS["gpt-j-6b"]
    table = [(spec.axes, shape(spec, model)) for spec in named_specs(model).values()]
    n = count_params(model)
    whole = state_bytes(table, rules_for(Sizes(data=8)), Sizes(data=8))
    assert (whole.params, whole.gradients, whole.moments) == (4 * n, 4 * n, 8 * n)
    sizes = Sizes(fsdp=256)
    apart = state_bytes(table, rules_for(sizes, zero=3), sizes)
    without_embed = 28 * 16384 + 50400  # the biases of the feed-forward's inside and of the head
    assert apart.params + apart.gradients + apart.moments == 16 * ((n - without_embed) // 256 + without_embed)


HLO = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %g = f32[8,4]{1,0} all-gather(f32[1,4]{1,0} %x), replica_groups=[1,8]<=[8], dimensions={0}
  %h = (bf16[4]{0}, bf16[4]{0}) all-reduce(%y, %z), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(256)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[1,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%t), condition=%condition, body=%body
  %v = (s32[], f32[8,4]) while(%t), condition=%other, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %r = f32[16]{0} reduce-scatter(%q), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %s = f32[4]{0} all-gather(%q), replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}, dimensions={0}
  ROOT %c = f32[10]{0} collective-permute(%q), source_target_pairs={{0,1}}
}
"""


@pytest.mark.usefixtures("scripts")
def test_collectives_are_counted_as_often_as_they_run() -> None:
    from pod_hlo import collectives

    found = collectives(HLO)
    assert {kind: of["count"] for kind, of in found.items()} == {
        "all-gather": 8,
        "all-reduce": 7,
        "reduce-scatter": 1,
        "collective-permute": 1,
    }
    assert found["all-gather"]["in_loops"] == 7 * 128 * 7 / 8
    assert found["all-gather"]["sent"] - found["all-gather"]["in_loops"] == 16 / 2
    assert found["all-reduce"]["sent"] == 7 * 16 * 2 / 2 and found["all-reduce"]["by_group"] == {"2": 7 * 16}
    assert found["reduce-scatter"]["bytes"] == 4 * 64 and found["reduce-scatter"]["sent"] == 3 * 64
    assert found["collective-permute"]["sent"] == 40


@pytest.mark.usefixtures("scripts")
def test_a_loop_of_unknown_length_is_refused() -> None:
    from pod_hlo import collectives

    with pytest.raises(ValueError, match="a loop whose length"):
        collectives(HLO.replace("direction=LT", "direction=NE"))


@pytest.mark.usefixtures("scripts")
def test_groups_in_an_unknown_notation_are_refused() -> None:
    from pod_hlo import collectives

    with pytest.raises(ValueError, match="unknown notation"):
        collectives(HLO.replace("replica_groups=[1,8]<=[8]", "replica_groups=all"))


@pytest.mark.usefixtures("scripts")
def test_every_case_can_be_divided_and_has_a_name_of_its_own() -> None:
    from plan_pods import exact_bytes
    from pod_cases import CASES

    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert min(exact_bytes(case).values()) > 0


def compiled(target: str) -> list[tuple[Any, dict[str, float]]]:
    """The cases that were compiled for a target, and the bytes that a device sends by kind of collective."""
    from pod_cases import CASES

    report = {case["name"]: case.get("compiled", {}) for case in json.loads(RESULTS.read_text())["cases"]}
    chosen = [case for case in CASES if case.target == target and "collectives" in report[case.name]]
    return [(case, {kind: of["sent"] for kind, of in report[case.name]["collectives"].items()}) for case in chosen]


@pytest.mark.usefixtures("scripts")
def test_what_is_sent_on_paper_is_what_programs_compiled_for_cpus_send() -> None:
    from pod_links import traffic

    assert len(compiled("cpu")) >= 10
    for case, found in compiled("cpu"):
        on_paper = sum(traffic(case, gathered_itemsize=4).values())
        assert on_paper == pytest.approx(sum(found.values()), rel=0.01), case.name


@pytest.mark.usefixtures("scripts")
def test_what_is_summed_on_paper_is_what_programs_compiled_for_tpus_sum() -> None:
    """Between all of the sums that are kept in parts being sent as reduce-scatters, and none."""
    from pod_links import traffic

    cases = compiled("tpu")
    assert len(cases) >= 8
    for case, found in cases:
        if case.mesh.get("shard_sequence"):
            on_paper = sum(traffic(case, scattered=False).values())
            assert on_paper == pytest.approx(sum(found.values()), rel=0.01), case.name
            continue
        summed = found["all-reduce"] + found.get("reduce-scatter", 0)
        least, most = (
            sum(sent for what, sent in traffic(case, scattered=scattered).items() if "parameters" not in what)
            for scattered in (True, False)
        )
        assert 0.98 * least <= summed <= 1.02 * most, case.name


@pytest.mark.usefixtures("scripts")
def test_the_tables_of_the_document_are_those_of_the_report() -> None:
    from pod_tables import tables

    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in tables(json.loads(RESULTS.read_text())).items():
        assert f"<!-- {name} -->\n\n{table}\n\n<!-- end -->" in text, name


def test_a_pod_is_planned_from_the_command_line(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    command = [sys.executable, str(SCRIPTS / "plan_pods.py"), "--output", str(output), "--only", "v3-8", "--no-compile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads(output.read_text())["cases"]
    assert cases and all(case["pod"] == "v3-8" and "compiled" not in case for case in cases)
    # GPT-J-6B without sharding: 16 bytes a parameter, in memory of 16 GiB.
    whole = next(case for case in cases if case["preset"] == "gpt-j-6b" and case["mesh"] == {"data": 8})
    assert whole["room_beside_state"] == 16 * 2**30 - 16 * count_params(PRESETS["gpt-j-6b"])
