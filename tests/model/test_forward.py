"""Logits, losses and gradients against the slow float64 reference, and against one another where only form differs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

from mesh_transformer.config.model import ModelConfig, Norm, Position
from mesh_transformer.config.presets import preset
from mesh_transformer.model import decoder, layers, rope
from mesh_transformer.model.loss import loss_report, score_logits, score_tokens
from mesh_transformer.model.params import abstract_params
from mesh_transformer.model.policy import ComputePolicy

PLAIN = ComputePolicy(dtype="float32")
# Odd widths, a feed-forward that is not four times as wide, and distances beyond t5's exact buckets.
TINY = ModelConfig(n_layers=3, d_model=16, n_heads=2, d_ff=20, n_vocab=23, n_ctx=20, d_rotary=4)
ROWS = np.random.default_rng(3).integers(0, TINY.n_vocab, (2, 20)).astype(np.int32)


def architecture(norm: str = "layernorm", position: str = "rotary", **fields: Any) -> ModelConfig:
    fields = {"norm": norm, "position": position, "d_rotary": 4 if position == "rotary" else 0} | fields
    return dataclasses.replace(TINY, **fields)


def arithmetic(cfg: ModelConfig) -> reference.Arithmetic:
    return reference.Arithmetic(norm=cfg.norm, position=cfg.position, d_rotary=cfg.d_rotary, eps=cfg.norm_eps)


def at_once(f: Callable[..., Any], *given: Any) -> Any:
    """Operation by operation: what most tests here need, since compiling every variant would take minutes."""
    with jax.disable_jit():
        return f(*jax.tree.map(jnp.asarray, given))


def params_of(cfg: ModelConfig, seed: int = 0) -> Any:
    """Norm scales of the L2 variants are as wide as the model's, so that logits stay large."""
    params = reference.random_params(abstract_params(cfg), seed)
    if cfg.norm.startswith(("rmsnorm", "scalenorm")):
        for p in (params["layers"]["ln_1"], params["head"]["ln"]):
            p["scale"] = p["scale"] * np.float32(cfg.d_model**0.5)
    return params


def reference_logits(params: Any, rows: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    return np.stack([reference.forward(params, row, arithmetic(cfg)) for row in rows])


@pytest.mark.parametrize("position", get_args(Position))
@pytest.mark.parametrize("norm", get_args(Norm))
def test_logits_equal_the_reference(norm: str, position: str) -> None:
    cfg = architecture(norm, position)
    params = params_of(cfg)
    # Ids outside the vocabulary give the embedding bias alone.
    rows = ROWS[:, :-1].copy()
    rows[0, 3], rows[1, 5], rows[1, 6] = cfg.n_vocab, -1, 2**30
    expected = reference_logits(params, rows, cfg)
    got = at_once(lambda p, t: decoder.forward(p, t, cfg, PLAIN), params, rows)
    assert got.dtype == jnp.float32
    assert expected.std() >= 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5)


def test_t5_buckets_over_long_distances() -> None:
    distances = [0, 1, 15, 16, 17, 18, 19, 31, 32, 63, 64, 112, 113, 127, 128, 129, 500]
    buckets = layers.t5_buckets(501)
    assert [int(buckets[n]) for n in distances] == [0, 1, 15, 16, 16, 16, 17, 21, 21, 26, 26, 30, 31, 31, 31, 31, 31]
    assert [int(b) for b in buckets] == [reference.t5_bucket(n, 0) for n in range(501)]


def test_rotary_tables_are_rounded_from_float64() -> None:
    sin, cos = rope.rotary_tables(2048, preset("gpt-j-6b"))
    assert sin.shape == cos.shape == (2048, 32)
    assert sin.dtype == cos.dtype == np.float32
    angle = np.longdouble(2047) * np.longdouble(10000) ** (-np.longdouble(2) / 64)
    assert abs(float(sin[2047, 1]) - float(np.sin(angle))) < 1e-7


def test_epsilon_is_the_configured_one() -> None:
    cfg = architecture(norm_eps=0.1)
    params = params_of(cfg)
    got = at_once(lambda p, t: decoder.forward(p, t, cfg, PLAIN), params, ROWS[:, :-1])
    np.testing.assert_allclose(got, reference_logits(params, ROWS[:, :-1], cfg), rtol=0, atol=3e-5)


def test_features_of_every_layer() -> None:
    cfg, params = TINY, params_of(TINY)
    kept: list[np.ndarray] = []
    reference.forward(params, ROWS[0], arithmetic(cfg), keep=kept)
    last = reference.as_float64(params)["head"]["ln"]
    kept[-1] = np.stack([reference.norm(x, last, arithmetic(cfg)) for x in kept[-1]])
    for layer in (0, 2, -1):
        got = jax.jit(lambda p, t, layer=layer: decoder.features(p, t, layer, cfg, PLAIN))(params, ROWS[:1])
        np.testing.assert_allclose(got[0], kept[layer], rtol=0, atol=3e-5)


# ------------------------------------------------------------------------------------------------ losses


def test_scores_of_given_logits() -> None:
    random = np.random.default_rng(5)
    logits = (4 * random.standard_normal((2, 7, 11))).astype(np.float32)
    targets = random.integers(0, 11, (2, 7)).astype(np.int32)
    targets[0, :3] = logits[0, :3].argmax(axis=-1)
    # Ties: the target equals the maximum though another id has it too; both ids count.
    logits[1, 0, [2, 9]] = logits[1, 1, [2, 9]] = logits[1].max() + 1
    targets[1, 0], targets[1, 1] = 2, 9
    logits[1, 2] += 1000  # the maximum is subtracted before exponentials are taken
    got, expected = score_logits(jnp.asarray(logits), jnp.asarray(targets)), reference.score(logits, targets)
    np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(got.log_sum, expected.lse_after_max, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(got.log_partition, expected.log_partition, rtol=1e-6)
    assert got.correct.tolist() == expected.correct.tolist()
    assert got.correct[0, :3].all() and got.correct[1, :2].all() and not got.correct.all()


@pytest.mark.parametrize("kind", ["legacy", "log_partition"])
def test_the_report_of_a_batch(kind: Any) -> None:
    cfg, params = TINY, params_of(TINY)
    expected = reference.score(reference_logits(params, ROWS[:, :-1], cfg), ROWS[:, 1:])
    run = functools.partial(loss_report, cfg=cfg, policy=PLAIN, z_loss=0.05, z_loss_kind=kind)
    got = at_once(run, params, ROWS)
    z = 0.05 * ((expected.lse_after_max if kind == "legacy" else expected.log_partition) ** 2).mean()
    assert float(got.loss) == pytest.approx(expected.loss.mean(), rel=2e-6)
    assert float(got.z_loss) == pytest.approx(z, rel=5e-6)
    assert float(got.total) == pytest.approx(expected.loss.mean() + z, rel=2e-6)
    assert float(got.last) == pytest.approx(expected.loss[:, -1].mean(), rel=2e-6)
    assert float(got.correct) == pytest.approx(expected.correct.mean(), abs=1e-7)


def test_the_legacy_z_term_ignores_a_constant_added_to_all_logits_and_the_other_does_not() -> None:
    params = params_of(TINY)
    raised = params | {"head": params["head"] | {"b": params["head"]["b"] + np.float32(5)}}
    for kind, moves in (("legacy", False), ("log_partition", True)):
        run = functools.partial(loss_report, cfg=TINY, policy=PLAIN, z_loss=1.0, z_loss_kind=kind)
        before, after = (float(at_once(run, p, ROWS).z_loss) for p in (params, raised))
        assert (abs(after - before) > 1) == moves


# --------------------------------------------------------------------------------------------- gradients


def value_and_gradients(
    cfg: ModelConfig, params: Any, policy: ComputePolicy = PLAIN, kind: Any = "legacy", rows: np.ndarray = ROWS
) -> tuple[jax.Array, Any]:
    return at_once(jax.value_and_grad(total_loss(cfg, policy, kind)), params, rows)


def total_loss(cfg: ModelConfig, policy: ComputePolicy, kind: Any = "legacy") -> Callable[..., jax.Array]:
    return lambda p, rows: loss_report(p, rows, cfg, policy, z_loss=0.05, z_loss_kind=kind).total


def furthest(a: Any, b: Any) -> float:
    """Over all tensors, the largest difference relative to the tensor's largest value in b."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max()) for x, y in pairs)


@pytest.mark.parametrize(
    ("norm", "position", "kind"),
    [(norm, "rotary", "legacy") for norm in get_args(Norm)]
    + [("layernorm", "fixed", "log_partition"), ("layernorm", "t5", "log_partition"), ("rmsnorm", "t5", "legacy")],
)
def test_gradients_equal_finite_differences_of_the_reference(norm: str, position: str, kind: str) -> None:
    """In one direction within every tensor, and in one over all of them."""
    cfg = architecture(norm, position)
    params = params_of(cfg)
    _, gradients = value_and_gradients(cfg, params, kind=kind)
    rows = ROWS
    base = reference.as_float64(params)
    top = reference_logits(base, rows[:, :-1], cfg).max(axis=-1)

    def total(at: Any) -> float:
        scores = reference.score(reference_logits(at, rows[:, :-1], cfg), rows[:, 1:], top)
        return reference.total_loss(scores, 0.05, kind)

    random = np.random.default_rng(11)
    leaves, structure = jax.tree.flatten(base)
    slopes = jax.tree.leaves(gradients)
    for chosen in [*([i] for i in range(len(leaves))), list(range(len(leaves)))]:
        # Half along the gradient, so that the slope is never small by chance; half at random.
        step = {}
        for i in chosen:
            noise, along = random.standard_normal(leaves[i].shape), np.asarray(slopes[i], np.float64)
            step[i] = noise / np.linalg.norm(noise) + along / np.linalg.norm(along)
        h = 1e-5
        moved = [[x + s * h * step[i] if i in step else x for i, x in enumerate(leaves)] for s in (1, -1)]
        measured = (total(structure.unflatten(moved[0])) - total(structure.unflatten(moved[1]))) / (2 * h)
        claimed = sum(float((np.asarray(slopes[i], np.float64) * step[i]).sum()) for i in chosen)
        assert claimed == pytest.approx(measured, rel=1e-4), chosen


@pytest.mark.parametrize("norm", ["rmsnorm", "scalenorm", "rmsnorm-bias"])
def test_a_zero_row_has_a_gradient(norm: str) -> None:
    cfg = architecture(norm)
    params = params_of(cfg)
    params["embed"]["bias"] = np.zeros_like(params["embed"]["bias"])
    rows = ROWS.copy()
    rows[0, 0] = rows[1, 4] = -1  # with no embedding bias, the stream is exactly zero here
    value, gradients = value_and_gradients(cfg, params, rows=np.where(rows < 0, cfg.n_vocab, rows))
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    zero = layers.norm(jnp.zeros((1, 1, cfg.d_model)), params["head"]["ln"], cfg)
    np.testing.assert_array_equal(zero[0, 0], np.broadcast_to(params["head"]["ln"].get("bias", 0), (cfg.d_model,)))


# ------------------------------------------------------------------------- the same arithmetic in other forms


@pytest.fixture(scope="module")
def plain() -> tuple[Any, jax.Array, Any]:
    params = params_of(TINY)
    return params, *value_and_gradients(TINY, params)


@pytest.mark.parametrize(
    "policy",
    [
        ComputePolicy(),
        # 19 positions of 2 rows: seven at a time (the last of three chunks is not full), or one at a time.
        ComputePolicy(loss_chunk=14),
        ComputePolicy(loss_chunk=14, unroll=True, remat="full"),
        ComputePolicy(loss_chunk=1, remat="dots"),
    ],
    ids=lambda p: f"chunk={p.loss_chunk}-unroll={p.unroll}-remat={p.remat}",
)
def test_chunks_loops_and_recomputation_change_nothing(policy: ComputePolicy, plain) -> None:
    params, value, gradients = plain
    other, others = jax.jit(jax.value_and_grad(total_loss(TINY, policy)))(params, ROWS)
    assert float(other) == pytest.approx(float(value), rel=1e-6)
    assert furthest(others, gradients) <= 5e-6


def test_chunked_scores_keep_their_places() -> None:
    params = params_of(TINY)
    expected = reference.score(reference_logits(params, ROWS[:, :-1], TINY), ROWS[:, 1:])
    policy = ComputePolicy(loss_chunk=10)
    got = jax.jit(lambda p, rows: score_tokens(p, rows[:, :-1], rows[:, 1:], TINY, policy))(params, ROWS)
    np.testing.assert_allclose(got.loss, expected.loss, rtol=0, atol=3e-5)
    np.testing.assert_allclose(got.log_sum, expected.lse_after_max, rtol=0, atol=3e-5)
    np.testing.assert_allclose(got.log_partition, expected.log_partition, rtol=0, atol=3e-5)
    assert got.correct.tolist() == expected.correct.tolist()


def test_recomputation_is_done_as_asked() -> None:
    """Products in the program of a gradient: "dots" repeats attention's alone, "full" more."""

    def products(remat: Any) -> int:
        run = lambda p: loss_report(p, jnp.asarray(ROWS), TINY, ComputePolicy(remat=remat)).loss  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(run))(abstract_params(TINY))).count("dot_general")

    assert products("none") < products("dots") < products("full")


# ------------------------------------------------------------------------------------------------ bfloat16


def rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def test_a_bfloat16_product_and_its_gradients_round_factors_and_nothing_else() -> None:
    random = np.random.default_rng(7)
    x, w, g = (random.standard_normal(s).astype(np.float32) for s in ((2, 5, 64), (64, 3, 4), (2, 5, 3, 4)))
    product = functools.partial(layers.product, "bse,ehd->bshd", policy=ComputePolicy(dtype="bfloat16"))
    y, pull = jax.vjp(product, jnp.asarray(x), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(g))
    assert y.dtype == dx.dtype == dw.dtype == jnp.float32
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-6)
    close(y, np.einsum("bse,ehd->bshd", rounded(x), rounded(w)))
    close(dx, np.einsum("bshd,ehd->bse", rounded(g), rounded(w)))
    close(dw, np.einsum("bse,bshd->ehd", rounded(x), rounded(g)))


def test_bfloat16_is_close(plain) -> None:
    params, value, gradients = plain
    policy = ComputePolicy(dtype="bfloat16")
    logits = jax.jit(lambda p, t: decoder.forward(p, t, TINY, policy))(params, ROWS)
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - reference_logits(params, ROWS, TINY))
    other, others = jax.jit(jax.value_and_grad(total_loss(TINY, policy)))(params, ROWS)
    # Measured: 0.038 of logits with a standard deviation of 1.5; 0.016 of a gradient's largest value.
    assert 1e-3 < error.max() < 0.08
    assert float(other) == pytest.approx(float(value), abs=0.02)
    assert 1e-3 < furthest(others, gradients) < 0.04
