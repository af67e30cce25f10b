"""Two real processes compute what the first of them decides, without lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mesh_transformer as mt
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.engine.packing import Pair
from mesh_transformer.evaluate.together import Computing, _options
from mesh_transformer.model.params import abstract_params
from mesh_transformer.sample.options import SamplingOptions
from processes_cases import run_processes

CFG = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=264, n_ctx=32, d_rotary=4)
PAIRS = [([256, *b"The geese"], [*b" fly"]), ([256, *b"The geese"], [*b" swim"]), ([256], [*b"home " * 5])]
PROMPTS = [[*b"The geese"], [*b"Home"], [*b"A"]]
OPTIONS = [SamplingOptions(max_tokens=6, seed=3, sample=n, stop=("\n",), logit_bias=((65, 1.0),)) for n in range(3)]

# MODEL; "fail": the first process raises after it was followed once. What it computed goes to standard output.
SCRIPT = f"""
import json, sys
from mesh_transformer.config.errors import UserError
from mesh_transformer.api import load
from mesh_transformer.evaluate import together
from mesh_transformer.processes import Watchdog, join
from mesh_transformer.engine.packing import Pair
from mesh_transformer.sample.options import SamplingOptions
together._PIECE = 100  # a message is many pieces
processes = join(print)
model = load(sys.argv[1], mesh="data=2,tensor=2", together=True)
parts = model.config, model.params, model.policy, model.tokenizer, model.layout
computing = together.Computing(*parts, processes=processes)
pairs, prompts = {PAIRS!r}, {PROMPTS!r}
options = {OPTIONS!r}
found = []
with Watchdog(processes, 0):
    try:
        for again in range(2):
            with computing.together():
                if processes.is_first:
                    found.append(computing.score([Pair(*each) for each in pairs]))
                    if sys.argv[2:] == ["fail"]:
                        raise UserError("no such question")
                    done = [piece for piece in computing.stream(prompts, options) if piece.completion]
                    found.append([piece.completion.tokens for piece in sorted(done, key=lambda each: each.row)])
    except UserError as error:
        found = str(error)
print(json.dumps([found, computing.scorer.counts.texts]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = np.random.default_rng(1)
    params = jax.tree.map(lambda a: jnp.asarray(0.3 * chosen.normal(size=a.shape), jnp.float32), abstract_params(CFG))
    path = tmp_path_factory.mktemp("model") / "small"
    mt.Model(CFG, params, load_tokenizer("bytes")).save(path)
    return path


def said(model: Path, *arguments: str) -> list[list[object]]:
    """What each of two processes computed."""
    ended = run_processes(SCRIPT, arguments=[model, *arguments])
    assert [each.status for each in ended] == [0, 0], "\n".join(each.stderr for each in ended)
    return [json.loads(each.stdout.splitlines()[-1]) for each in ended]


def test_what_the_first_asks_all_compute(model: Path) -> None:
    opened = mt.load(model)
    alone = Computing(opened.config, opened.params, opened.policy, opened.tokenizer)
    with alone.together():
        scores = alone.score([Pair(*each) for each in PAIRS])
        done = {piece.row: piece.completion for piece in alone.stream(PROMPTS, OPTIONS) if piece.completion}
    (found, n_texts), (nothing, n_texts_of_other) = said(model)
    assert nothing == [] and n_texts == n_texts_of_other == 2 * len(PAIRS)
    for each in found[0::2]:
        np.testing.assert_allclose([s for s, _ in each], [s for s, _ in scores], atol=1e-4)
        assert [greedy for _, greedy in each] == [greedy for _, greedy in scores]
    written = [done[row].tokens for row in range(len(PROMPTS))]
    assert found[1::2] == [written, written] and written[0] != written[1]


def test_an_error_of_the_first_ends_all(model: Path) -> None:
    (first, _), (other, n_texts) = said(model, "fail")
    assert first == "no such question" and other.startswith("process 0") and other.endswith(": no such question")
    assert n_texts == len(PAIRS)


@pytest.mark.long
def test_a_text_is_scored_by_two_processes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A text of some words.\nIt goes on beyond what the context holds.\n")
    script = 'import sys; sys.argv.insert(1, "evaluate"); from mesh_transformer.cli.main import main; main()'
    figures = []
    for count in (1, 2):
        output = tmp_path / f"{count}.json"
        arguments = [model, "--text", tmp_path / "text.txt", "--output", output]
        ended = run_processes(script, count, devices=1, arguments=arguments)
        assert [each.status for each in ended] == [0] * count, "\n".join(each.stderr for each in ended)
        assert ["bits a byte" in each.stdout for each in ended] == [True, False][:count]
        figures.append(json.loads(output.read_text())["text"])
    assert figures[0].pop("file") == figures[1].pop("file")
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_options_survive_the_way() -> None:
    for each in OPTIONS:
        assert _options(json.loads(json.dumps(vars(each)))) == each
