"""The command `evaluate` and lm-evaluation-harness' own with the model registered; tasks that cannot be run."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluate_cases import Unopened, benchmark, compiled_quickly

import mesh_transformer as mt
from mesh_transformer import api, compat
from mesh_transformer.cli.main import main
from mesh_transformer.config.errors import UserError
from mesh_transformer.evaluate.tasks import PRESETS, load_tasks

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
N = 24


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with compiled_quickly():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark().make_model(tmp_path_factory.mktemp("model") / "exported", layers=1, width=64)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    benchmark().make_tasks(place, N)
    return place


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(compat, "prepare_process", lambda: None)
    monkeypatch.setattr(compat, "use_compile_cache", lambda: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mesh-transformer", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach somebody fails and is kept."""
    tried: list[Any] = []

    def refuse(*where: Any, **_: Any) -> Any:
        tried.append(where)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


def test_tasks_of_a_directory(command: Any, model: Path, tasks: Path, tmp_path: Path, no_network: list[Any]) -> None:
    settings = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DISABLE_MULTIPROC", "TQDM_DISABLE")
    before = [os.environ.get(name) for name in settings]
    output = tmp_path / "out.json"
    status, out, err = command(
        model, "--tasks", "choosing,last_word", "--tasks", "writing", "--include_path", tasks, "--output_path", output,
        "--limit", 10, "--log_samples", "--seed", "1,2,3,4", "--batch_size", 4, "--gen_kwargs", "max_gen_toks=3",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(output.read_text())
    assert set(found["results"]) == {"choosing", "last_word", "writing"} and "samples" not in found
    assert found["results"]["choosing"]["acc_stderr,none"] > 0 and found["n-samples"]["choosing"]["effective"] == 10
    assert found["results"]["last_word"]["perplexity_stderr,none"] > 0
    assert (found["config"]["numpy_seed"], found["config"]["fewshot_seed"]) == (2, 4)
    assert found["config"]["model_args"]["pretrained"] == str(model)
    for task in found["results"]:
        lines = (tmp_path / f"out_samples_{task}.jsonl").read_text().splitlines()
        assert len(lines) == 10 and {"doc_id", "resps"} <= json.loads(lines[0]).keys()
    assert "|choosing |" in out and "acc_norm" in out and "written:" in err
    assert "50 texts:" in err and "by itself" in err  # four answers and one last word, of ten documents each
    assert not no_network and [os.environ.get(name) for name in settings] == before
    # What the harness says of itself is not shown.
    assert not re.search(r"WARNING|INFO|\[Task|examples/s", err), err


def test_few_examples_and_text_together(command: Any, model: Path, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The geese waited for the sea slowly. " * 40)
    output = tmp_path / "out.json"
    status, out, err = command(
        model, "-t", "last_word", "--include-path", tasks, "-f", 2, "-L", 0.25, "-x", "--output", output,
        "--text", tmp_path / "text.txt", "--legacy-prompts",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(output.read_text())
    assert found["n-shot"]["last_word"] == 2 and found["text"]["words"] == 40 * 7 + 1
    sample = json.loads((tmp_path / "out_samples_last_word.jsonl").read_text().splitlines()[0])
    assert len(sample["arguments"][0][0].split("\n\n")) == 3
    assert not [name for name in found["results"]["last_word"] if name.startswith(("acc", "perplexity"))]
    assert "bits a byte" in out


def test_the_harness_own_command(model: Path, tasks: Path, tmp_path: Path) -> None:
    import subprocess

    arguments = ["--model", "mesh_transformer", "--model_args", f"pretrained={model},dtype=float32"]
    arguments += ["--tasks", "choosing,last_word", "--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    line = [sys.executable, "-m", "mesh_transformer.evaluate.lm_eval", *arguments, "--limit", "8"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MESH_TRANSFORMER_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "|choosing |" in done.stdout and "acc_norm" in done.stdout
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    here, _ = benchmark().run_task(benchmark().open_side("ours", model, 1), tasks, "choosing")
    first = [sample["acc"] for sample in sorted(here["samples"]["choosing"], key=lambda each: each["doc_id"])[:8]]
    assert found["choosing"]["acc,none"] == pytest.approx(sum(first) / 8)
    lines = [*line[:4], "mesh_transformer", "--model_args", "pretrained=/no/model", *line[7:]]
    done = subprocess.run(lines, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 2 and "error: /no/model: there is no such file" in done.stderr


def test_an_unknown_task_names_the_nearest(command: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load", Unopened())
    status, _, err = command("no-model", "--tasks", "hellaswagg")
    assert status == 2 and "task 'hellaswagg' is not known; nearest: hellaswag" in err
    status, _, err = command("no-model", "--tasks", "chosing", "--include_path", tasks)
    assert status == 2 and "nearest: choosing" in err
    status, _, err = command("no-model", "--tasks", "gpt-j-tables")
    assert status == 2 and "nearest: gpt-j-table" in err
    status, _, err = command("no-model", "--tasks", "choosing", "--include_path", tasks / "absent")
    assert status == 2 and "there is no such directory" in err


def test_data_that_cannot_be_had(
    command: Any, monkeypatch: pytest.MonkeyPatch, no_network: list[Any], tmp_path: Path
) -> None:
    monkeypatch.setattr(api, "load", Unopened())
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    status, out, err = command("no-model", "--tasks", "gpt-j-table")
    assert status == 2 and not out and len(err.splitlines()) == 1
    assert err.startswith("error: task lambada_openai: its data cannot be had (")
    assert len(no_network) < 5, "it is not tried again and again"
    import huggingface_hub

    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_task_file_of_no_data(tasks: Path, tmp_path: Path) -> None:
    head = {"task": "broken", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "/no/file.jsonl"}}}
    (tmp_path / "broken.yaml").write_text(json.dumps(head | {"test_split": "test", "output_type": "loglikelihood"}))
    with pytest.raises(UserError, match=r"task broken: its data cannot be had \("):
        load_tasks(["broken"], include_path=str(tmp_path))


def test_the_preset(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With local tasks in place of the six, so that nothing is fetched."""
    assert set(PRESETS["gpt-j-table"]) == {
        "lambada_openai", "piqa", "hellaswag", "winogrande", "mathqa", "pubmedqa", "lambada_openai_cloze_yaml",
    }  # fmt: skip
    assert set(PRESETS["gpt-j-table"].values()) == {0, 15}
    monkeypatch.setitem(PRESETS, "gpt-j-table", {"choosing": 0, "last_word": 15})
    found = load_tasks(["gpt-j-table"], include_path=str(tasks)).by_name
    assert {name: task.get_config("num_fewshot") for name, task in found.items()} == {"choosing": 0, "last_word": 15}
    with pytest.raises(UserError, match="says itself how many examples"):
        load_tasks(["gpt-j-table"], include_path=str(tasks), num_fewshot=3)


def test_names_with_stars(tasks: Path) -> None:
    assert set(load_tasks(["last_w*d", "choo?ing"], include_path=str(tasks)).by_name) == {"last_word", "choosing"}


def test_legacy_prompts(model: Path) -> None:
    """Against the original's rules written out: the newest tokens of end-of-text, context and continuation."""
    from lm_eval.api.instance import Instance

    from mesh_transformer.evaluate.harness import HarnessModel

    opened = mt.load(model)
    texts = [("The geese counted ", "every token."), ("", "A river"), ("by heart. " * 200, "the ﬁeld")]
    requests = [Instance("loglikelihood", {}, text, 0) for text in texts]
    found = HarnessModel.of(opened, legacy_prompts=True).loglikelihood(requests)
    tokenizer = opened.tokenizer
    assert tokenizer is not None
    for (context, continuation), (score, _) in zip(texts, found, strict=True):
        tail = tokenizer.encode(continuation.replace("ﬁ", "fi"))
        ids = [tokenizer.end_of_text, *tokenizer.encode(context), *tail][-opened.config.n_ctx :]
        expected, _ = opened._score(ids[: -len(tail)], ids[-len(tail) :])
        assert score == pytest.approx(expected, abs=1e-4)
    plain = HarnessModel.of(opened).loglikelihood(requests)
    assert abs(plain[0][0] - found[0][0]) > 1e-2


def test_several_completions_of_one_prompt(model: Path) -> None:
    from lm_eval.api.instance import Instance

    from mesh_transformer.evaluate.harness import HarnessModel

    how = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = [Instance("generate_until", {}, ("The geese", how), i) for i in range(4)]
    written = [HarnessModel.of(mt.load(model), seed=seed).generate_until(requests) for seed in (1, 1, 2)]
    assert written[0] == written[1] != written[2] and len(set(written[0])) > 1
