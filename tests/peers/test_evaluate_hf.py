"""One exported model through lm-evaluation-harness' own `hf` model and through this project's: the same metrics."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_cases import answers, benchmark, compiled_quickly

import mesh_transformer as mt
from mesh_transformer.engine.packing import Pair
from mesh_transformer.evaluate.encoding import encode_pairs
from mesh_transformer.evaluate.perplexity import rolling_windows

# Deprecations inside torch, transformers and the harness are theirs to mend.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

N = 300  # documents of each task
TASKS = ("choosing", "last_word", "reading", "writing")


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with compiled_quickly():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Weights large enough for the likeliest token to be far ahead, small enough for perplexities to be ordinary.
    return benchmark().make_model(tmp_path_factory.mktemp("model") / "exported", layers=2, width=64, scale=0.25)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    benchmark().make_tasks(place, N)
    return place


@pytest.fixture(scope="module")
def theirs(model: Path) -> Any:
    return benchmark().open_side("hf", model, 16)


@pytest.fixture(scope="module")
def ours(model: Path) -> Any:
    return benchmark().open_side("ours", model, 16)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_metrics(task: str, tasks: Path, ours: Any, theirs: Any) -> None:
    found, _ = benchmark().run_task(ours, tasks, task)
    expected, _ = benchmark().run_task(theirs, tasks, task)
    metrics = benchmark().metrics_of(found, task)
    assert metrics == pytest.approx(benchmark().metrics_of(expected, task), rel=1e-6) and metrics
    pairs = [answers(each, task) for each in (found, expected)]
    assert len(pairs[0]) == N
    if task == "writing":
        assert pairs[0] == pairs[1]
        texts = [str(each) for each in pairs[0]]
        assert len(set(texts)) > N / 10, "the texts differ enough for the comparison to say something"
    else:
        # A score and whether it is greedy, for every answer; none of them may be far away.
        a, b = (np.concatenate([np.ravel(np.asarray(each, object)).astype(float) for each in side]) for side in pairs)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


def test_shared_contexts_are_scored_as_the_plain_path_scores_them(tasks: Path, model: Path) -> None:
    from mesh_transformer.evaluate.harness import HarnessModel

    opened = mt.load(model)
    paths = [HarnessModel.of(opened, shared=shared) for shared in (True, False)]
    found = [answers(benchmark().run_task(each, tasks, "choosing")[0], "choosing") for each in paths]
    shared, plain = (np.asarray(each, object)[..., 0].astype(float) for each in found)
    np.testing.assert_allclose(shared, plain, atol=1e-4)
    counts = [each.scorer.counts for each in paths]
    print(f"\nshared: {counts[0]}\nplain:  {counts[1]}")
    assert counts[0].read_apart == counts[1].read_apart == counts[1].read
    assert counts[0].read < 0.4 * counts[1].read, "four answers to a question, and mostly question"


def test_the_same_cuts_and_windows(ours: Any, theirs: Any) -> None:
    """Token for token, where spaces, empty contexts and borders inside a word make it hard."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer, chosen = ours._texts, random.Random(3)
    words = " ".join(benchmark().sentences(chosen, 40))
    for _ in range(300):
        start = chosen.randrange(len(words) - 40)
        cut, end = sorted(chosen.sample(range(1, 40), 2))
        context = words[start : start + cut] + " " * chosen.choice([0, 0, 1, 3])
        continuation = words[start + cut : start + end] + "<|endoftext|>" * chosen.choice([0, 0, 0, 1])
        expected = theirs._encode_pair(context, continuation)
        if context.strip() and expected[1]:
            assert tuple(map(list, encode_pairs(tokenizer, [(context, continuation)])[0])) == expected
    for n in (*range(1, 30), 255, 256, 257, 512, 600):
        for n_ctx in (1, 2, 7, 256):
            ids = list(range(n))
            windows = map(make_disjoint_window, get_rolling_token_windows(ids, 999, n_ctx, 1))
            assert list(rolling_windows(ids, 999, n_ctx)) == [Pair(*each) for each in windows]
