"""Bytes that a training step holds on each device, by category, at its fullest moment.

What rests (parameters, moments) is exact. What exists within the step is counted for the moments at which it can be
fullest: in the backward pass of a layer (attention, the projections, the feed-forward), in the loss, and in the
optimizer's update. How many copies of what are alive at each was found from XLA's buffer assignments of programs in
which one kind of array was made to dominate, and adjusted on programs other than those that the calibration reports
(docs/planning.md). They are counts of arrays of the program: no figure depends on a single case.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from mesh_transformer.config.dtypes import ITEMSIZE
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import RunConfig
from mesh_transformer.plan.work import Work, adapts


class _Copies(NamedTuple):
    """Arrays alive at one time, by what they are (plan.work.Work)."""

    scores: float = 0.0
    heads: float = 0.0
    stream: float = 0.0
    wide: float = 0.0
    weights: float = 0.0  # of a layer
    kv: float = 0.0


def _kept_copies(cfg: ModelConfig, remat: str) -> _Copies:
    """What the backward pass of each layer finds kept by the forward pass.

    "none": weights and exponents of attention; q, k, v (repeated for all heads) and the mixed values; before norms of
    queries and keys three arrays of each; of every norm its input, what it centred or squared, the normed and the
    placed, of which a second norm of the same input has but the last its own; what the activation needs. "dots" keeps
    its products in the compute dtype; "full" the stream alone.
    """
    gated = cfg.feed_forward.startswith("glu_")
    if remat == "none":
        of_norms = 3.0 if cfg.qk_norm else 0.0
        stream = {"parallel": 4, "parallel-two-norms": 5, "serial": 8}[cfg.residual]
        return _Copies(2, 4 + of_norms, stream, _ACTIVATIONS[cfg.feed_forward], kv=of_norms)
    return _Copies(0, 2, 1, 2 if gated else 1, kv=2) if remat == "dots" else _Copies(stream=1)


# Arrays that an activation keeps, the products before it among them: in its tanh form gelu's cube, tanh and products.
_ACTIVATIONS = {"gelu_tanh": 6, "gelu": 4, "glu_silu": 6, "glu_gelu_tanh": 8}
# Beside it, at the fullest moments of a layer's backward pass: attention, turning of heads, norms, the feed-forward.
_MOMENTS = {
    "none": (_Copies(2, 6, 6), _Copies(0, 7, 4), _Copies(0, 1, 8), _Copies(0, 5, 6, 3, 0.5)),
    "dots": (_Copies(3.5, 5, 6), _Copies(0, 8, 4), _Copies(0, 1, 8), _Copies(0, 5, 7.5, 3, 0.5)),
    "full": (_Copies(3.25, 5, 6), _Copies(0, 9, 4), _Copies(0, 1, 8), _Copies(0, 4, 5, 5, 0.5)),
}


def _all_of_layer(cfg: ModelConfig) -> _Copies:
    """A whole layer computed again: where the feed-forward reads what attention gave, its backward pass comes first,
    and what attention keeps for its own waits.
    """
    kept, beside = _kept_copies(cfg, "none"), _MOMENTS["none"][3]
    return kept._replace(stream=kept.stream + 2, wide=kept.wide + beside.wide, weights=beside.weights)


# Copies of a chunk's logits, outside of loops (over chunks; over microbatches where batch and vocabulary are divided)
# and within.
_LOGITS, _LOGITS_IN_LOOP = 3.0, 3.5
# Copies of what the head reads.
_STREAM_OF_HEAD = {"none": 8.0, "dots": 1.5, "full": 8.0}
# Gradient of the head in the loss, and what accumulation adds of both ends where they wait for a sum over devices.
_HEAD, _ENDS_SUMMED = 1.5, 0.5
# Of parameters that rest in shards and are gathered in each layer: a layer's, and embedding's and head's, brought
# together with their whole gradients, beside what the moments above hold.
_GATHERED_LAYER = {"none": 0.15, "dots": 0.4, "full": 0.9}
_GATHERED_ENDS, _GATHERED_ENDS_OF_BASE = 1.5, 1.0  # the base beside an adapter has no gradients
# Of a pipeline: gradients of a stage's layers in one tick beside their sum, and once more where they are summed over
# the batch's devices; the stream of all microbatches as it enters and leaves; what is handed on, for each tick.
_TICK_GRADIENTS, _TICK_SUMS, _ALL_MICROBATCHES, _EACH_TICK = 1.0, 1.0, 2.75, 0.75
# With an adapter of the feed-forward's matrices: products with A and B beside those with the base, and their sums.
_ADAPTED_WIDE = 5.0
# Bytes a value of moments in 16 bits: one of the two new ones is not written in the place of the old one.
_WIDENED_MOMENTS = 2
_F32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes on one device at the fullest moment of a step, and which moment that is.

    parameters, optimizer: at rest. gradients: with those that accumulate. activations: kept for the backward pass.
    logits: of a chunk of the loss, with its gradient. workspace: what one layer, or the update, has in hand.
    """

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    logits: float
    workspace: float
    moment: str

    @property
    def total(self) -> float:
        """All together."""
        return self.state + self.gradients + self.activations + self.logits + self.workspace

    @property
    def state(self) -> float:
        """What rests between two steps."""
        return self.parameters + self.optimizer

    def categories(self) -> dict[str, float]:
        """The bytes by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "moment"}


def step_bytes(run: RunConfig, work: Work, *, update_in_place: bool = False) -> StepBytes:
    """The bytes of a training step.

    update_in_place: the compiler writes new moments and parameters where the old ones lie, gradients beside them and
    nothing else, as XLA's for GPUs does on one device; on CPU and TPU the updates exist beside them.
    """
    if work.base_bytes is None:
        parameters = ITEMSIZE[run.train.param_dtype] * work.rested
    else:  # A and B are float32
        parameters = work.base_bytes * work.rested + _F32 * work.learned.rest
    optimizer = 2 * ITEMSIZE[run.train.moment_dtype] * work.learned.moment
    moments = [*_of_layers(run, work), _of_loss(run, work)]
    if not update_in_place:
        moments.append(_of_update(run, work))
    fullest = max(moments, key=lambda m: m.total)
    return dataclasses.replace(fullest, parameters=parameters, optimizer=optimizer)


def _apart(run: RunConfig, work: Work) -> tuple[bool, bool]:
    """Whether parameters are gathered in each layer, and whether once a step."""
    apart = run.mesh.zero == 3 and work.sizes.fsdp > 1
    return apart and run.train.gather == "per_layer", apart and run.train.gather == "per_step"


def _gradients(run: RunConfig, work: Work) -> tuple[float, float]:
    """Bytes of a microbatch's gradients and of those that accumulate."""
    per_layer, _ = _apart(run, work)
    one = _F32 * (work.learned.rest if per_layer else work.learned.use)
    return one, one if run.train.gradient_accumulation > 1 else 0.0


def _kept(run: RunConfig, work: Work) -> float:
    """Bytes that the forward passes of all layers leave for the backward pass; of a pipeline, of all ticks."""
    copies = _kept_copies(run.model, run.train.remat)
    of_products = ITEMSIZE[work.dtype] if run.train.remat == "dots" else _F32
    if not work.scores and run.train.remat == "none":  # a kernel keeps its inputs and its result, in the dtype
        of_products = _F32
    layer = _F32 * (copies.scores * work.scores + copies.stream * work.stream)
    layer += of_products * (copies.heads * work.heads + copies.kv * work.kv + copies.wide * work.wide)
    return layer * work.layers * work.ticks


def _beside_layers(run: RunConfig, work: Work) -> float:
    """Bytes in use throughout forward and backward passes: gathered parameters, the pipeline's streams."""
    per_layer, per_step = _apart(run, work)
    # A base that is narrower than what is computed with is widened as a whole, before the first layer, or kept widened.
    narrow = work.base_bytes is not None and work.base_bytes < ITEMSIZE[work.dtype]
    widened = narrow and (not per_layer or run.train.remat == "none")
    held = _F32 * work.used if per_step or widened else 0.0
    if work.sizes.pipeline > 1:
        held += _F32 * work.stream * (_ALL_MICROBATCHES * work.microbatches + _EACH_TICK * work.ticks)
    return held


def _of_layers(run: RunConfig, work: Work) -> list[StepBytes]:
    """The moments within a layer's backward pass."""
    one, summed = _gradients(run, work)
    per_layer, _ = _apart(run, work)
    beside = _beside_layers(run, work) + 2 * _F32 * work.mask
    if work.sizes.pipeline > 1:
        sums = _TICK_GRADIENTS + (_TICK_SUMS if work.sizes.batch_ways > 1 else 0.0)
        beside += sums * one * (1 - work.ends / work.used)
    if per_layer:
        beside += (_GATHERED_ENDS if work.base_bytes is None else _GATHERED_ENDS_OF_BASE) * _F32 * work.ends
    found = []
    names = ("attention", "projections", "norms", "feed-forward")
    moments = [*zip(names, _MOMENTS[run.train.remat], strict=True)]
    if run.train.remat == "full" and run.model.residual == "serial":
        moments.append(("feed-forward after attention", _all_of_layer(run.model)))
    for name, copies in moments:
        weights = copies.weights + (_GATHERED_LAYER[run.train.remat] if per_layer and copies.weights else 0.0)
        wide = copies.wide
        if work.base_bytes is not None:
            weights -= copies.weights  # which are gradients
            wide += _ADAPTED_WIDE if copies.wide and adapts(run, "mlp") else 0.0
        inside = copies.scores * work.scores + copies.heads * work.heads + copies.stream * work.whole_stream
        inside += copies.kv * work.kv + wide * work.wide + weights * work.layer_values
        found.append(
            StepBytes(
                parameters=0,
                optimizer=0,
                gradients=one + summed,
                activations=_kept(run, work),
                logits=0,
                workspace=beside + _F32 * inside,
                moment=f"backward pass of a layer, {name}",
            )
        )
    return found


def _of_loss(run: RunConfig, work: Work) -> StepBytes:
    """While the loss is differentiated."""
    _, summed = _gradients(run, work)
    per_layer, _ = _apart(run, work)
    sizes = work.sizes
    waiting = summed > 0 and sizes.batch_ways > 1
    ends = (_ENDS_SUMMED if waiting else 0.0) + (0.5 if per_layer else 0.0)
    head = _HEAD
    if work.base_bytes is not None:
        head, ends = 0.0, 0.0
    read = work.head_rows * run.data.sequence_length * run.model.d_model
    both_divided = sizes.tensor > 1 and sizes.batch_ways * sizes.pipeline > 1
    in_loop = work.chunked or (summed > 0 and both_divided)
    copies = _LOGITS_IN_LOOP if in_loop else _LOGITS
    return StepBytes(
        parameters=0,
        optimizer=0,
        gradients=summed + _F32 * (head * work.head + ends * work.ends),
        activations=_kept(run, work),
        logits=copies * _F32 * work.logits,
        workspace=_beside_layers(run, work) + _STREAM_OF_HEAD[run.train.remat] * _F32 * read,
        moment="loss",
    )


def _of_update(run: RunConfig, work: Work) -> StepBytes:
    """While the optimizer turns gradients into updates."""
    one, _ = _gradients(run, work)
    _, per_step = _apart(run, work)
    widened = _WIDENED_MOMENTS * work.learned.moment if run.train.moment_dtype != "float32" else 0.0
    return StepBytes(
        parameters=0,
        optimizer=0,
        gradients=one,
        activations=0,
        logits=0,
        workspace=_F32 * work.learned.moment + widened + (_F32 * work.used if per_step else 0.0),
        moment="update",
    )
