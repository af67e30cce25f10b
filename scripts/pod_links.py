"""A model on paper of what a training step sends, and how long that takes at the makers' bandwidths.

The bytes are those of the programs that XLA's CPU compiler makes (tests/house/test_pods_script.py compares the stored
counts). Times are those of full links and of nothing else, neither latency nor overlap with arithmetic.
"""

from __future__ import annotations

from pod_cases import DEVICES, Case


def traffic(case: Case, *, gathered_itemsize: int = 2, scattered: bool = True) -> dict[str, float]:
    """Bytes that one device sends in a step, by what they are; without scalars a token, as the losses are.

    Args:
        gathered_itemsize: bytes of a value of a matrix that is gathered before use: 2 where the compiler rounds to
            bfloat16 before it sends (TPU), 4 where it rounds after (CPU).
        scattered: a sum of which each device keeps a part is sent as a reduce-scatter; otherwise whole arrays are
            summed.
    """
    from mesh_transformer.config.presets import preset
    from mesh_transformer.model.params import is_multiplied, named_specs, size

    model, mesh = preset(case.preset), case.mesh
    tensor, stages, fsdp, data = (mesh.get(axis, 1) for axis in ("tensor", "pipeline", "fsdp", "data"))
    zero, parts, micro = mesh.get("zero", 1), case.accumulation, max(1, case.microbatches)
    specs = named_specs(model).values()

    def held(layers: bool, matrices: bool) -> float:
        """Parameters that a device computes with."""
        chosen = [s for s in specs if ("layers" in s.axes) == layers and is_multiplied(s) == matrices]
        return sum(size(s, model) for s in chosen) / tensor / (stages if layers else 1)

    stacked, head = held(True, True), held(False, True)  # the matrices of the layers and of the head
    vectors, tables = held(True, False), held(False, False)  # the embedding is a table
    length = case.length or model.n_ctx
    activation = 4 * case.rows * length * model.d_model  # float32, of all rows at one time
    ticks = micro + stages - 1
    often = ticks if stages > 1 else 1  # a stage's passes; it also works in the ticks that it idles
    each_layer = zero == 3 and case.gather == "per_layer"
    in_parts = 1 if scattered else 2

    # A stage's matrices are summed in every pass, all others as seldom as they can be; the head's over the stages too.
    waiting = 0 if stages > 1 else stacked
    at_once = tables + often * (vectors + stacked if stages > 1 else vectors)
    sums = 2 * _share(data * fsdp) * parts * at_once
    sums += 2 * (_share(data) * waiting + _share(data * stages) * head) / fsdp
    sums += in_parts * _share(fsdp) * (parts if each_layer else 1) * (waiting + head)
    sent = {"gradients": 4 * sums}
    if fsdp > 1 and each_layer:  # the backward pass gathers a layer again; the head is kept from the forward pass
        rounded = (1 + often) * stacked + head
        exact = (1 + often) * vectors + tables
        sent["gathered parameters"] = _share(fsdp) * parts * (gathered_itemsize * rounded + 4 * exact)
    elif fsdp > 1:
        what = "gathered parameters" if zero == 3 else "updated parameters"
        sent[what] = _share(fsdp) * 4 * (stacked + head + vectors + tables)
    passes = model.n_layers / stages * often / micro
    # A divided stream is gathered before a layer, again when the backward pass computes the layer again, and backward;
    # beside the layers, as float32, before the head and in the embedding's backward pass.
    divided, whole = bool(mesh.get("shard_sequence")), stages > 1 or not scattered
    a_layer = 3 * gathered_itemsize / 4 + (4 if whole else 2) if divided else 4
    beside = (3 if divided else 2) * (1 + 1 / stages)
    sent["tensor"] = parts * (a_layer * passes + beside) * _share(tensor) * activation
    if stages > 1:  # to the next stage and back; what enters the stages, and what leaves them
        between = activation / (tensor if divided else 1)
        sent["pipeline"] = parts * (2 * ticks / micro + 2 * _share(stages) + 2) * between
    return {what: amount for what, amount in sent.items() if amount}


def seconds(case: Case) -> dict[str, float]:
    """`traffic` at the speed of the links that it goes over."""
    device, mesh = DEVICES[case.device], case.mesh
    tensor, fsdp = mesh.get("tensor", 1), mesh.get("fsdp", 1)
    batch = mesh["data"] * fsdp
    over = {"gradients": (batch, tensor), "tensor": (tensor, 1), "pipeline": (mesh.get("pipeline", 1), tensor * batch)}
    over |= dict.fromkeys(("updated parameters", "gathered parameters"), (fsdp, tensor))
    times = {}
    for what, size in traffic(case).items():
        n, inner = over[what]
        together = max(1, min(n, device.n_near // inner))  # devices of a ring that lie in one node
        spans = n * inner > device.n_near
        times[what] = size / (min(device.near, together * device.far) if spans else device.near)
    return times


def arithmetic_seconds(case: Case) -> float:
    """The step's model FLOPs at the peak of all devices; with remat "full" a third more is really computed."""
    from mesh_transformer.config.presets import preset
    from mesh_transformer.train.metrics import flops_per_token

    model = preset(case.preset)
    length = case.length or model.n_ctx
    flops = flops_per_token(model, length) * length * case.batch_size
    return flops / case.n_devices / DEVICES[case.device].peak_flops


def _share(n: int) -> float:
    """Of an array, what each of n devices in a ring sends to gather or to scatter it."""
    return (n - 1) / n


# GPT-J-6B on 256 devices, 256 sequences a step: one strategy beside the other, memory left aside.
PAPER = tuple(
    Case(pod=pod, device=device, preset="gpt-j-6b", mesh=mesh, rows=rows, microbatches=micro, target="")
    for pod, device in (("v3-256", "TPU v3"), ("v5p, 256 chips", "TPU v5p"), ("256 x H100", "H100"))
    for mesh, rows, micro in (
        ({"data": 256}, 1, 0),
        ({"data": 1, "fsdp": 256}, 1, 0),
        ({"data": 1, "fsdp": 256, "zero": 3}, 1, 0),
        ({"data": 32, "tensor": 8}, 8, 0),
        ({"data": 1, "fsdp": 32, "tensor": 8}, 8, 0),
        ({"data": 1, "fsdp": 32, "tensor": 8, "zero": 3}, 8, 0),
        ({"data": 8, "tensor": 8, "pipeline": 4}, 32, 16),
    )
)
