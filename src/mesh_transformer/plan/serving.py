"""Inference on paper: weights, cache, tokens a second, and the largest batch that fits."""

from __future__ import annotations

import dataclasses

from mesh_transformer.config.devices import Device
from mesh_transformer.config.dtypes import ITEMSIZE
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.engine.pages import page_size
from mesh_transformer.model.params import count_matmul_params, is_multiplied, named_specs, shape, size
from mesh_transformer.model.tied import turned_bytes
from mesh_transformer.plan.links import ring_speed
from mesh_transformer.plan.speed import MEMORY_REACH, PRODUCTS_REACH
from mesh_transformer.plan.work import sums_of_layer
from mesh_transformer.sharding.mesh import Sizes, check_model

# Bits a weight of a multiplied matrix, and scales: int8 one float32 a column, int4 one float16 for 32 weights.
QUANTIZED = ("int8", "int4")
_GROUP = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServePlan:
    """Inference of one model on a mesh of data x tensor, for one number of texts at a time.

    weights, cache, workspace: bytes a device; cache: of `batch` texts of `context` tokens each. cache_a_text: bytes
    over all devices. largest_batch: texts of the whole context that fit at one time. seconds: of one step, in which
    each text gets a token.
    """

    sizes: Sizes
    weights_as: str
    batch: int
    context: int
    weights: float
    cache: float
    workspace: float
    cache_a_text: float
    largest_batch: int
    seconds: float
    device: Device

    @property
    def total(self) -> float:
        """Bytes a device."""
        return self.weights + self.cache + self.workspace

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.total <= self.device.usable

    @property
    def tokens_per_second(self) -> float:
        """Of all texts together."""
        return self.batch / self.seconds


def serve_plan(
    cfg: ModelConfig, device: Device, *, data: int, tensor: int, batch: int, weights_as: str, context: int | None = None
) -> ServePlan:
    """The plan for `batch` texts at one time, each of a whole context's length (or of `context`).

    Raises:
        ConfigError: the mesh does not divide the model.
    """
    sizes = Sizes(data=data, tensor=tensor)
    check_model(sizes, cfg)
    dtype = "float32" if weights_as == "float32" else "bfloat16"
    context = context or cfg.n_ctx
    axes = cfg.axis_sizes
    page = page_size(cfg.n_ctx)
    held = (-(-context // page) + 1) * page  # a page more than the context, which is forgotten as a whole
    of_token = 2 * cfg.n_layers * axes["kv_heads"] * axes["head_dim"] * ITEMSIZE[dtype]
    rows = -(-batch // data)
    weights = (weight_bytes(cfg, weights_as) + (turned(cfg, weights_as) if sizes.n_devices == 1 else 0)) / tensor
    logits = 4 * rows * axes["vocab"] / tensor * 3
    gated = cfg.feed_forward.startswith("glu_")
    chunk = 4 * page * (6 * cfg.d_model + (4 if gated else 3) * axes["mlp"] / tensor)
    workspace = logits + chunk + 4 * page * context * axes["heads"] / tensor
    cache = rows * held * of_token / tensor
    left = device.usable - weights - workspace
    seconds = _step_seconds(cfg, device, sizes, rows, weights + rows * context * of_token / tensor, dtype)
    return ServePlan(
        sizes=sizes,
        weights_as=weights_as,
        batch=batch,
        context=context,
        weights=weights,
        cache=cache,
        workspace=workspace,
        cache_a_text=held * of_token,
        largest_batch=max(0, int(left // (held * of_token / tensor))) * data,
        seconds=seconds,
        device=device,
    )


def weight_bytes(cfg: ModelConfig, weights_as: str) -> int:
    """Bytes of the whole model: multiplied matrices as they are stored, everything else in 16 bits (or float32)."""
    total = 0
    for spec in named_specs(cfg).values():
        values = size(spec, cfg)
        if weights_as in QUANTIZED and is_multiplied(spec):
            outputs = values
            for axis, n in zip(spec.axes, shape(spec, cfg), strict=True):
                outputs //= n if axis in spec.inputs else 1
            total += values + 4 * outputs if weights_as == "int8" else values // 2 + 2 * values // _GROUP
        else:
            total += values * (4 if weights_as == "float32" else 2)
    return total


def turned(cfg: ModelConfig, weights_as: str) -> int:
    """Bytes of the quantised head that one device holds beside a token table that is also the head (model/tied.py)."""
    return turned_bytes(cfg, weights_as if weights_as in QUANTIZED else None)


def _step_seconds(cfg: ModelConfig, device: Device, sizes: Sizes, rows: int, read: float, dtype: str) -> float:
    """A token for each of `rows` texts: what is read or what is multiplied, whichever lasts longer, and the sums."""
    flops = 2 * rows * count_matmul_params(cfg) / sizes.tensor
    times = (read / (MEMORY_REACH * device.bandwidth), flops / (PRODUCTS_REACH * device.peak(dtype)))
    n = sizes.tensor
    sent = 2 * (n - 1) / n * 4 * rows * cfg.d_model * (cfg.n_layers * sums_of_layer(cfg)[1] + 1)
    return max(times) + sent / ring_speed(device, n, 1)


def serve_plans(
    cfg: ModelConfig, device: Device, n_devices: int, *, batch: int, mesh: tuple[int, int] | None, weights: list[str]
) -> list[ServePlan]:
    """All meshes of data x tensor with as many devices, and forms of the weights: what fits first, then the fastest.

    mesh: data and tensor; None: all that divide.
    """
    found = []
    pairs = [mesh] if mesh else [(n_devices // t, t) for t in range(1, n_devices + 1) if n_devices % t == 0]
    for data, tensor in pairs:
        for weights_as in weights:
            try:
                found.append(serve_plan(cfg, device, data=data, tensor=tensor, batch=batch, weights_as=weights_as))
            except ConfigError:
                if mesh:
                    raise
    return sorted(found, key=lambda one: (not one.fits, weights.index(one.weights_as), one.seconds))
