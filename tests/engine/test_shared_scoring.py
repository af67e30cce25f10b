"""Scores with shared beginnings against those without, on architectures and meshes, and what each path computes."""

from __future__ import annotations

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import mesh_from_text
from mesh_transformer.engine.packing import Pair
from mesh_transformer.engine.scoring import Scorer
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.params import abstract_params, map_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout, inference_layout
from mesh_transformer.sharding.mesh import Sizes, make_mesh
from mesh_transformer.sharding.rules import rules_for

CFG = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_vocab=64, n_ctx=48, d_rotary=4)
POLICY = ComputePolicy()
# Sums of some dozen log-probabilities in float32; the logits differ by a few units in the last place.
BOUND = 1e-4
FORMS = {
    "rotary": CFG,
    "t5": dataclasses.replace(CFG, position="t5", d_rotary=0, norm="rmsnorm"),
    "fixed": dataclasses.replace(CFG, position="fixed", d_rotary=0),
    "v2": ModelConfig(n_layers=2, d_model=32, n_heads=4, n_vocab=64, n_ctx=48, d_head=8, architecture="v2", n_shards=2),
}


def random_params(cfg: ModelConfig) -> dict:
    chosen = np.random.default_rng(3)

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray((path[-1].key == "scale") + 0.4 * chosen.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_params(cfg))


def questions(n: int = 12) -> list[Pair]:
    """Contexts of up to the whole window with four answers each, one of them a single token, in mixed order."""
    chosen = random.Random(1)
    pairs = []
    for i in range(n):
        context = [chosen.randrange(64) for _ in range(3 + (7 * i) % 56)]
        pairs += [Pair(context, [chosen.randrange(64) for _ in range(1 + k)]) for k in range(4)]
    chosen.shuffle(pairs)
    return pairs


def by_hand(params: dict, cfg: ModelConfig, pairs: list[Pair]) -> list[tuple[float, bool]]:
    """One text at a time, through the whole logits."""
    logits_of = jax.jit(lambda tokens: forward(params, tokens, cfg, POLICY)[0])
    found = []
    for pair in pairs:
        text = [*pair.context, *pair.continuation][-(cfg.n_ctx + 1) :]
        n = len(pair.continuation)
        padded = np.zeros((1, cfg.n_ctx), np.int32)
        padded[0, : len(text) - 1] = text[:-1]
        logits = np.asarray(logits_of(padded), np.float64)[len(text) - 1 - n : len(text) - 1]
        chosen = np.take_along_axis(logits, np.asarray(text[-n:])[:, None], axis=1)[:, 0]
        sums = chosen - np.log(np.exp(logits).sum(axis=1))
        found.append((float(sums.sum()), bool((logits.argmax(axis=1) == text[-n:]).all())))
    return found


def assert_alike(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], atol=BOUND)
    assert [b for _, b in found] == [b for _, b in expected]


@pytest.mark.parametrize("form", FORMS)
def test_sharing_changes_no_score(form: str) -> None:
    cfg, pairs = FORMS[form], questions()
    params = random_params(cfg)
    expected = by_hand(params, cfg, pairs)
    shared, apart = Scorer(cfg, POLICY), Scorer(cfg, POLICY)
    assert_alike(shared.score(params, pairs), expected)
    assert_alike(apart.score(params, pairs, shared=False), expected)
    tokens = sum(min(cfg.n_ctx, len(a) + len(b) - 1) for a, b in pairs)
    assert shared.counts.read_apart == apart.counts.read_apart == apart.counts.read == tokens
    assert shared.counts.read < tokens / 2
    assert shared.counts.scored == sum(len(b) for _, b in pairs) and shared.counts.padded >= shared.counts.read
    assert shared.counts.cut == sum(len(a) + len(b) - 1 > cfg.n_ctx for a, b in pairs) > 0
    assert f"{shared.counts.read:,} tokens read" in str(shared.counts) and "by itself" in str(shared.counts)
    assert "by itself" not in str(apart.counts)


def test_greedy_answers_are_known() -> None:
    params, scorer = random_params(CFG), Scorer(CFG, POLICY)
    context = [5, 9, 2]
    alone = [scorer.score(params, [Pair(context, [token])])[0] for token in range(64)]
    together = scorer.score(params, [Pair(context, [token]) for token in range(64)])
    assert_alike(together, alone)
    assert [is_greedy for _, is_greedy in together].count(True) == 1
    assert max(together)[1] and np.exp([score for score, _ in together]).sum() == pytest.approx(1, abs=1e-5)


def test_nothing_is_compiled_again() -> None:
    params, scorer = random_params(CFG), Scorer(CFG, POLICY)
    first = scorer.score(params, questions())
    compiled = scorer.n_compiled
    assert scorer.score(params, questions()) == first and scorer.n_compiled == compiled > 0


def training_layout(**axes: int | bool) -> Layout:
    how = {name: axes.pop(name) for name in ("zero", "shard_sequence") if name in axes}
    sizes = Sizes(**axes)
    return Layout(sizes=sizes, mesh=make_mesh(sizes, jax.devices()), rules=rules_for(sizes, **how))


def placed(params: dict, layout: Layout) -> dict:
    return map_table(lambda spec, w: jax.device_put(w, layout.sharding(layout.rules.param(spec.axes))), CFG, params)


@pytest.mark.parametrize(
    "mesh", ["data=2,tensor=4", "tensor=2", "data=8", "fsdp, zero 3", "sequence over tensor", "most rows"]
)
def test_meshes_score_alike(mesh: str) -> None:
    params, pairs = random_params(CFG), questions(6)
    expected = Scorer(CFG, POLICY).score(params, pairs)
    rows = None
    if mesh == "fsdp, zero 3":
        layout = training_layout(data=2, fsdp=2, tensor=2, zero=3)
    elif mesh == "sequence over tensor":
        layout = training_layout(data=2, tensor=4, shard_sequence=True)
    elif mesh == "most rows":
        layout, rows = ONE_DEVICE_LAYOUT, 1
    else:
        layout = inference_layout(mesh_from_text(mesh), CFG)
    scorer = Scorer(CFG, POLICY, layout, most_rows=rows)
    assert_alike(scorer.score(placed(params, layout), pairs), expected)


def test_a_pipeline_is_refused() -> None:
    with pytest.raises(UserError, match=r"mesh\.pipeline = 2: texts are not scored"):
        Scorer(CFG, POLICY, training_layout(pipeline=2))


def test_progress_ends_with_all_texts() -> None:
    seen: list[tuple[str, int, int]] = []
    params = random_params(CFG)
    Scorer(CFG, POLICY, most_rows=2).score(params, questions(4), progress=lambda *what: seen.append(what))
    assert seen[-1] == ("scoring", 16, 16) and [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
