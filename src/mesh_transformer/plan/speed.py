"""The time of a training step by a roofline: products, memory, links, one after the other."""

from __future__ import annotations

import dataclasses

from mesh_transformer.config.devices import Device
from mesh_transformer.config.dtypes import ITEMSIZE
from mesh_transformer.config.run import RunConfig
from mesh_transformer.model.params import count_matmul_params
from mesh_transformer.plan.links import link_seconds, sent_bytes
from mesh_transformer.plan.work import Work, matmul_values
from mesh_transformer.sharding.mesh import bubble_fraction
from mesh_transformer.train.metrics import flops_per_token, scored_positions

# Of the peak, what products are taken to reach; of the memory's bandwidth, what reading and writing is. Assumptions,
# the same for every device and stated wherever a time is.
PRODUCTS_REACH = 0.6
MEMORY_REACH = 0.8
# How often the layers' forward pass is computed again for the backward pass.
_AGAIN = {"none": 0, "dots": 0, "full": 1}
# Times that an array is read or written in a layer, forward and backward, outside of products: stream, heads,
# feed-forward, scores.
_TOUCHED = {"none": (16, 12, 10, 8), "dots": (18, 14, 12, 10), "full": (24, 18, 15, 12)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, by what they go into, and what follows from their sum.

    mfu: model FLOPs of a second over the bfloat16 peak, recomputation not counted (train.metrics).
    """

    products: float
    memory: float
    update: float
    idle: float
    links: dict[str, float]
    tokens: int
    flops: float
    peak: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.products + self.memory + self.update + self.idle + sum(self.links.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation."""
        return self.flops / self.seconds / self.peak


def step_time(run: RunConfig, work: Work, device: Device, *, reach: float = PRODUCTS_REACH) -> StepTime:
    """The time of a step.

    reach: the part of the peak that products reach.
    """
    cfg, length = run.model, run.data.sequence_length
    tokens, n = run.train.batch_size * length, work.sizes.n_devices
    model_flops = flops_per_token(cfg, length) * tokens
    again = _AGAIN[run.train.remat]
    a_position = 4 * cfg.axis_sizes["heads"] * cfg.axis_sizes["head_dim"] * tokens
    attention = a_position * scored_positions(cfg, length)  # forward alone
    whole = a_position * cfg.n_layers * length  # the plain form computes what a window hides too
    computed: float = model_flops + again * (2 * matmul_values(cfg) * tokens + attention)
    if run.lora:  # the base's matrices have no gradients, a third of its products; A and B have products of their own
        own = 2 * work.learned.use * n / work.sizes.batch_ways  # what lies over the batch's devices is computed by each
        computed += ((3 + again) * own - 2 * count_matmul_params(cfg)) * tokens
    computed += (3 + again) * (whole - attention) if work.scores else 0
    if work.chunked:  # the backward pass computes a chunk's logits again
        computed += 2 * cfg.d_model * cfg.axis_sizes["vocab"] * tokens
    if not work.scores:  # a kernel leaves out what the mask hides, and computes the scores again backwards
        computed -= attention * (3 + again) / 2 - attention / 2
    products = computed / n / (reach * device.peak(work.dtype))
    speed = MEMORY_REACH * device.bandwidth
    passes = run.train.gradient_accumulation * (work.microbatches if work.sizes.pipeline > 1 else 1)
    weights_read = (2 if run.lora else 3) * ITEMSIZE[work.dtype] * work.used * passes
    products = max(products, weights_read / speed)
    stream, heads, wide, scores = _TOUCHED[run.train.remat]
    gates = 2 if cfg.feed_forward.startswith("glu_") else 1
    touched = stream * work.stream + heads * (work.heads + work.kv) / 2
    touched += gates * wide * work.wide + scores * work.scores
    bubble = bubble_fraction(work.sizes.pipeline, work.microbatches, run.train.pipeline_interleave)
    memory = 4 * touched * work.layers * passes / speed
    update = _update_bytes(run, work) / speed
    return StepTime(
        products=products,
        memory=memory,
        update=update,
        idle=(products + memory) * bubble / (1 - bubble),
        links=link_seconds(sent_bytes(run, work), work, device),
        tokens=tokens,
        flops=model_flops,
        peak=device.peak("bfloat16") * n,
    )


def _update_bytes(run: RunConfig, work: Work) -> float:
    of_moments = 4 * ITEMSIZE[run.train.moment_dtype]
    of_parameters = 2 * (4 if run.lora else ITEMSIZE[run.train.param_dtype])
    # Two moments and a parameter both ways, and the gradient.
    return work.learned.moment * (of_moments + of_parameters + 4)
