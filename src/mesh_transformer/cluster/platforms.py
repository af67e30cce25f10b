"""What the workers compute with, found out from what a cluster has."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mesh_transformer.cluster.options import ClusterOptions
from mesh_transformer.config.errors import ConfigError

_DEVICE_COUNT = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Platform:
    """name: what JAX computes on. scaling: the arguments of Ray Train's ScalingConfig."""

    name: Literal["cpu", "gpu", "tpu"]
    scaling: Mapping[str, Any]


def platform_of(
    options: ClusterOptions, resources: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]
) -> Platform:
    """TPUs if the cluster has any, else GPUs if it has any, else CPUs; JAX_PLATFORMS=cpu keeps to CPUs.

    Args:
        resources: as `ray.cluster_resources()` has them.
        nodes: as `ray.nodes()` has them; topology and type of TPUs stand in their labels.

    Raises:
        ConfigError: several workers on TPUs whose nodes do not say what they are.
    """
    scaling: dict[str, Any] = {"num_workers": options.workers}
    wants_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    if resources.get("TPU") and not wants_cpu:
        scaling |= {"use_tpu": True, "resources_per_worker": {"TPU": options.devices_per_worker}}
        if options.workers > 1:
            scaling |= _tpu_slice(nodes)
        return Platform("tpu", scaling)
    if resources.get("GPU") and not wants_cpu:
        scaling |= {"use_gpu": True, "resources_per_worker": {"CPU": 1, "GPU": options.devices_per_worker}}
        return Platform("gpu", scaling)
    return Platform("cpu", scaling | {"resources_per_worker": {"CPU": 1}})


def _tpu_slice(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    for node in nodes:
        labels = node.get("Labels", {})
        topology, kind = labels.get("ray.io/tpu-topology"), labels.get("ray.io/accelerator-type")
        if node.get("Alive") and topology and kind:
            return {"topology": topology, "accelerator_type": kind}
    raise ConfigError(
        "--workers above 1 on TPUs needs their topology and type, and no node of the cluster is labelled with them\n"
        "start the nodes on TPU VMs, where Ray labels them itself, or with --labels ray.io/tpu-topology=4x4,..."
    )


def worker_environment(platform: Platform, options: ClusterOptions, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of the workers, which Ray sets before they import JAX."""
    variables = {"TF_CPP_MIN_LOG_LEVEL": environment.get("TF_CPP_MIN_LOG_LEVEL", "2")}
    if platform.name == "cpu":
        others = re.sub(rf"{_DEVICE_COUNT}=\S+", "", environment.get("XLA_FLAGS", ""))
        variables["JAX_PLATFORMS"] = "cpu"
        variables["XLA_FLAGS"] = f"{others} {_DEVICE_COUNT}={options.devices_per_worker}".strip()
    return variables
