"""What one device of a mesh holds and computes in a training step: sizes of arrays, from the parameter table, the
sharding rules and the shapes of a batch. No device, no array, no program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax

from mesh_transformer.checkpoint.lora import record_of
from mesh_transformer.config.devices import Device
from mesh_transformer.config.dtypes import ITEMSIZE
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import RunConfig
from mesh_transformer.config.tuning import LoraConfig
from mesh_transformer.kernels.accelerators import LANES, WIDEST_HEAD, WIDEST_HEAD_SINCE_HOPPER
from mesh_transformer.model.lora import adapter_table, factor_shape
from mesh_transformer.model.params import ParamSpec, is_multiplied, named_specs, param_table, size
from mesh_transformer.model.policy import LOSS_CHUNK, LOSS_CHUNK_ON_CPU
from mesh_transformer.sharding.memory import ways_of
from mesh_transformer.sharding.mesh import Sizes, check_run, mesh_sizes, n_microbatches
from mesh_transformer.sharding.rules import rules_for
from mesh_transformer.train.lora import check_lora

Lying = Literal["rest", "use", "moment"]
Part = Literal["all", "layers", "ends"]


class Learned(NamedTuple):
    """Values on a device of what has gradients: at rest, brought together, and as its moments lie."""

    rest: float
    use: float
    moment: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Values, not bytes, on one device; a "stream" is [rows, sequence, d_model] of what is computed at one time.

    rows: sequences at one time (of a pipeline: of one microbatch). head_rows: in the head, which a pipeline divides
    among its stages. ticks: of a pipeline, in which a stage computes one microbatch. layers: held. layer_values: one
    layer's parameters while in use. rested, used: the model's parameters at rest, and brought together; ends: of
    embedding and head, in use; head: of what the head multiplies with, which may be the token table. learned: what has
    gradients, the model's parameters or an adapter's. base_bytes: of a value of the model that rests beside an adapter;
    None: there is none. stream, whole_stream: as it lies between layers, and in them. heads: of one of q and the mixed
    values; kv: of one of k and v. wide: of the feed-forward, once. scores, mask: of attention, 0 where a kernel never
    holds them. logits: of a chunk. chunked: whether there are several.
    """

    sizes: Sizes
    dtype: str
    rows: int
    head_rows: float
    microbatches: int
    ticks: int
    layers: int
    layer_values: float
    rested: float
    used: float
    ends: float
    head: float
    learned: Learned
    base_bytes: int | None
    stream: float
    whole_stream: float
    heads: float
    kv: float
    wide: float
    scores: float
    logits: float
    chunked: bool
    mask: float


def default_dtype(run: RunConfig, device: Device) -> str:
    """The dtype of products' factors: as configured, or as the platform has it."""
    return run.train.compute_dtype or ("float32" if device.name == "cpu" else "bfloat16")


def attention_kernel(run: RunConfig, device: Device) -> str:
    """Which attention a run gets there: "plain", "cudnn" or "splash", by the conditions of kernels/accelerators.py."""
    width = run.model.axis_sizes["head_dim"]
    narrow = default_dtype(run, device) in ("bfloat16", "float16")
    held_apart = run.data.separate_documents or run.mesh.pipeline > 1
    held_apart = held_apart or run.model.position == "t5" or run.model.alternates
    if not narrow or held_apart or device.maker == "other":
        return "plain"
    if device.maker == "google":
        return "plain" if width % LANES or run.data.sequence_length % LANES else "splash"
    widest = WIDEST_HEAD_SINCE_HOPPER if device.name in ("h100", "h200", "b200") else WIDEST_HEAD
    return "plain" if width % 8 or width > widest else "cudnn"


def loss_chunk(device: Device) -> int:
    """Positions a device whose logits exist at one time."""
    return LOSS_CHUNK_ON_CPU if device.maker == "other" else LOSS_CHUNK


def work_of(run: RunConfig, n_devices: int, *, dtype: str, kernel: str, chunk: int, base: str | None = None) -> Work:
    """The sizes of a run on so many devices.

    kernel: of attention; chunk: positions whose logits exist at one time; base: with [lora], what the model is stored
    in, `train.param_dtype` if None.

    Raises:
        ConfigError: something does not divide, or [lora] names no matrices of the model.
    """
    check_lora(run)
    sizes = mesh_sizes(run.mesh, n_devices)
    check_run(sizes, run)
    micro = n_microbatches(sizes, run)
    cfg, length, tensor, stages = run.model, run.data.sequence_length, sizes.tensor, sizes.pipeline
    at_one_time = run.train.batch_size // run.train.gradient_accumulation // sizes.batch_ways
    rows = at_one_time // micro
    tokens = rows * length
    axes = cfg.axis_sizes
    head_rows = at_one_time / stages
    width = max(1, min(length, int(chunk // head_rows))) if head_rows >= 1 else length
    zero = run.mesh.zero
    in_use = functools.partial(held_values, cfg, sizes, zero)
    learned = functools.partial(held_values, cfg, sizes, zero, part="all", lora=run.lora)
    ends = in_use("use", "ends")
    return Work(
        sizes=sizes,
        dtype=dtype,
        rows=rows,
        head_rows=head_rows,
        microbatches=micro,
        ticks=micro * run.train.pipeline_interleave + stages - 1 if stages > 1 else 1,
        layers=cfg.n_layers // stages,
        layer_values=in_use("use", "layers") * stages / cfg.n_layers,
        rested=in_use("rest", "all"),
        used=in_use("use", "all"),
        ends=ends,
        head=ends if cfg.tied_head else ends / 2,
        learned=Learned(rest=learned("rest"), use=learned("use"), moment=learned("moment")),
        base_bytes=ITEMSIZE[base or run.train.param_dtype] if run.lora else None,
        stream=tokens * cfg.d_model / (tensor if run.mesh.shard_sequence else 1),
        whole_stream=tokens * cfg.d_model,
        heads=tokens * axes["heads"] * axes["head_dim"] / tensor,
        kv=tokens * axes["kv_heads"] * axes["head_dim"] / tensor,
        wide=tokens * axes["mlp"] / tensor,
        scores=rows * axes["heads"] * length**2 / tensor if kernel == "plain" else 0.0,
        logits=head_rows * width * axes["vocab"] / tensor,
        chunked=width < length,
        mask=length**2 if kernel == "plain" else 0.0,
    )


@functools.lru_cache(maxsize=64)
def sums_of_layer(cfg: ModelConfig) -> tuple[int, int]:
    """Sums over `tensor` for each layer: of the gradients of what norms give, and of what branches give.

    A norm's gradient is summed after all products that read it, branches that are added to the stream at once
    together.
    """
    n_norms = sum(name.startswith("ln_") for name in param_table(cfg)["layers"])
    return n_norms, 2 if cfg.residual == "serial" else 1


@functools.lru_cache(maxsize=64)
def matmul_values(cfg: ModelConfig) -> int:
    """Parameters of the layers' matrices alone, the head left out."""
    return sum(size(s, cfg) for s in named_specs(cfg).values() if is_multiplied(s) and "layers" in s.axes)


def adapter_size(cfg: ModelConfig, lora: LoraConfig) -> int:
    """Parameters of an adapter."""
    return sum(size for _, size in _table(cfg, lora))


def adapts(run: RunConfig, axis: str) -> bool:
    """Whether a matrix with this axis is a target of the run's adapter."""
    return run.lora is not None and any(axis in axes for axes, _ in _table(run.model, run.lora))


@functools.lru_cache(maxsize=65536)
def held_values(
    cfg: ModelConfig, sizes: Sizes, zero: int, lying: Lying, part: Part, lora: LoraConfig | None = None
) -> float:
    """How many values of a part of the parameters a device holds: at rest, in use, or as the moments lie.

    lora: of an adapter's parameters instead.
    """
    rules = rules_for(sizes, zero=zero)
    where = {"rest": rules.param, "use": rules.use, "moment": rules.moment}[lying]
    return sum(
        size / ways_of(where(axes), sizes)
        for axes, size in _table(cfg, lora)
        if part == "all" or ("layers" in axes) == (part == "layers")
    )


@functools.lru_cache(maxsize=64)
def _table(cfg: ModelConfig, lora: LoraConfig | None) -> tuple[tuple[tuple[str, ...], int], ...]:
    """Logical axes and values of the model's parameters, or of its adapter's."""
    record = record_of(lora, cfg)
    if record is None:
        return tuple((spec.axes, size(spec, cfg)) for spec in named_specs(cfg).values())
    factors = jax.tree.leaves(adapter_table(cfg, record.targets), is_leaf=lambda s: isinstance(s, ParamSpec))
    return tuple((spec.axes, math.prod(factor_shape(spec, cfg, record.rank))) for spec in factors)
