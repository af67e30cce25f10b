"""Log-likelihoods of given text. What texts begin with in common is computed once: `engine.packing`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.compat import n_compiled
from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.engine.packing import Pack, Pair, batches, pack
from mesh_transformer.model import layers, rope
from mesh_transformer.model.decoder import Where, embed, gather, run_blocks, unembed
from mesh_transformer.model.loss import score_logits
from mesh_transformer.model.params import param_table
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.shapes import Array, Float, Int, Params
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout, place_array
from mesh_transformer.sharding.rules import ONE_DEVICE, Rules

# Tokens that a program reads, and tokens whose logits exist, at one time.
_TOKENS_AT_ONCE = 4096
_SCORES_AT_ONCE = 512

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class ScoreCounts:
    """What a scorer has done, in tokens but for `texts` and `cut`.

    read_apart: of all texts, had each been read by itself. read: of those read, with what is shared counted once.
    padded: with the padding that the programs computed too. scored: whose likelihood was asked for. cut: texts whose
    beginning was left out, for the context does not hold it.
    """

    texts: int = 0
    read_apart: int = 0
    read: int = 0
    padded: int = 0
    scored: int = 0
    cut: int = 0

    def __str__(self) -> str:
        text = f"{self.texts:,} texts: {self.read:,} tokens read, {self.padded:,} with padding, {self.scored:,} scored"
        if self.read < self.read_apart:
            text += f"; {self.read_apart:,} had each text been read by itself"
        return text + (f"; {self.cut:,} texts lost their beginning, longer than the context" if self.cut else "")


class Scorer:
    """Scores pairs of contexts and continuations with models of one architecture; compiled once for every shape."""

    def __init__(
        self,
        cfg: ModelConfig,
        policy: ComputePolicy,
        layout: Layout = ONE_DEVICE_LAYOUT,
        *,
        most_rows: int | None = None,
    ) -> None:
        """
        Args:
            most_rows: rows that are computed at one time, on each of the devices that share a batch; by default as many
                as hold about 4,096 tokens together.

        Raises:
            UserError: `layout` has a pipeline, whose stages take no trees, or spans processes; or `most_rows` is not
                at least 1.
        """
        if most_rows is not None and most_rows < 1:
            raise UserError(f"batch_size = {most_rows} is out of range: at least 1")
        if layout.rules.n_stages > 1:
            raise UserError(
                f"mesh.pipeline = {layout.rules.n_stages}: texts are not scored through a pipeline; lay the model over "
                "data, fsdp and tensor to evaluate it"
            )
        self.cfg, self.layout, self.most_rows = cfg, layout, most_rows
        self.counts = ScoreCounts()
        how: dict[str, Any] = {"cfg": cfg, "policy": policy, "rules": layout.rules}
        self._read = jax.jit(functools.partial(read_trees, **how))
        self._score = jax.jit(functools.partial(score_nodes, **how))

    @property
    def n_compiled(self) -> int:
        """Programs compiled until now."""
        return n_compiled(self._read, self._score)

    def score(
        self,
        params: Params,
        pairs: Sequence[Pair],
        *,
        shared: bool = True,
        progress: Progress = lambda stage, done, total: None,
    ) -> list[tuple[float, bool]]:
        """Of each pair: log p(continuation | context) in nats, and whether every token of it was the likeliest.

        Args:
            shared: read what texts begin with in common once; the results differ by rounding alone.
            progress: called with "scoring", the texts done and all of them.

        Raises:
            UserError: as `packing.pack`.
        """
        packs = pack(pairs, self.cfg.n_ctx, shared=shared)
        sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        self._count(pairs, packs)
        ways = self.layout.sizes.batch_ways
        done, waiting = 0, None
        # The host prepares a batch while the device computes the one before.
        for rows, those in batches(packs, _TOKENS_AT_ONCE, ways, self.cfg.n_ctx, self.most_rows):
            self.counts.padded += rows.shape[0] * rows.shape[2]
            now = self._dispatch(params, rows, those), those
            done += _collect(waiting, sums, greedy)
            progress("scoring", done, len(pairs))
            waiting = now
        done += _collect(waiting, sums, greedy)
        progress("scoring", len(pairs), len(pairs))
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def _count(self, pairs: Sequence[Pair], packs: Sequence[Pack]) -> None:
        most = self.cfg.n_ctx
        self.counts.texts += len(pairs)
        self.counts.read_apart += sum(min(most, len(a) + len(b) - 1) for a, b in pairs)
        self.counts.read += sum(len(each.tokens) for each in packs)
        self.counts.scored += sum(len(b) for _, b in pairs)
        self.counts.cut += sum(len(a) + len(b) - 1 > most for a, b in pairs)

    def _dispatch(self, params: Params, rows: np.ndarray, packs: Sequence[Pack]) -> list[Any]:
        """Scores of every pick of a batch, [2, rows, columns] at a time; still on the device."""
        n_rows, longest = len(rows), max(len(each.picks) for each in packs)
        # One of few widths here too.
        columns = min(max(1, _SCORES_AT_ONCE // n_rows), 2 * 4 ** max(1, math.ceil(math.log(longest / 2, 4))))
        picks = np.zeros((n_rows, 2, -(-longest // columns) * columns), np.int32)
        for row, each in zip(picks, packs, strict=False):
            n = len(each.picks)
            row[0, :n] = [pick.node for pick in each.picks]
            row[1, :n] = [pick.target for pick in each.picks]
        with self.layout.using():
            x = self._read(params, self._place(rows))
            starts = range(0, picks.shape[2], columns)
            return [self._score(params, x, self._place(picks[:, :, i : i + columns])) for i in starts]

    def _place(self, values: np.ndarray) -> jax.Array:
        return place_array(values, self.layout.sharding(self.layout.rules.use(("batch", None, None))))


def _collect(waiting: tuple[list[Any], Sequence[Pack]] | None, sums: np.ndarray, greedy: np.ndarray) -> int:
    """Adds a batch's scores to those of its texts; returns the number of texts in it."""
    if waiting is None:
        return 0
    parts, packs = waiting
    losses, correct = np.concatenate([np.asarray(part) for part in parts], axis=2).astype(np.float64)
    texts = set()
    for row, each in enumerate(packs):
        numbers = np.asarray([pick.text for pick in each.picks])
        n = len(numbers)
        np.subtract.at(sums, numbers, losses[row, :n])
        np.logical_and.at(greedy, numbers, correct[row, :n] > 0)
        texts.update(numbers.tolist())
    return len(texts)


def read_trees(
    params: Params,
    rows: Int[Array, "batch 3 seq"],
    *,
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
) -> Float[Array, "batch seq embed"]:
    """The residual stream after the last block of rows that are trees: ids, positions and `ends` (`engine.packing`)."""
    tokens, positions, ends = rows[:, 0], rows[:, 1], rows[:, 2]
    x = embed(params, tokens, positions, cfg, policy, rules)
    where = _locate(params, positions, ends, cfg, rules)
    x, _ = run_blocks(params["layers"], x, where, None, cfg, policy, rules)
    return rules.place(x, ("batch", "seq", "embed"))


def _locate(params: Params, positions: Array, ends: Array, cfg: ModelConfig, rules: Rules) -> Where:
    """As `decoder.locate`, where a place sees those on its own path alone."""
    sin = cos = None
    width = positions.shape[1]
    if cfg.position == "rotary":
        split = rules.use(("batch", "seq", None))
        tables = rope.rotary_tables(width, cfg)
        sin, cos = (jnp.asarray(each).at[positions].get(out_sharding=split) for each in tables)
    place = jnp.arange(width, dtype=jnp.int32)
    query, key = place[None, :, None], place[None, None, :]
    bias = jnp.where((key <= query) & (query < ends[:, None, :]), 0.0, layers.MASKED)[:, None]
    if cfg.reach < width:
        bias = bias + layers.sliding_mask(positions, positions, cfg.reach)
    if cfg.position == "t5":
        relative = gather(params["relative"], param_table(cfg)["relative"], rules)["bias"]
        heads = rules.use(("heads", "batch", None, None))
        bias = bias + layers.relative_bias(relative, positions, positions, cfg.n_ctx, heads)
    return Where(positions=positions, sin=sin, cos=cos, bias=bias)


def score_nodes(
    params: Params,
    x: Float[Array, "batch seq embed"],
    picks: Int[Array, "batch 2 columns"],
    *,
    cfg: ModelConfig,
    policy: ComputePolicy,
    rules: Rules = ONE_DEVICE,
) -> Float[Array, "2 batch columns"]:
    """Of the nodes and targets of `picks`: the cross-entropy in nats, and 1 where no token was likelier.

    Logits exist at these places alone.
    """
    chosen = jax.vmap(lambda row, nodes: row[nodes])(x, picks[:, 0])
    scores = score_logits(unembed(params, chosen, cfg, policy, rules), rules.place(picks[:, 1], ("batch", "seq")))
    return jnp.stack([rules.place(a.astype(jnp.float32), (None, None)) for a in (scores.loss, scores.correct)])


@functools.lru_cache(maxsize=8)
def _scorer(cfg: ModelConfig, policy: ComputePolicy, layout: Layout) -> Scorer:
    return Scorer(cfg, policy, layout)


def log_likelihood(
    params: Params,
    cfg: ModelConfig,
    policy: ComputePolicy,
    context: Sequence[int],
    continuation: Sequence[int],
    layout: Layout = ONE_DEVICE_LAYOUT,
) -> tuple[float, bool]:
    """Sum over the continuation's tokens of log p(token | all before it), in nats, and whether each was the likeliest.

    Of a text longer than the context plus one, the newest tokens are used.

    Raises:
        UserError: the continuation is empty or longer than the context, or nothing stands before it.
    """
    return _scorer(cfg, policy, layout).score(params, [Pair(context, continuation)])[0]
