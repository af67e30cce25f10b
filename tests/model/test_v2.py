"""The v2 architecture against its slow reference over the fused arrays: logits, losses, gradients, cache, table."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_v2
from cached_reader import PAGE, Reader

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.engine.generator import Generator
from mesh_transformer.model import decoder, layers
from mesh_transformer.model import params as table
from mesh_transformer.model.loss import loss_report, score_logits
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.sample.options import SamplingOptions

PLAIN = ComputePolicy(dtype="float32")
# Eight heads of width six, 48 in all, beside a stream of 16: H dh is not d, and no two sizes are alike by chance.
SIZES = reference_v2.Sizes(layers=2, d=16, heads=8, d_head=6, vocab=23, shards=4, rotary=4)
ROWS = np.random.default_rng(3).integers(0, SIZES.vocab, (2, 13)).astype(np.int32)


def architecture(at: reference_v2.Sizes, **fields: Any) -> ModelConfig:
    sizes = {"n_layers": at.layers, "d_model": at.d, "n_heads": at.heads, "d_head": at.d_head, "n_vocab": at.vocab}
    sizes |= {"n_shards": at.shards, "d_rotary": at.rotary, "n_ctx": 16}
    return ModelConfig(architecture="v2", **sizes | fields)


def reference_logits(arrays: Any, rows: np.ndarray, at: reference_v2.Sizes) -> np.ndarray:
    return np.stack([reference_v2.forward(arrays, row, at) for row in rows])


def at_once(f: Callable[..., Any], *given: Any) -> Any:
    """Operation by operation: compiling every variant would take longer."""
    with jax.disable_jit():
        return f(*jax.tree.map(jnp.asarray, given))


CFG = architecture(SIZES)


@pytest.fixture(scope="module")
def arrays() -> Any:
    return reference_v2.random_arrays(SIZES, seed=0)


@pytest.fixture(scope="module")
def params(arrays) -> Any:
    return reference_v2.split(arrays, SIZES)


# ------------------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("rotary", [4, 6])
@pytest.mark.parametrize("shards", [1, 4, 8])
def test_logits_equal_the_reference(shards: int, rotary: int) -> None:
    at = dataclasses.replace(SIZES, shards=shards, rotary=rotary)
    cfg = architecture(at, d_rotary=0 if rotary == 6 else rotary)  # left out it is d_head, not the merged width
    arrays = reference_v2.random_arrays(at, seed=shards)
    expected = reference_logits(arrays, ROWS, at)
    split = reference_v2.split(arrays, at)
    assert jax.tree.map(np.shape, split) == jax.tree.map(lambda a: a.shape, table.abstract_params(cfg))
    got = at_once(lambda p, t: decoder.forward(p, t, cfg, PLAIN), split, ROWS)
    assert got.dtype == jnp.float32 and expected.std() >= 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def swapped(p: Any, a: str, b: str) -> Any:
    return p | {a: p[b], b: p[a]}


def merged_width_under_the_root(patch: pytest.MonkeyPatch) -> None:
    original = layers.attention
    patch.setattr(layers, "attention", lambda q, *rest: original(q * math.sqrt(SIZES.d_head / SIZES.loc), *rest))


def v_before_k(patch: pytest.MonkeyPatch) -> None:
    original = decoder.self_attention
    patch.setattr(decoder, "self_attention", lambda h, p, *rest: original(h, swapped(p, "k", "v"), *rest))


def biases_of_v_and_k(patch: pytest.MonkeyPatch) -> None:
    original = decoder.self_attention
    patch.setattr(decoder, "self_attention", lambda h, p, *rest: original(h, swapped(p, "b_k", "b_v"), *rest))


def gate_before_linear(patch: pytest.MonkeyPatch) -> None:
    original = layers.feed_forward
    patch.setattr(layers, "feed_forward", lambda h, p, *rest: original(h, swapped(p, "w_in", "w_gate"), *rest))


def biases_of_gate_and_linear(patch: pytest.MonkeyPatch) -> None:
    original = layers.feed_forward
    patch.setattr(layers, "feed_forward", lambda h, p, *rest: original(h, swapped(p, "b_in", "b_gate"), *rest))


MISTAKES = [
    merged_width_under_the_root,
    v_before_k,
    biases_of_v_and_k,
    gate_before_linear,
    biases_of_gate_and_linear,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_the_comparison_sees_a_mistake(mistake: Callable[..., None], arrays, params, monkeypatch) -> None:
    mistake(monkeypatch)
    got = at_once(lambda p, t: decoder.forward(p, t, CFG, PLAIN), params, ROWS)
    assert np.abs(got - reference_logits(arrays, ROWS, SIZES)).max() > 0.01


# --------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", ["legacy", pytest.param("log_partition", marks=pytest.mark.long)])
def test_gradients_equal_finite_differences_of_the_reference(kind: Any, arrays, params) -> None:
    """Along a step in every fused array; the maximum in the z term moves with the logits, as v2's does."""
    run = lambda p, rows: loss_report(p, rows, CFG, PLAIN, z_loss=0.05, z_loss_kind=kind).total  # noqa: E731
    value, gradients = at_once(jax.value_and_grad(run), params, ROWS)

    def total(given: Any) -> float:
        return reference.total_loss(
            reference.score(reference_logits(given, ROWS[:, :-1], SIZES), ROWS[:, 1:]), 0.05, kind
        )

    base = {name: array.astype(np.float64) for name, array in arrays.items()}
    assert float(value) == pytest.approx(total(base), rel=2e-6)
    random = np.random.default_rng(11)
    for name in base:
        step = random.standard_normal(base[name].shape)
        alone = {other: step if other == name else np.zeros_like(a) for other, a in base.items()}
        h = 1e-6
        measured = (total(base | {name: base[name] + h * step}) - total(base | {name: base[name] - h * step})) / (2 * h)
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(reference_v2.split(alone, SIZES)), strict=True)
        claimed = sum(float((np.asarray(g, np.float64) * s).sum()) for g, s in pairs)
        assert claimed == pytest.approx(measured, rel=1e-4, abs=2e-6), name


def test_chunks_and_recomputation_change_nothing(params) -> None:
    def run(policy: ComputePolicy, p: Any, rows: Any) -> Any:
        return loss_report(p, rows, CFG, policy, z_loss=0.05, z_loss_kind="legacy").total

    value, gradients = at_once(jax.value_and_grad(functools.partial(run, PLAIN)), params, ROWS)
    chunked = functools.partial(run, ComputePolicy(loss_chunk=14, remat="full"))
    other, others = jax.jit(jax.value_and_grad(chunked))(params, ROWS)
    assert float(other) == pytest.approx(float(value), rel=1e-6)
    for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * float(np.abs(b).max()))


def logits_and_targets() -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(5)
    logits = (4 * random.standard_normal((2, 7, 11))).astype(np.float32)
    targets = random.integers(0, 11, (2, 7)).astype(np.int32)
    return jnp.asarray(logits), jnp.asarray(targets)


@pytest.mark.parametrize("moves", [True, False], ids=["v2", "v1"])
def test_the_gradient_of_the_legacy_z_term(moves: bool) -> None:
    """2e-4 lse (softmax - onehot(argmax)) / count in v2, without the one-hot in v1 (docs/formats.md, section 4)."""
    logits, targets = logits_and_targets()
    z = lambda x: 1e-4 * jnp.mean(jnp.square(score_logits(x, targets, moving_maximum=moves).log_sum))  # noqa: E731
    exact = np.asarray(logits, np.float64)
    shifted = np.exp(exact - exact.max(axis=-1, keepdims=True))
    sums = shifted.sum(axis=-1, keepdims=True)
    expected = shifted / sums - (np.eye(11)[exact.argmax(axis=-1)] if moves else 0)
    expected = 2e-4 * np.log(sums) * expected / (2 * 7)
    np.testing.assert_allclose(jax.grad(z)(logits), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_the_moving_maximum_is_only_in_the_z_term() -> None:
    logits, targets = logits_and_targets()
    still, moving = (score_logits(logits, targets, moving_maximum=moves) for moves in (False, True))
    for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(moving), strict=True):
        np.testing.assert_array_equal(a, b)
    for field in ("loss", "log_partition"):
        total = lambda x, moves, field=field: getattr(score_logits(x, targets, moving_maximum=moves), field).sum()  # noqa: E731
        still, moving = (jax.grad(functools.partial(total, moves=moves))(logits) for moves in (False, True))
        np.testing.assert_array_equal(still, moving)


@pytest.mark.parametrize("architecture", ["v1", "v2"])
def test_the_architecture_decides_whether_the_maximum_moves(architecture: str, params) -> None:
    """Through the head's bias: in v2 a constant added to the logits moves nothing, so that its gradient sums to 0."""
    cfg, p = CFG, params
    if architecture == "v1":
        cfg = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=23, n_ctx=16)
        p = reference.random_params(table.abstract_params(cfg), seed=1)

    def run(b: Any, p: Any) -> Any:
        given = p | {"head": p["head"] | {"b": b}}
        return loss_report(given, jnp.asarray(ROWS), cfg, PLAIN, z_loss=1.0, z_loss_kind="legacy").total

    slope = float(at_once(jax.grad(run), p["head"]["b"], p).sum())
    assert abs(slope) < 1e-5 if architecture == "v2" else slope > 0.1


# ------------------------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("shards", [1, 8])
def test_reading_token_by_token_equals_reading_at_once(shards: int) -> None:
    at = dataclasses.replace(SIZES, shards=shards)
    cfg, arrays = architecture(at), reference_v2.random_arrays(at, seed=7)
    whole = reference_logits(arrays, ROWS, at)
    params = jax.tree.map(jnp.asarray, reference_v2.split(arrays, at))
    reader = Reader(cfg, params, batch=2, n_slots=13, n_positions=13)
    assert reader.cache.k.shape == (2, 1, 2 * 5 + 1, shards, PAGE, 48 // shards)
    lengths = np.asarray([2, 6], np.int32)
    logits = reader.read(ROWS[:, :6], lengths)
    np.testing.assert_allclose(logits, whole[[0, 1], lengths - 1], rtol=0, atol=1e-5)
    for n in range(7):
        now = lengths + n
        logits = reader.step(ROWS[[0, 1], now], now)
        np.testing.assert_allclose(logits, whole[[0, 1], now], rtol=0, atol=1e-5)


def test_greedy_generation(arrays, params) -> None:
    made = list(ROWS[0, :3])
    for _ in range(6):
        logits = reference_v2.forward(arrays, np.asarray(made), SIZES)[-1]
        first, second = np.sort(logits)[::-1][:2]
        assert first - second > 1e-3, "a choice too close to call: take another seed"
        made.append(int(logits.argmax()))
    generator = Generator(CFG, jax.tree.map(jnp.asarray, params), PLAIN, None)
    (done,) = generator.generate([[int(t) for t in ROWS[0, :3]]], [SamplingOptions(max_tokens=6, temperature=0.0)])
    assert done.tokens == made[3:]


# ------------------------------------------------------------------------------------------------ table

# Every axis has a size of its own; heads are the eight shards, each of width 16 * 10 / 8.
WIDE = ModelConfig(
    architecture="v2", n_layers=4, d_model=128, n_heads=16, d_head=10, n_shards=8, n_vocab=1024, n_ctx=32, d_rotary=6
)
SHAPES = {
    "embed/tokens": (1024, 128),
    "embed/bias": (128,),
    "layers/ln_1/scale": (4, 128),
    "layers/ln_1/bias": (4, 128),
    "layers/attn/q": (4, 128, 8, 20),
    "layers/attn/k": (4, 128, 8, 20),
    "layers/attn/v": (4, 128, 8, 20),
    "layers/attn/o": (4, 8, 20, 128),
    "layers/attn/b_q": (4, 8, 20),
    "layers/attn/b_k": (4, 8, 20),
    "layers/attn/b_v": (4, 8, 20),
    "layers/mlp/w_in": (4, 128, 512),
    "layers/mlp/b_in": (4, 512),
    "layers/mlp/w_gate": (4, 128, 512),
    "layers/mlp/b_gate": (4, 512),
    "layers/mlp/w_out": (4, 512, 128),
    "layers/mlp/b_out": (4, 128),
    "head/ln/scale": (128,),
    "head/ln/bias": (128,),
    "head/w": (128, 1024),
    "head/b": (1024,),
}


def by_name(tree: Any) -> dict[str, Any]:
    return {table.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_every_parameter() -> None:
    assert {name: a.shape for name, a in by_name(table.abstract_params(WIDE)).items()} == SHAPES
    per_layer = 128 * (3 * 160 + 8 * 128) + (3 * 160 + 8 * 128) + (160 + 4 * 128) * 128 + 3 * 128
    assert table.count_params(WIDE) == 4 * per_layer + 1024 * 128 + 128 * 1024 + 1024 + 3 * 128
    assert table.count_matmul_params(WIDE) == 4 * (128 * (3 * 160 + 8 * 128) + (160 + 4 * 128) * 128) + 128 * 1024


def test_first_values() -> None:
    """Input projections 1 / sqrt(d), outputs (2 / L) / sqrt(d), biases 0, scales 1; the normal is cut at two."""
    made = by_name(table.init_params(WIDE, jax.random.key(0)))
    outputs = {"layers/attn/o", "layers/mlp/w_out"}
    for name, value in made.items():
        if len(value.shape) < 2 or "/b_" in name or "/ln" in name:
            np.testing.assert_array_equal(value, 1.0 if name.endswith("/scale") else 0.0, err_msg=name)
            continue
        std = 1 / 32 if name == "embed/tokens" else (0.5 if name in outputs else 1) / math.sqrt(128)
        assert np.std(value) / std == pytest.approx(0.8796, rel=0.02), name
        assert np.abs(value).max() <= 2 * std * 1.000001, name
    assert not np.array_equal(made["layers/mlp/w_in"], made["layers/mlp/w_gate"])


def test_all_that_is_stacked_over_layers_decays() -> None:
    mask = by_name(table.decay_mask(WIDE))
    assert set(mask) == set(SHAPES)
    assert {name for name, decays in mask.items() if not decays} == {
        "embed/bias",
        "head/ln/scale",
        "head/ln/bias",
        "head/b",
    }
