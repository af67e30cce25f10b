"""Cross-entropy and its regularisers, over chunks of positions so that the full logits never exist.

Formulas: docs/formats.md, section 4. All in float32, in nats.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.kernels.cross_entropy import How, head_loss
from mesh_transformer.model import layers
from mesh_transformer.model.decoder import gather, hidden, unembed
from mesh_transformer.model.params import param_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.shapes import Array, Float, Int, Params
from mesh_transformer.sharding.rules import ONE_DEVICE, Rules

ZLossKind = Literal["legacy", "log_partition"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """What the head says of every target token; each [batch, seq].

    loss: cross-entropy. log_sum: log sum exp of the logits less their maximum (the legacy z term's argument).
    log_partition: log sum exp of the logits. correct: the target's logit equals the maximum, ties count.
    """

    loss: Array
    log_sum: Array
    log_partition: Array
    correct: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossReport:
    """Means over the batch: `loss` is plain cross-entropy, `total` = loss + z_loss is what training lowers.

    last: cross-entropy of the last position only. correct: share of targets that had the highest logit.
    """

    total: Array
    loss: Array
    z_loss: Array
    last: Array
    correct: Array


def score_logits(
    logits: Float[Array, "batch seq vocab"], targets: Int[Array, "batch seq"], *, moving_maximum: bool = False
) -> TokenScores:
    """The scores of targets under given logits.

    The maximum carries no gradient, except through `log_sum` where `moving_maximum`, as in the original's v2.
    """
    highest = jnp.max(logits, axis=-1)
    top = jax.lax.stop_gradient(highest)
    shifted = logits - top[..., None]
    log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    # A masked sum, not a gather: it needs no communication where the vocabulary is split, and no scatter backward.
    # Numbers of one row only: as large as the logits, XLA on CPU would hold them throughout a loop over microbatches.
    is_target = jnp.arange(logits.shape[2], dtype=targets.dtype) == targets[..., None]
    at_target = jnp.sum(jnp.where(is_target, shifted, 0.0), axis=-1)
    return TokenScores(
        loss=log_sum - at_target,
        # Zero is added, with the gradient of the subtracted maximum; the loss itself does not depend on it.
        log_sum=log_sum + (top - highest) if moving_maximum else log_sum,
        log_partition=log_sum + top,
        correct=at_target == 0,
    )


def score_tokens(
    params: Params,
    tokens: Int[Array, "batch seq"],
    targets: Int[Array, "batch seq"],
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
    *,
    separator: int | None = None,
) -> TokenScores:
    """The scores of `targets` after `tokens`; logits exist for `policy.loss_chunk` positions a device at a time.

    separator: as for `hidden`.
    """
    x, _ = hidden(params, tokens, cfg, policy, rules, separator=separator)
    rules = rules.after_stages
    x, targets = rules.place(x, ("batch", "seq", "embed")), rules.place(targets, ("batch", "seq"))
    score = functools.partial(score_logits, moving_maximum=cfg.architecture == "v2")
    batch, seq, _ = x.shape
    width = max(1, min(seq, policy.loss_chunk // (batch // rules.ways("batch"))))
    n_chunks = math.ceil(seq / width)
    if n_chunks == 1:
        return score(unembed(params, x, cfg, policy, rules), targets)
    # Brought together before the chunks, not in each.
    for part in ("embed", "head") if cfg.tied_head else ("head",):
        params = params | {part: gather(params[part], param_table(cfg)[part], rules)}

    def chunks(a: Array) -> Array:
        padded = jnp.pad(a, [(0, 0), (0, n_chunks * width - seq)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, n_chunks, width, *a.shape[2:]), 1, 0)

    # The checkpoint makes the backward pass compute a chunk's logits again instead of keeping all of them.
    @jax.checkpoint
    def one_chunk(_: None, chunk: tuple[Array, Array]) -> tuple[None, TokenScores]:
        return None, score(unembed(params, chunk[0], cfg, policy, rules), chunk[1])

    _, scores = jax.lax.scan(one_chunk, None, (chunks(x), chunks(targets)), unroll=n_chunks if policy.unroll else 1)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(batch, n_chunks * width)[:, :seq], scores)


def _with_matrix(params: Params, cfg: ModelConfig) -> Params:
    """The head, with the token table as its matrix where that is tied."""
    return params["head"] | {"w": params["embed"]["tokens"].T} if cfg.tied_head else params["head"]


def _has_own_gradient(head: Params, cfg: ModelConfig, policy: ComputePolicy, rules: Rules) -> bool:
    """Whether head and loss are computed by kernels/cross_entropy.py: v1's loss of a head of one plain matrix on one
    device.
    """
    plain = isinstance(head.get("w"), jax.Array) and rules.use(("batch", "seq", "vocab")) is None
    return plain and "head" in policy.forms and cfg.architecture == "v1"


def _score_with_gradient(
    head: Params,
    x: Float[Array, "batch seq embed"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    cfg: ModelConfig,
    how: How,
) -> tuple[Float[Array, ""], TokenScores]:
    """The sum of weighted losses, z term included, whose gradient is computed beside it; and every target's scores."""
    normed = layers.norm(x, head["ln"], cfg).reshape(-1, x.shape[-1])
    bias = head["b"] if "b" in head else jnp.zeros(cfg.n_vocab)
    total, scores = head_loss(normed, head["w"], bias, targets.reshape(-1), weights.reshape(-1), how)
    return total, TokenScores(*(a.reshape(targets.shape) for a in scores))


def z_term(scores: TokenScores, kind: ZLossKind) -> Float[Array, "batch seq"]:
    """Square of the log-sum of every token: after the maximum is subtracted ("legacy", the original's) or whole."""
    return jnp.square(scores.log_sum if kind == "legacy" else scores.log_partition)


def learned(rows: Int[Array, "*batch seq_plus_one"]) -> Int[Array, ""]:
    """Targets that count among all of these rows: those that do not stand there as ~id."""
    return jnp.sum(rows[..., 1:] >= 0)


def loss_report(
    params: Params,
    rows: Int[Array, "batch seq_plus_one"],
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
    *,
    z_loss: float = 0.0,
    z_loss_kind: ZLossKind = "legacy",
    n_learned: Float[Array, ""] | None = None,
    separator: int | None = None,
) -> LossReport:
    """The loss of predicting each token of a row from those before it.

    An id that stands in a row as ~id (docs/data.md) is read as id, and is no target: it does not count.

    Args:
        n_learned: what sums over targets are divided by; by default the number of targets that count. Parts of a batch
            give it their share of the whole batch's, so that every target counts alike wherever it stands.
        separator: as for `hidden`.
    """
    ids = jnp.where(rows < 0, ~rows, rows)
    counts = rules.after_stages.place(rows[:, 1:] >= 0, ("batch", "seq"))
    n = jnp.maximum(jnp.sum(counts), 1) if n_learned is None else n_learned
    total = None
    head = _with_matrix(params, cfg)
    if _has_own_gradient(head, cfg, policy, rules):
        how = How(policy.dtype, z_loss, z_loss_kind == "log_partition", policy.loss_chunk)
        x, _ = hidden(params, ids[:, :-1], cfg, policy, rules, separator=separator)
        total, scores = _score_with_gradient(head, x, ids[:, 1:], jnp.where(counts, 1 / n, 0.0), cfg, how)
    else:
        scores = score_tokens(params, ids[:, :-1], ids[:, 1:], cfg, policy, rules, separator=separator)
    mean = lambda values: jnp.sum(jnp.where(counts, values, 0.0)) / n  # noqa: E731
    loss = mean(scores.loss)
    z = z_loss * mean(z_term(scores, z_loss_kind)) if z_loss else jnp.zeros(())
    n_last = jnp.maximum(jnp.sum(counts[:, -1]), 1)
    return LossReport(
        total=loss + z if total is None else total,
        loss=loss,
        z_loss=z,
        last=jnp.sum(jnp.where(counts[:, -1], scores.loss[:, -1], 0.0)) / n_last,
        correct=mean(scores.correct.astype(jnp.float32)),
    )
