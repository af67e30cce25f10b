"""lm-evaluation-harness through the real server, as `local-completions`: the scores of the model in this process."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_cases import CONTEXT, KEY, Running, compiled_quickly, save_model, sentences, serving

import mesh_transformer as mt

if importlib.util.find_spec("lm_eval"):  # where it is missing these are only collected; run, they fail
    from lm_eval.api.model import LM as Base
else:
    Base = object

pytestmark = pytest.mark.peers
N = 20  # documents of each task
SEED = 1234  # what lm-eval sends unless told otherwise
WRITTEN = 24  # tokens of a generated text at the most
SAMPLING = {"temperature": 0.7, "top_p": 0.9}
STOPS = [" token", "."]

ALL = ["choosing", "writing", "reading"]
CHOOSING = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = f"""
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {json.dumps({"until": STOPS, "max_gen_toks": WRITTEN, "do_sample": True, **SAMPLING})}
metric_list: [{{metric: exact_match}}]
"""
READING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


class InProcess(Base):  # type: ignore[misc,valid-type]
    """The model behind lm-eval's own interface."""

    def __init__(self, model: mt.Model) -> None:
        super().__init__()
        self.model = model

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [self.model.log_likelihood(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [self.model.log_likelihood("", *request.args)[0] for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        kwargs = requests[0].args[1]
        assert all(request.args[1] == kwargs for request in requests)
        options = {key: kwargs[key] for key in SAMPLING}
        prompts = [request.args[0] for request in requests]
        return written(self.model, prompts, kwargs["until"], kwargs["max_gen_toks"], **options)


def written(model: mt.Model, prompts: list[str], stop: list[str], most: int, **options: float) -> list[str]:
    # A few at one time: every number of texts under way is compiled for by itself.
    fours = [prompts[i : i + 4] for i in range(0, len(prompts), 4)]
    how: dict[str, Any] = {"max_tokens": most, "seed": SEED, "stop": stop, **options}
    return [each.text for four in fours for each in model.generate(four, **how)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(save_model(tmp_path_factory.mktemp("lm_eval") / "goose"), "--max-batch", "4", key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def model(running: Running) -> Iterator[mt.Model]:
    with compiled_quickly():
        yield mt.load(running.model)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, model: mt.Model) -> Path:
    """The three tasks: each a YAML file and a file of documents."""
    place = tmp_path_factory.mktemp("tasks")
    words = [text.split() for text in sentences(1, 4 * N)]
    questions = [" ".join(each[:-2]) for each in words[:N]]
    ends = [[" ".join(each[-2:]) for each in words[i::N]] for i in range(N)]
    # Every other answer is right.
    texts = written(model, questions, STOPS, WRITTEN, **SAMPLING)
    answers = [text if i % 2 else f"{text}, or not" for i, text in enumerate(texts)]
    documents = {
        "choosing": [{"question": q, "choices": ends[i], "label": i % 4} for i, q in enumerate(questions)],
        "writing": [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)],
        "reading": [{"text": " ".join(sentences(i, 1 + i % 4))} for i in range(N)],
    }
    for name, form in (("choosing", CHOOSING), ("writing", WRITING), ("reading", READING)):
        lines = [json.dumps(document) + "\n" for document in documents[name]]
        (place / f"{name}.jsonl").write_text("".join(lines))
        where = {"data_files": {"test": str(place / f"{name}.jsonl")}, "cache_dir": str(place / "cache")}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(where)}\ntest_split: test"
        (place / f"{name}.yaml").write_text(head + form)
    return place


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched: the libraries may have read the environment before."""
    import datasets
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def evaluate(tasks: Path, model: Any, names: list[str], **how: Any) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **how)


def answers(found: Any, task: str) -> list[Any]:
    """What the model answered to the documents of a task, in their order."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


@pytest.fixture(scope="module")
def expected(tasks: Path, model: mt.Model) -> Any:
    found = evaluate(tasks, InProcess(model), ALL)
    scores = found["results"]
    assert 0 < scores["choosing"]["acc,none"] < 1 and scores["writing"]["exact_match,none"] == 0.5
    assert len(set(map(str, answers(found, "writing")))) > N / 2
    return found


@pytest.mark.parametrize(
    ("names", "batch", "more"),
    [
        (ALL, 1, {}),
        (ALL, 5, {"tokenizer_backend": "huggingface"}),
        (ALL, 1, {"num_concurrent": 6}),
        # As text; an end-of-text before it, as "reading" has, can be given as an id only.
        (["choosing", "writing"], 3, {"num_concurrent": 4, "tokenized_requests": False}),
    ],
)
def test_the_same_scores(
    running: Running,
    tasks: Path,
    expected: Any,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    batch: int,
    more: dict[str, Any],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    how = {"model": "goose", "base_url": f"{running.url}/v1/completions", "tokenizer": str(running.model)}
    # One token is always written beside what is scored.
    how |= {"max_length": CONTEXT + 1, "max_retries": 1, **more}
    found = evaluate(tasks, "local-completions", names, model_args=how, batch_size=batch)
    for task in names:
        if task == "writing":
            assert answers(found, task) == answers(expected, task)
        else:
            pairs = [likelihoods(each, task) for each in (found, expected)]
            assert pairs[0].shape == pairs[1].shape and len(pairs[0]) == N
            np.testing.assert_allclose(*pairs, atol=1e-3)
        scores = {name: value for name, value in expected["results"][task].items() if not isinstance(value, str)}
        assert {name: found["results"][task][name] for name in scores} == pytest.approx(scores, rel=1e-4)


def likelihoods(found: Any, task: str) -> np.ndarray:
    """What was answered as numbers, a document a row; whether a text would be written greedily is 0 or 1."""
    return np.array([np.ravel(np.asarray(answer, object)).astype(float) for answer in answers(found, task)])
