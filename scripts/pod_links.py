"""What a training step sends, and how long that takes at the makers' bandwidths: `mesh-transformer plan`'s formulas.

The bytes are those of the programs that XLA's CPU compiler makes (tests/house/test_pods_script.py compares the stored
counts). Times are those of full links and of nothing else, neither latency nor overlap with arithmetic.
"""

from __future__ import annotations

from pod_cases import DEVICES, Case, run_config

from mesh_transformer.plan.links import link_seconds, sent_bytes
from mesh_transformer.plan.work import Work, work_of
from mesh_transformer.train.metrics import flops_per_token


def traffic(case: Case, *, gathered_itemsize: int | None = None, scattered: bool = True) -> dict[str, float]:
    """Bytes that one device sends in a step, by what they are; the options are `sent_bytes`'."""
    return sent_bytes(run_config(case), _work(case), gathered_itemsize=gathered_itemsize, scattered=scattered)


def seconds(case: Case) -> dict[str, float]:
    """`traffic` at the speed of the links that it goes over."""
    return link_seconds(traffic(case), _work(case), DEVICES[case.device])


def arithmetic_seconds(case: Case) -> float:
    """The step's model FLOPs at the peak of all devices; with remat "full" a third more is really computed."""
    run = run_config(case)
    length = run.data.sequence_length
    flops = flops_per_token(run.model, length) * length * case.batch_size
    return flops / case.n_devices / DEVICES[case.device].peak("bfloat16")


def _work(case: Case) -> Work:
    return work_of(run_config(case), case.n_devices, dtype="bfloat16", kernel="plain", chunk=1024)


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
