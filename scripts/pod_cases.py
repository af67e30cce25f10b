"""The devices and meshes that scripts/plan_pods.py plans."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from mesh_transformer.config.devices import device
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig

GIB = 2**30
DEVICES = {"TPU v3": device("tpu-v3"), "TPU v5p": device("tpu-v5p"), "H100": device("h100")}
# What libtpu calls the slices of so many devices.
SLICES = {
    "TPU v3": {8: "v3:2x2x1", 32: "v3:4x4", 128: "v3:8x8", 256: "v3:8x16"},
    "TPU v5p": {8: "v5p:2x2x2", 64: "v5p:4x4x4", 256: "v5p:4x8x8"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a mesh.

    rows: sequences at one time of each of data x fsdp; the batch is rows x data x fsdp x accumulation. length: tokens
    of a sequence; 0: the model's whole context.
    """

    pod: str
    device: str
    preset: str
    mesh: dict[str, Any]
    rows: int = 1
    length: int = 0
    accumulation: int = 1
    microbatches: int = 0
    gather: Literal["per_layer", "per_step"] = "per_layer"
    target: Literal["tpu", "cpu", ""] = "tpu"

    @property
    def n_devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor", "pipeline"))

    @property
    def batch_size(self) -> int:
        """Sequences of an optimizer step."""
        return self.rows * self.accumulation * self.mesh["data"] * self.mesh.get("fsdp", 1)

    @property
    def mesh_name(self) -> str:
        """For example "fsdp 8 x tensor 8, zero 3"."""
        axes = [
            f"{name} {self.mesh[name]}" for name in ("data", "fsdp", "tensor", "pipeline") if self.mesh.get(name, 1) > 1
        ]
        zero = f", zero {self.mesh.get('zero', 1)}" if self.mesh.get("fsdp", 1) > 1 else ""
        sequence = ", shard_sequence" if self.mesh.get("shard_sequence") else ""
        return " x ".join(axes) + zero + sequence + (", per_step" if self.gather == "per_step" else "")

    @property
    def name(self) -> str:
        """Unique among the cases."""
        compiler = f" ({self.target})" if self.target else ""
        length = f" of {self.length}" if self.length else ""
        return f"{self.pod}: {self.preset}, {self.mesh_name}, {self.rows} rows{length}{compiler}"

    def described(self) -> dict[str, Any]:
        """What the report says of a case before anything is computed."""
        return dataclasses.asdict(self) | {"n_devices": self.n_devices, "batch_size": self.batch_size}


def run_config(case: Case) -> RunConfig:
    """The configuration whose training step a case is."""
    model = preset(case.preset)
    train = TrainConfig(
        steps=1000,
        learning_rate=1e-4,
        batch_size=case.batch_size,
        gradient_accumulation=case.accumulation,
        remat="full",
        compute_dtype="bfloat16",
        gather=case.gather,
        pipeline_microbatches=case.microbatches,
    )
    data = DataConfig(train="none", sequence_length=case.length or model.n_ctx)
    return RunConfig(name="plan", model=model, data=data, train=train, mesh=MeshConfig(**case.mesh))


def _case(pod: str, device: str, preset: str, rows: int = 1, target: str = "tpu", **mesh: Any) -> Case:
    more = {name: mesh.pop(name) for name in ("microbatches", "gather", "accumulation", "length") if name in mesh}
    return Case(pod=pod, device=device, preset=preset, mesh={"data": 1, **mesh}, rows=rows, target=target, **more)


SMALL, LARGE = "gpt-j-6b", "gpt-j-40b"
CASES = (
    _case("v3-8", "TPU v3", SMALL, data=8),
    _case("v3-8", "TPU v3", SMALL, fsdp=8),
    _case("v3-8", "TPU v3", SMALL, fsdp=8, zero=3),
    _case("v3-8", "TPU v3", SMALL, tensor=8),
    _case("v3-8", "TPU v3", SMALL, rows=4, tensor=8),
    _case("v3-8", "TPU v3", SMALL, tensor=8, shard_sequence=True),
    _case("v3-8", "TPU v3", SMALL, fsdp=2, tensor=4, zero=3),
    _case("v3-8", "TPU v3", LARGE, tensor=8),
    _case("v3-32", "TPU v3", SMALL, data=4, tensor=8),
    _case("v3-32", "TPU v3", SMALL, fsdp=4, tensor=8),
    _case("v3-32", "TPU v3", LARGE, fsdp=4, tensor=8, zero=3),
    _case("v3-128", "TPU v3", SMALL, fsdp=16, tensor=8),
    _case("v3-128", "TPU v3", LARGE, fsdp=16, tensor=8, zero=3),
    _case("v3-128", "TPU v3", LARGE, tensor=8, pipeline=16, rows=16, microbatches=16),
    _case("v3-128", "TPU v3", LARGE, tensor=8, pipeline=16, rows=16, microbatches=16, shard_sequence=True),
    _case("v3-256", "TPU v3", SMALL, fsdp=32, tensor=8),
    _case("v3-256", "TPU v3", LARGE, fsdp=32, tensor=8),
    _case("v3-256", "TPU v3", LARGE, fsdp=32, tensor=8, zero=3),
    _case("8 x H100", "H100", SMALL, target="cpu", data=8),
    _case("8 x H100", "H100", SMALL, rows=4, target="cpu", fsdp=8),
    _case("8 x H100", "H100", SMALL, rows=4, target="cpu", fsdp=8, zero=3),
    _case("8 x H100", "H100", SMALL, rows=8, target="cpu", tensor=8),
    _case("8 x H100", "H100", LARGE, target="cpu", tensor=8),
    _case("64 x H100", "H100", LARGE, rows=2, target="cpu", fsdp=64, zero=3),
    _case("64 x H100", "H100", LARGE, rows=4, target="cpu", fsdp=8, tensor=8),
    _case("64 x H100", "H100", LARGE, rows=4, target="cpu", fsdp=8, tensor=8, zero=3),
    _case("64 x H100", "H100", LARGE, rows=32, target="cpu", tensor=8, pipeline=8, microbatches=32),
    _case("256 x 80 GB", "H100", LARGE, rows=4, target="cpu", data=4, fsdp=8, tensor=8),
    _case("256 x 80 GB", "H100", LARGE, rows=2, target="cpu", fsdp=256, zero=3),
    _case("v5p, 8 chips", "TPU v5p", SMALL, rows=4, fsdp=8, zero=3),
    _case("v5p, 64 chips", "TPU v5p", LARGE, rows=4, fsdp=16, tensor=4, zero=3),
    _case("v5p, 64 chips", "TPU v5p", LARGE, rows=4, fsdp=8, tensor=8, zero=3),
    # As many tokens in shorter sequences: what of the CPU's temporaries are attention's scores.
    _case("8 x H100", "H100", SMALL, rows=8, length=1024, target="cpu", fsdp=8, zero=3),
    _case("8 x H100", "H100", SMALL, rows=32, length=256, target="cpu", fsdp=8, zero=3),
    # The same program by the CPU's compiler as by the TPU's above: how far the CPU's estimate is off.
    _case("v3-8", "TPU v3", SMALL, target="cpu", tensor=8),
    _case("v3-8", "TPU v3", SMALL, target="cpu", fsdp=8, zero=3),
)

# Every strategy on eight devices, for a small model whose collectives are counted: so many layers, and so many more.
LAYERS_FEW, LAYERS_MORE = 8, 8
STRATEGIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("data 8", {"data": 8}),
    ("fsdp 8, zero 1", {"fsdp": 8}),
    ("fsdp 8, zero 3, per_layer", {"fsdp": 8, "zero": 3}),
    ("data 2 x fsdp 4, zero 3, per_layer", {"data": 2, "fsdp": 4, "zero": 3}),
    ("fsdp 8, zero 3, per_step", {"fsdp": 8, "zero": 3, "gather": "per_step"}),
    ("tensor 8", {"tensor": 8}),
    ("tensor 8, shard_sequence", {"tensor": 8, "shard_sequence": True}),
    ("fsdp 2 x tensor 4, zero 3", {"fsdp": 2, "tensor": 4, "zero": 3}),
    ("pipeline 8", {"pipeline": 8}),
    ("data 2 x pipeline 4", {"data": 2, "pipeline": 4}),
    ("data 2 x pipeline 4, pipeline_interleave 2", {"data": 2, "pipeline": 4, "pipeline_interleave": 2}),
    ("fsdp 2 x pipeline 4, zero 3", {"fsdp": 2, "pipeline": 4, "zero": 3}),
)
