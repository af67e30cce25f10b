"""What a device sends in a training step, and how long that takes: the ring formulas of docs/parallelism.md."""

from __future__ import annotations

import functools

from mesh_transformer.config.devices import Device
from mesh_transformer.config.dtypes import ITEMSIZE
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import RunConfig
from mesh_transformer.model.params import is_multiplied, named_specs, size
from mesh_transformer.plan.work import Work, sums_of_layer


def sent_bytes(
    run: RunConfig, work: Work, *, gathered_itemsize: int | None = None, scattered: bool = True
) -> dict[str, float]:
    """Bytes that one device sends in a step, by what they are; scalars left out.

    Args:
        gathered_itemsize: bytes of a value of a gathered matrix. None: rounded to the compute dtype before it is sent,
            as TPUs' compiler does; XLA's for CPUs rounds after.
        scattered: of a sum of which a device keeps a part only that part is sent on, a reduce-scatter; otherwise whole
            arrays are summed.
    """
    sizes, cfg, parts = work.sizes, run.model, run.train.gradient_accumulation
    batch, stages, tensor, fsdp = sizes.batch_ways, sizes.pipeline, sizes.tensor, sizes.fsdp
    held = _held(cfg, tensor, stages)
    stacked, head, vectors, tables = (held[name] for name in ("matrices", "head", "vectors", "tables"))
    micro, ticks = work.microbatches, work.ticks
    often = ticks if stages > 1 else 1  # a stage's passes; it also works in the ticks that it idles
    each_layer = run.mesh.zero == 3 and run.train.gather == "per_layer"
    # A stage's matrices are summed in every pass, all others as seldom as they can be; the head's over the stages too.
    in_parts = 1 if scattered else 2
    waiting = 0.0 if stages > 1 else stacked
    in_passes = tables + often * (vectors + stacked if stages > 1 else vectors)
    if run.lora:  # an adapter's gradients are summed in every microbatch
        sums = 2 * _share(batch) * parts * work.learned.use
    else:
        sums = 2 * _share(batch) * parts * in_passes
        sums += 2 * (_share(sizes.data) * waiting + _share(sizes.data * stages) * head) / fsdp
        sums += in_parts * _share(fsdp) * (parts if each_layer else 1) * (waiting + head)
    sent = {"gradients": 4 * sums}
    as_stored = work.base_bytes or 4
    as_sent = gathered_itemsize or min(ITEMSIZE[work.dtype], as_stored)
    if fsdp > 1 and each_layer:  # the backward pass gathers a layer again; the head is kept from the forward pass
        rounded, exact = (1 + often) * stacked + head, (1 + often) * vectors + tables
        sent["gathered parameters"] = _share(fsdp) * parts * (as_sent * rounded + as_stored * exact)
    elif fsdp > 1 and run.mesh.zero == 3:
        sent["gathered parameters"] = _share(fsdp) * as_stored * (stacked + head + vectors + tables)
    elif fsdp > 1:
        updated = work.learned.use if run.lora else stacked + head + vectors + tables
        sent["updated parameters"] = _share(fsdp) * 4 * updated
    stream = 4 * work.rows * micro * run.data.sequence_length * cfg.d_model
    passes = cfg.n_layers / stages * often / micro
    divided = run.mesh.shard_sequence and tensor > 1
    of_norms, of_branches = sums_of_layer(cfg)
    # A divided stream is gathered before a layer, again when the backward pass computes the layer again, and backward;
    # beside the layers, as float32, before the head and in the embedding's backward pass.
    if divided:
        gathers = (2 * of_norms + of_branches) * (gathered_itemsize or ITEMSIZE[work.dtype]) / 4
        a_layer = gathers + (of_norms + of_branches) * (2 if stages > 1 or not scattered else 1)
    else:
        a_layer = 2 * (of_norms + of_branches)
    if run.train.remat != "none":  # what the second branch read is computed again, the first one's sum with it
        a_layer += (1 if divided and stages == 1 else 2) * (of_branches - 1)
    beside = (3 if divided else 2) * (1 + 1 / stages)
    sent["tensor"] = parts * (a_layer * passes + beside) * _share(tensor) * stream
    if stages > 1:  # to the next stage and back; what enters the stages, and what leaves them
        between = stream / (tensor if divided else 1)
        sent["pipeline"] = parts * (2 * ticks / micro + 2 * _share(stages) + 2) * between
    return {what: amount for what, amount in sent.items() if amount}


def link_seconds(sent: dict[str, float], work: Work, device: Device) -> dict[str, float]:
    """`sent_bytes` at the full speed of the links that each goes over, one thing after the other."""
    sizes = work.sizes
    batch = sizes.batch_ways
    over = {
        "gradients": (batch, sizes.tensor),
        "tensor": (sizes.tensor, 1),
        "pipeline": (sizes.pipeline, sizes.tensor * batch),
    } | dict.fromkeys(("updated parameters", "gathered parameters"), (sizes.fsdp, sizes.tensor))
    return {what: amount / ring_speed(device, *over[what]) for what, amount in sent.items()}


def ring_speed(device: Device, n: int, inner: int) -> float:
    """Bytes a second that each of n devices sends along a ring; `inner` devices lie between two that follow another.

    A ring that leaves the machine has the ports of all its devices there.
    """
    if n * inner <= device.n_near:
        return device.near
    together = max(1, min(n, device.n_near // inner))
    return min(device.near, together * device.far)


@functools.lru_cache(maxsize=1024)
def _held(cfg: ModelConfig, tensor: int, stages: int) -> dict[str, float]:
    """Parameters that a device computes with, by kind."""
    found = dict.fromkeys(("matrices", "head", "vectors", "tables"), 0.0)
    for spec in named_specs(cfg).values():
        stacked = "layers" in spec.axes
        matrix = "matrices" if stacked else "head"
        kind = matrix if is_multiplied(spec) else "vectors" if stacked else "tables"
        found[kind] += size(spec, cfg) / tensor / (stages if stacked else 1)
    return found


def _share(n: int) -> float:
    """Of an array, what each of n devices in a ring sends to gather or to scatter it."""
    return (n - 1) / n
