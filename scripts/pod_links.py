"""A model on paper of what a training step sends, and how long that takes at the makers' bandwidths.

It agrees with what the TPU's compiler makes (tests/house/test_pods_script.py compares the stored counts). Times are
those of full links and of nothing else, neither latency nor overlap with arithmetic.
"""

from __future__ import annotations

from pod_cases import DEVICES, Case

# Sums of a whole activation over `tensor` in each layer: one forward, and one backward if the compiler adds the
# gradients of the four products that read the same input before it sends them. The TPU's compiler does.
SUMS_A_LAYER = 2


def traffic(case: Case, *, gathered_itemsize: int = 2, sums_a_layer: int = SUMS_A_LAYER) -> dict[str, float]:
    """Bytes that one device sends in a step, by what they are: of the layers, without the head's own sums over tensor.

    Args:
        gathered_itemsize: bytes of a value that ZeRO 3 gathers in each layer: 2 where the compiler rounds to bfloat16
            before it sends (TPU), 4 where it rounds after (CPU).
        sums_a_layer: activations that a layer sums over `tensor`, both ways together.
    """
    from mesh_transformer.config.presets import preset
    from mesh_transformer.model.params import named_specs, size

    model, mesh = preset(case.preset), case.mesh
    tensor, stages, fsdp = (mesh.get(axis, 1) for axis in ("tensor", "pipeline", "fsdp"))
    batch_ways = mesh["data"] * fsdp
    specs = named_specs(model).values()
    stacked = sum(size(spec, model) for spec in specs if "layers" in spec.axes) / tensor / stages
    others = sum(size(spec, model) for spec in specs if "layers" not in spec.axes) / tensor
    held = stacked + others  # parameters that a device computes with
    activation = 4 * case.rows * (case.length or model.n_ctx) * model.d_model  # float32, of all rows at one time
    parts, micro = case.accumulation, max(1, case.microbatches)
    ticks = micro + stages - 1
    summed = others + stacked * (ticks if stages > 1 else 1)  # a pipeline sums its layers' gradients in every tick
    sent = {"gradients": 2 * _share(batch_ways) * 4 * summed * parts}
    if fsdp > 1 and mesh.get("zero", 1) == 1:
        sent["updated parameters"] = _share(fsdp) * 4 * held
    if fsdp > 1 and mesh.get("zero", 1) == 3:
        per_layer = 2 * _share(fsdp) * gathered_itemsize * held * parts
        sent["gathered parameters"] = per_layer if case.gather == "per_layer" else _share(fsdp) * 4 * held
    layers = model.n_layers / stages * (ticks / micro)  # a stage also works in the ticks that it idles
    sent["tensor"] = parts * layers * sums_a_layer * 2 * _share(tensor) * activation
    if stages > 1:
        sent["pipeline"] = parts * 2 * ticks / micro * activation
    return {what: size for what, size in sent.items() if size}


def seconds(case: Case, **how: int) -> dict[str, float]:
    """`traffic` at the speed of the links that it goes over."""
    device, mesh = DEVICES[case.device], case.mesh
    tensor, fsdp = mesh.get("tensor", 1), mesh.get("fsdp", 1)
    batch = mesh["data"] * fsdp
    over = {"gradients": (batch, tensor), "tensor": (tensor, 1), "pipeline": (mesh.get("pipeline", 1), tensor * batch)}
    over |= dict.fromkeys(("updated parameters", "gathered parameters"), (fsdp, tensor))
    times = {}
    for what, size in traffic(case, **how).items():
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
