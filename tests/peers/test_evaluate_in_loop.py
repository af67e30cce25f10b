"""Evaluation during training: the same numbers as the harness' own run, nothing compiled again, faults before it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from evaluate_cases import benchmark, compiled_quickly

import mesh_transformer as mt
from mesh_transformer.config.errors import UserError
from mesh_transformer.config.tuning import EvaluateConfig
from mesh_transformer.evaluate.in_loop import TrainingEvaluation
from mesh_transformer.model.params import map_table
from mesh_transformer.sharding.layout import Layout
from mesh_transformer.sharding.mesh import Sizes, make_mesh
from mesh_transformer.sharding.rules import rules_for
from mesh_transformer.train.metrics import EvaluationMetrics, fields_of

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
N = 40
NAMES = ("choosing", "last_word", "reading", "writing")


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with compiled_quickly():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> mt.Model:
    place = tmp_path_factory.mktemp("model") / "exported"
    return mt.load(benchmark().make_model(place, layers=1, width=64))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    benchmark().make_tasks(place, N)
    return place


def evaluation(model: mt.Model, place: Path, layout: Layout | None = None, **how: Any) -> TrainingEvaluation:
    asked = EvaluateConfig(**{"tasks": NAMES, "every": 2, "include_path": str(place), **how})
    return TrainingEvaluation(asked, model.config, model.policy, model.tokenizer, layout or model.layout)


@pytest.fixture(scope="module")
def expected(model: mt.Model, tasks: Path) -> dict[str, float]:
    opened = benchmark().open_side("hf", model.source.path, 8)  # type: ignore[union-attr]
    metrics: dict[str, float] = {}
    for name in ("choosing", "last_word", "reading"):
        found, _ = benchmark().run_task(opened, tasks, name)
        metrics |= {f"{name} {key}": value for key, value in benchmark().metrics_of(found, name).items()}
    return {key: value for key, value in metrics.items() if "stderr" not in key}


def assert_as_expected(found: dict[str, dict[str, float]], expected: dict[str, float]) -> None:
    flat = {f"{task} {metric},none": value for task, metrics in found.items() for metric, value in metrics.items()}
    assert {key: flat[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_again_and_again(model: mt.Model, tasks: Path, expected: dict[str, float]) -> None:
    evaluate = evaluation(model, tasks)
    assert evaluate.tasks == NAMES and evaluate.n_compiled == 0
    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    first = evaluate(model.params)
    compiled = evaluate.n_compiled
    assert_as_expected(first, expected)
    assert first["choosing"]["acc_stderr"] > 0 and first["last_word"]["perplexity_stderr"] > 0
    assert evaluate(model.params) == first and evaluate.n_compiled == compiled > 0
    other = evaluate(jax.tree.map(lambda w: 0.5 * w, model.params))
    assert other["reading"] != first["reading"] and evaluate.n_compiled == compiled
    assert evaluate(model.params) == first
    # A training's own random numbers are not touched.
    assert random.getstate() == state and np.random.get_state()[1].tolist() == numpy_state
    lines = [fields_of(EvaluationMetrics(step=7, evaluation=task, metrics=found)) for task, found in first.items()]
    assert [line["evaluation"] for line in lines] == list(NAMES) and {line["step"] for line in lines} == {7}
    assert lines[0]["acc"] == first["choosing"]["acc"] and all(
        isinstance(v, float | int | str) for v in lines[0].values()
    )


def test_on_the_layout_of_a_training(model: mt.Model, tasks: Path, expected: dict[str, float]) -> None:
    sizes = Sizes(data=2, fsdp=2, tensor=2)
    layout = Layout(sizes=sizes, mesh=make_mesh(sizes, jax.devices()), rules=rules_for(sizes, zero=3))
    place = lambda spec, w: jax.device_put(w, layout.sharding(layout.rules.param(spec.axes)))  # noqa: E731
    params = map_table(place, model.config, model.params)
    alone = evaluation(model, tasks, tasks=("writing",))(model.params)
    found = evaluation(model, tasks, layout)(params)
    assert_as_expected(found, expected)
    assert found["writing"] == alone["writing"]


def test_limit_and_examples(model: mt.Model, tasks: Path) -> None:
    few = evaluation(model, tasks, tasks=("last_word",), limit=5, num_fewshot=2)
    found = few(model.params)["last_word"]
    assert found["acc"] in {0, 0.2, 0.4, 0.6, 0.8, 1}
    assert found != evaluation(model, tasks, tasks=("last_word",), limit=5)(model.params)["last_word"]


def test_faults_are_found_before_the_training(model: mt.Model, tasks: Path) -> None:
    with pytest.raises(UserError, match="task 'chosing' is not known; nearest: choosing"):
        evaluation(model, tasks, tasks=("chosing",))
    with pytest.raises(UserError, match="this model has no tokenizer"):
        TrainingEvaluation(
            EvaluateConfig(tasks=("choosing",), every=1, include_path=str(tasks)), model.config, model.policy, None
        )
    sizes = Sizes(pipeline=2)
    layout = Layout(sizes=sizes, mesh=make_mesh(sizes, jax.devices()), rules=rules_for(sizes))
    with pytest.raises(UserError, match=r"mesh\.pipeline = 2"):
        evaluation(model, tasks, layout)
