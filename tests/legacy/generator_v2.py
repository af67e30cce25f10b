"""Checkpoints of the original's second version (v2), made from their description alone: docs/formats.md, 8.

Independent of the package, which is tested against them.

    truth = write_v2(tmp_path / "model", ArchV2(cores_per_replica=4), step=7, seed=0)
    truth.fused["/transformer/transformer_layer_shard_v2/~/linear/w"]    # (2, 64, 3 * 64 + 8 * 64) float32
    truth.params["layers/attn/q"]                                        # (2, 64, 4, 16) float32
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from legacy.generator import Arrays, training_keys, write_config, write_meta
from legacy.npz import Member, counter, encode, write_npz

DEVICES_PER_HOST = 8
_EMBED, _LAYER, _HEAD = (
    "/embed/embedding_shard_v2/~/linear",
    "/transformer/transformer_layer_shard_v2/~",
    "/proj/projection/~",
)


class Fused(NamedTuple):
    """One stored leaf: its name and the axis that is split over devices."""

    name: str
    axis: int | None


# In the order of the files.
LEAVES = (
    Fused(f"{_EMBED}/b", None),
    Fused(f"{_EMBED}/w", 0),
    Fused(f"{_HEAD}/layer_norm/offset", None),
    Fused(f"{_HEAD}/layer_norm/scale", None),
    Fused(f"{_HEAD}/linear/b", None),
    Fused(f"{_HEAD}/linear/w", 1),
    Fused(f"{_LAYER}/layer_norm/offset", None),
    Fused(f"{_LAYER}/layer_norm/scale", None),
    Fused(f"{_LAYER}/linear/b", None),
    Fused(f"{_LAYER}/linear/w", 2),
    Fused(f"{_LAYER}/linear_1/b", None),
    Fused(f"{_LAYER}/linear_1/w", 1),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchV2:
    """A v2 architecture under the original's names. It attends with cores_per_replica heads, whatever n_heads says."""

    layers: int = 2
    d_model: int = 64
    n_heads: int = 8
    d_head: int = 8
    n_vocab: int = 264
    seq: int = 32
    cores_per_replica: int = 8
    pe_rotary_dims: int = 4

    @property
    def loc(self) -> int:
        """Width of a group's queries, and of a head as it truly is."""
        assert self.n_heads * self.d_head % self.cores_per_replica == 0, self
        return self.n_heads * self.d_head // self.cores_per_replica

    def config(self, **more: Any) -> dict[str, Any]:
        """The original's flat JSON configuration; `more` adds or replaces keys."""
        architecture = {k: v for k, v in dataclasses.asdict(self).items() if k != "cores_per_replica"}
        keys = {"norm": "layernorm", "pe": "rotary", "early_collect": True, "bf16_optimizer": False, "eval_only": False}
        return architecture | training_keys(self.cores_per_replica) | keys | more


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruthV2:
    """What a checkpoint means, in float32.

    fused, fused_mu, fused_nu: stored name -> whole array. params, mu, nu: our path -> whole array. Moments are None if
    there are none; counters: "step", and with moments "adam" and "schedule".
    """

    fused: Arrays
    fused_mu: Arrays | None
    fused_nu: Arrays | None
    params: Arrays
    mu: Arrays | None
    nu: Arrays | None
    counters: dict[str, int]


def shapes(arch: ArchV2) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """Our path -> (shape, center, standard deviation) of the values."""
    n, d, vocab = arch.layers, arch.d_model, arch.n_vocab
    groups, loc = arch.cores_per_replica, arch.loc
    std = 1 / math.sqrt(d)
    found: dict[str, tuple[tuple[int, ...], float, float]] = {
        "embed/tokens": ((vocab, d), 0, 1.0),
        "embed/bias": ((d,), 0, 0.3),
        "head/ln/scale": ((d,), 1.5, 0.3),
        "head/ln/bias": ((d,), 0, 0.3),
        "head/w": ((d, vocab), 0, std),
        "head/b": ((vocab,), 0, 0.3),
        "layers/ln_1/scale": ((n, d), 1.5, 0.3),
        "layers/ln_1/bias": ((n, d), 0, 0.3),
        "layers/attn/o": ((n, groups, loc, d), 0, 1 / math.sqrt(groups * loc)),
        "layers/mlp/w_out": ((n, 4 * d, d), 0, 1 / math.sqrt(4 * d)),
        "layers/mlp/b_out": ((n, d), 0, 0.3),
    }
    for name in ("q", "k", "v"):
        found[f"layers/attn/{name}"] = ((n, d, groups, loc), 0, std)
        found[f"layers/attn/b_{name}"] = ((n, groups, loc), 0, 0.3)
    for name in ("in", "gate"):
        found[f"layers/mlp/w_{name}"] = ((n, d, 4 * d), 0, std)
        found[f"layers/mlp/b_{name}"] = ((n, 4 * d), 0, 0.3)
    return found


def fuse(arch: ArchV2, params: Mapping[str, np.ndarray]) -> Arrays:
    """Our arrays -> the stored ones, in their order."""
    groups, f = arch.cores_per_replica, 4 * arch.d_model // arch.cores_per_replica
    into_w, into_b, out_of = [], [], []
    for s in range(groups):
        own = slice(s * f, (s + 1) * f)
        # The ungated half first, then the half that goes through gelu.
        into_w += [params[f"layers/attn/{name}"][:, :, s] for name in ("q", "v", "k")]
        into_w += [params[f"layers/mlp/w_{name}"][:, :, own] for name in ("in", "gate")]
        into_b += [params[f"layers/attn/b_{name}"][:, s] for name in ("q", "v", "k")]
        into_b += [params[f"layers/mlp/b_{name}"][:, own] for name in ("in", "gate")]
        out_of += [params["layers/attn/o"][:, s], params["layers/mlp/w_out"][:, own]]
    stored = {
        f"{_EMBED}/b": params["embed/bias"],
        f"{_EMBED}/w": params["embed/tokens"],
        f"{_HEAD}/layer_norm/offset": params["head/ln/bias"],
        f"{_HEAD}/layer_norm/scale": params["head/ln/scale"],
        f"{_HEAD}/linear/b": params["head/b"],
        f"{_HEAD}/linear/w": params["head/w"],
        f"{_LAYER}/layer_norm/offset": params["layers/ln_1/bias"],
        f"{_LAYER}/layer_norm/scale": params["layers/ln_1/scale"],
        f"{_LAYER}/linear/b": np.concatenate(into_b, axis=1),
        f"{_LAYER}/linear/w": np.concatenate(into_w, axis=2),
        f"{_LAYER}/linear_1/b": params["layers/mlp/b_out"],
        f"{_LAYER}/linear_1/w": np.concatenate(out_of, axis=1),
    }
    assert tuple(stored) == tuple(leaf.name for leaf in LEAVES)
    return stored


def host_part(array: np.ndarray, axis: int | None, host: int, hosts: int, groups: int) -> np.ndarray:
    """What the file of one of `hosts` holds of a whole array (docs/formats.md, 8.5)."""
    if axis is None or hosts == 1:
        return array
    n_devices = DEVICES_PER_HOST * hosts
    assert n_devices % groups == 0 and array.shape[axis] % n_devices == 0, (array.shape, axis, n_devices, groups)
    replicas = n_devices // groups
    # Devices fill a mesh (replica, group) row by row; along the array the group counts first, then the replica.
    own = range(host * DEVICES_PER_HOST, (host + 1) * DEVICES_PER_HOST)
    positions = sorted((device % groups) * replicas + device // groups for device in own)
    blocks = np.split(array, n_devices, axis=axis)
    return np.concatenate([blocks[position] for position in positions], axis=axis)


def _values(arch: ArchV2, seed: int, kind: int, dtype: str) -> Arrays:
    """Our arrays as they are after rounding. kind: 0 parameters, 1 mu, 2 nu."""
    rng = np.random.default_rng([seed, kind])
    found = {}
    for path, (shape, center, std) in sorted(shapes(arch).items()):
        noise = rng.standard_normal(shape, np.float32)
        drawn = (center + std * noise, 1e-3 * noise, 1e-6 * (noise * noise + 0.01))[kind]
        found[path] = encode(drawn, dtype)[1]
    return found


def _write_hosts(
    directory: Path, arrays: Sequence[Arrays], dtype: str, counters: Sequence[int], arch: ArchV2, hosts: int
) -> None:
    """shard_0.npz ... of trees of stored arrays, between the two counters if there are any."""
    directory.mkdir(parents=True)
    before, after = [counter(n) for n in counters[:1]], [counter(n) for n in counters[1:]]
    for h in range(hosts):
        members: list[Member] = []
        for tree in arrays:
            parts = (host_part(tree[leaf.name], leaf.axis, h, hosts, arch.cores_per_replica) for leaf in LEAVES)
            members += [encode(part, dtype)[0] for part in parts]
        write_npz(directory / f"shard_{h}.npz", [*before, *members, *after])


def write_v2(
    path: Path,
    arch: ArchV2,
    *,
    step: int = 1201,
    seed: int = 0,
    moments: Literal["float32", "bfloat16"] | None = "float32",
    params_dtype: Literal["float32", "bfloat16"] = "float32",
    hosts: int = 1,
    adam_count: int = 901,
    schedule_count: int = 301,
    config: bool = False,
) -> TruthV2:
    """Adds `path`/step_N to the model directory `path`, which is made if missing, and returns what it means.

    moments: their dtype; None: the directory opt_state is not there, the metadata still names its leaves.
    hosts: files per tree, each with the blocks of 8 devices; every split axis must divide by 8 * hosts if hosts > 1.
    config: also writes `path`/config.json.
    """
    path = Path(path)
    directory = path / f"step_{step}"
    params = _values(arch, seed, 0, params_dtype)
    fused = fuse(arch, params)
    _write_hosts(directory / "params", [fused], params_dtype, [], arch, hosts)
    mu = nu = fused_mu = fused_nu = None
    counters = {"step": step}
    if moments is not None:
        mu, nu = _values(arch, seed, 1, moments), _values(arch, seed, 2, moments)
        fused_mu, fused_nu = fuse(arch, mu), fuse(arch, nu)
        both = [adam_count, schedule_count]
        _write_hosts(directory / "opt_state", [fused_mu, fused_nu], moments, both, arch, hosts)
        counters |= {"adam": adam_count, "schedule": schedule_count}
    names = [leaf.name for leaf in LEAVES]
    order = {"param_order": names, "opt_order": ["", *names, *names, ""]}
    (directory / "meta.json").write_text(json.dumps({"total_hosts": hosts, "step": step, **order}))
    meta = path / "meta.json"
    earlier = json.loads(meta.read_text())["checkpoints"] if meta.exists() else []
    write_meta(meta, [*earlier, step])
    if config:
        write_config(path / "config.json", arch.config(bf16_optimizer=moments == "bfloat16"))
    return TruthV2(fused=fused, fused_mu=fused_mu, fused_nu=fused_nu, params=params, mu=mu, nu=nu, counters=counters)
