"""Accelerators by the makers' data sheets: memory, arithmetic, and the speed at which bytes come and go.

A device is what JAX calls one: of TPU v2 and v3 one of the two cores of a chip, with half of what the chip has. All
figures are dense peaks, decimal units but where GIB is written, and of the form that servers hold (SXM, not PCIe).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from mesh_transformer.config.checks import nearest
from mesh_transformer.config.errors import UserError

GIB = 2**30
_TPU = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/"
_DESIGN = "Norrie et al. 2021, The Design Process for Google's Training Chips: TPUv2 and TPUv3"
# Of the host's network, where a maker names none for the device: a 400 Gbit/s port, a 200 Gbit/s port.
_PORT_400, _PORT_200 = 50e9, 25e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device, and the links by which a ring of such devices sends.

    memory: bytes. flops: FLOP/s by the dtype of a product's factors. bandwidth: bytes a second of its memory. near,
    far: bytes a second that one device can send along a ring, within a machine (over the torus of TPUs) and between
    machines. n_near: devices that `near` joins. kinds: how the name that JAX reports begins, with the bfloat16 peak
    where a form of the device has another than `flops` says.
    """

    name: str
    memory: int
    flops: Mapping[str, float]
    bandwidth: float
    near: float
    far: float
    n_near: int
    source: str
    maker: Literal["google", "nvidia", "other"] = "other"
    kinds: Mapping[str, float | None] = dataclasses.field(default_factory=dict)

    @property
    def usable(self) -> float:
        """Bytes that programs get: on a TPU without what its runtime keeps (15.48 of 16 GiB on v3, as its compiler
        says), on a GPU the share that the commands ask for (docs/gpu.md).
        """
        return self.memory * {"google": 15.48 / 16, "nvidia": 0.92, "other": 1.0}[self.maker]

    def peak(self, dtype: str) -> float:
        """FLOP/s of products whose factors have this dtype; of one that the device has no units for, float32's."""
        return self.flops.get(dtype, self.flops["float32"])


def _tpu(
    name: str,
    *,
    bf16: float,
    memory: int,
    bandwidth: float,
    link: float,
    n_near: int,
    source: str,
    kind: str,
    int8: float | None = None,
) -> Device:
    """A TPU whose ring along one axis of the torus sends by two links of `link` bytes a second each way.

    Float32 products are made of six bfloat16 ones (XLA's precision "highest").
    """
    flops = {"bfloat16": bf16, "float32": bf16 / 6} | ({"int8": int8} if int8 else {})
    return Device(
        name=name,
        memory=memory,
        flops=flops,
        bandwidth=bandwidth,
        near=2 * link,
        far=2 * link,
        n_near=n_near,
        source=source,
        maker="google",
        kinds={kind: None},
    )


def _gpu(
    name: str,
    *,
    bf16: float,
    f32: float,
    int8: float,
    memory: int,
    bandwidth: float,
    nvlink: float,
    far: float,
    source: str,
    kinds: Mapping[str, float | None],
    n_near: int = 8,
) -> Device:
    """An NVIDIA GPU; `nvlink` is what the data sheet says, both ways together."""
    flops = {"bfloat16": bf16, "float16": bf16, "float32": f32, "int8": int8}
    return Device(
        name=name,
        memory=memory,
        flops=flops,
        bandwidth=bandwidth,
        near=nvlink / 2,
        far=far,
        n_near=n_near,
        source=source,
        maker="nvidia",
        kinds=kinds,
    )


_LIST = (
    # Half a chip: its 45 Tflop/s, 16 GiB and 700 GB/s; links of 496 Gbit/s each way, shared by the two cores.
    _tpu(
        "tpu-v2", bf16=45e12 / 2, memory=8 * GIB, bandwidth=700e9 / 2, link=496e9 / 8 / 2, n_near=512,
        source=f"{_TPU}v2; {_DESIGN}", kind="TPU v2",
    ),
    # Half a chip: 123 Tflop/s, 32 GiB, 900 GB/s. A link carries 340 TB/s of all-reduce / 1024 chips / 4 links.
    _tpu(
        "tpu-v3", bf16=123e12 / 2, memory=16 * GIB, bandwidth=900e9 / 2, link=340e12 / 1024 / 4 / 2, n_near=2048,
        source=f"{_TPU}v3; {_DESIGN}", kind="TPU v3",
    ),
    _tpu(
        "tpu-v4", bf16=275e12, int8=275e12, memory=32 * GIB, bandwidth=1228e9, link=50e9, n_near=4096,
        source=f"{_TPU}v4; Jouppi et al. 2023, TPU v4", kind="TPU v4",
    ),
    _tpu(
        "tpu-v5e", bf16=197e12, int8=393e12, memory=16 * GIB, bandwidth=819e9, link=400e9 / 2 / 4, n_near=256,
        source=f"{_TPU}v5e", kind="TPU v5 lite",
    ),
    # v5p's own name begins no other.
    _tpu(
        "tpu-v5p", bf16=459e12, int8=918e12, memory=95 * GIB, bandwidth=2765e9, link=1200e9 / 2 / 6, n_near=8960,
        source=f"{_TPU}v5p", kind="TPU v5",
    ),
    _tpu(
        "tpu-v6e", bf16=918e12, int8=1836e12, memory=32 * GIB, bandwidth=1638e9, link=800e9 / 2 / 4, n_near=256,
        source=f"{_TPU}v6e", kind="TPU v6 lite",
    ),
    _gpu(
        "a100-40gb", bf16=312e12, f32=19.5e12, int8=624e12, memory=40 * 10**9, bandwidth=1555e9, nvlink=600e9,
        far=_PORT_200, source=f"{_NVIDIA}data-center/a100/", kinds={"NVIDIA A100": None},
    ),
    _gpu(
        "a100-80gb", bf16=312e12, f32=19.5e12, int8=624e12, memory=80 * 10**9, bandwidth=2039e9, nvlink=600e9,
        far=_PORT_200, source=f"{_NVIDIA}data-center/a100/", kinds={"NVIDIA A100-SXM4-80GB": None},
    ),
    _gpu(
        "h100", bf16=989e12, f32=67e12, int8=1979e12, memory=80 * 10**9, bandwidth=3350e9, nvlink=900e9,
        far=_PORT_400, source=f"{_NVIDIA}data-center/h100/, {_NVIDIA}data-center/dgx-h100/",
        kinds={"NVIDIA H100": None, "NVIDIA H100 NVL": 835e12, "NVIDIA H100 PCIe": 756e12},
    ),
    _gpu(
        "h200", bf16=989e12, f32=67e12, int8=1979e12, memory=141 * 10**9, bandwidth=4800e9, nvlink=900e9,
        far=_PORT_400, source=f"{_NVIDIA}data-center/h200/", kinds={"NVIDIA H200": None},
    ),
    _gpu(
        "b200", bf16=2250e12, f32=75e12, int8=4500e12, memory=180 * 10**9, bandwidth=7700e9, nvlink=1800e9,
        far=_PORT_400, source=f"{_NVIDIA}data-center/hgx/", kinds={"NVIDIA B200": None},
    ),
    # Consumer cards: products of 16-bit factors summed in float32 at half the advertised rate; PCIe 4.0 x 16, and a
    # machine of at most two.
    _gpu(
        "rtx-3090", bf16=71e12, f32=35.6e12, int8=284e12, memory=24 * GIB, bandwidth=936e9, nvlink=63e9, far=1.25e9,
        n_near=2, source="NVIDIA Ampere GA102 GPU Architecture, version 2, table of the RTX 3090",
        kinds={"NVIDIA GeForce RTX 3090": None},
    ),
    _gpu(
        "rtx-4090", bf16=165.2e12, f32=82.6e12, int8=660.6e12, memory=24 * GIB, bandwidth=1008e9, nvlink=63e9,
        far=1.25e9, n_near=2, source="NVIDIA Ada GPU Architecture, table of the RTX 4090",
        kinds={"NVIDIA GeForce RTX 4090": None},
    ),
    # No data sheet: two cores of an AMD EPYC, as docs/performance.md measured them; --device here measures others.
    Device(
        name="cpu", memory=24 * 10**9, flops={"float32": 300e9, "bfloat16": 634e9}, bandwidth=42e9, near=10e9,
        far=1.25e9, n_near=64, source="measured on two cores of an AMD EPYC: docs/performance.md",
    ),
)  # fmt: skip
DEVICES: dict[str, Device] = {device.name: device for device in _LIST}


def device(name: str) -> Device:
    """The device of the table with this name.

    Raises:
        UserError: there is none; the message lists those that there are.
    """
    found = DEVICES.get(name.lower().replace(" ", "-"))
    if found is None:
        close = nearest(name.lower(), DEVICES)
        meant = f" (did you mean {close}?)" if close else ""
        raise UserError(
            f"--device {name} is not known{meant}\nexpected one of {', '.join(DEVICES)}, or here, which measures the "
            "devices of this machine"
        )
    return found


def of_kind(kind: str) -> Device | None:
    """The device that JAX reports as `kind`, by the longest beginning; None where it is not in the table (a CPU)."""
    found = _beginning(kind)
    return found[1] if found else None


def peak_flops_of(kind: str) -> float | None:
    """Its dense bfloat16 peak in FLOP/s."""
    found = _beginning(kind)
    if found is None:
        return None
    begins, one = found
    return one.kinds[begins] or one.flops["bfloat16"]


def _beginning(kind: str) -> tuple[str, Device] | None:
    known = [(begins, one) for one in DEVICES.values() for begins in one.kinds if kind.startswith(begins)]
    return max(known, key=lambda pair: len(pair[0])) if known else None
