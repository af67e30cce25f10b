"""What a model is, in figures."""

from __future__ import annotations

import contextlib
from typing import Any

from mesh_transformer.checkpoint.families import family_of
from mesh_transformer.checkpoint.lora import LoraWeights
from mesh_transformer.checkpoint.names import count_in_shards
from mesh_transformer.checkpoint.quantized_weights import QuantizedWeights
from mesh_transformer.checkpoint.weights import Weights, stored_bytes, whole_shape
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.model.params import count_params, named_specs

# The original published its models in eight shards and counted what each shard repeats.
_ORIGINAL_SHARDS = 8


def describe(weights: Weights) -> dict[str, Any]:
    """JSON-serialisable: architecture, counts, bytes, counters, and axes, shape and dtype of every tensor.

    Nothing but names, shapes and dtypes is read.
    """
    cfg = weights.cfg
    family = family_of(cfg)
    facts: dict[str, Any] = {
        "family": family.model_type if cfg.departures() and family else "gptj",
        "model": cfg.to_dict(),
        "parameters": count_params(cfg),
        "parameters_without_embedding_bias": count_params(cfg) - cfg.d_model * ("embed" in cfg.biases),
    }
    with contextlib.suppress(ConfigError):  # not every shape can be cut so
        facts[f"parameters_in_{_ORIGINAL_SHARDS}_shards_replicas_counted"] = count_in_shards(cfg, _ORIGINAL_SHARDS)
    quantized = weights if isinstance(weights, QuantizedWeights) else None
    facts["bytes"] = quantized.n_bytes() if quantized else stored_bytes(weights)
    if quantized:
        facts |= {"quantize": quantized.quantize, "made_of": dict(quantized.source)}
    if weights.counters is not None:
        facts["optimizer"] = {
            "adam_count": weights.counters.adam,
            "schedule_count": weights.counters.schedule,
            "bytes": stored_bytes(weights, ("mu", "nu")),
        }
    if isinstance(weights, LoraWeights):
        facts["adapter"] = weights.describe()
    if weights.extras:
        facts["recorded"] = dict(weights.extras)
    facts["tensors"] = {
        path: {
            "axes": list(spec.axes),
            "shape": list(whole_shape(cfg, path)),
            "dtype": quantized.stored_as(path) if quantized else weights.dtype_of(path).name,
        }
        for path, spec in named_specs(cfg).items()
    }
    return facts
