"""Checkpoints of the original's first version (v1), made from their description alone: docs/formats.md, 1 and 5.1.

Independent of the package, which is tested against them. Every writer returns the truth: what the stored files mean,
as whole arrays under this project's names and in its layouts.

    arch = Arch(layers=12, norm="rmsnorm", pe="t5")
    truth = write_v1(tmp_path / "step_5", arch, 8, variant="slim")
    truth.params["layers/attn/q"]       # (12, 64, 8, 8) float32
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from legacy.npz import Member, counter, encode, write_npz

Arrays = dict[str, np.ndarray]
Style = Literal["trained", "unequal"]
DTYPES = {"full": "float32", "slim": "bfloat16", "slim_f16": "float16"}
NORMS = (
    *("layernorm", "layernorm-desync", "layernorm-nobias"),
    *("rmsnorm", "rmsnorm-bias", "scalenorm", "scalenorm-bias"),
)
POSITIONS = ("rotary", "fixed", "t5")
N_FILES = 16
_PREFIX = "causal_transformer_shard/~/"
# linear, linear_1, linear_2: v comes before k.
_HEADS_IN = ("q", "v", "k")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arch:
    """A v1 architecture under the original's names. pe_rotary_dims None: the key is missing, and means d_head."""

    layers: int = 12
    d_model: int = 64
    n_heads: int = 8
    n_vocab: int = 264
    seq: int = 32
    norm: str = "layernorm"
    pe: str = "rotary"
    pe_rotary_dims: int | None = 4

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    def config(self, shards: int, *, early_cast: bool = False) -> dict[str, Any]:
        """The original's flat JSON configuration of a run that wrote such a checkpoint on `shards` cores."""
        config = {
            name: getattr(self, name) for name in ("layers", "d_model", "n_heads", "n_vocab", "seq", "norm", "pe")
        }
        if self.pe == "rotary" and self.pe_rotary_dims is not None:
            config["pe_rotary_dims"] = self.pe_rotary_dims
        config |= {"early_cast": True} if early_cast else {}
        return config | training_keys(shards)


def training_keys(shards: int) -> dict[str, Any]:
    """What a configuration says beside the architecture."""
    return {
        "cores_per_replica": shards,
        "per_replica_batch": 1,
        "gradient_accumulation_steps": 16,
        "tpu_size": 4 * shards,
        "warmup_steps": 3000,
        "anneal_steps": 300000,
        "lr": 1.2e-4,
        "end_lr": 1.2e-5,
        "weight_decay": 0.1,
        "total_steps": 350000,
        "bucket": "some-bucket",
        "model_dir": "some_model",
        "train_set": "pile.train.index",
        "val_set": {"pile": "pile.val.index"},
        "val_batches": 100,
        "val_every": 500,
        "ckpt_every": 500,
        "keep_every": 10000,
        "eval_harness_tasks": [],
        "name": "some-model",
        "wandb_project": "some-project",
        "comment": "",
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One parameter of one module: where it belongs, how the shards' pieces combine, and which values it gets."""

    module: str
    name: str
    path: str | None  # ours; None: stored, and ignored by the forward pass
    shape: tuple[int, ...]  # whole
    combine: Literal["concat", "sum", "first", "mean", "desync"]
    axis: int = 0  # of concat
    layer: int | None = None
    center: float = 0.0
    std: float
    initial: float = 0.0  # what a copy that never got a gradient still holds

    def shard_shape(self, shards: int) -> tuple[int, ...]:
        if self.combine != "concat":
            return self.shape
        assert self.shape[self.axis] % shards == 0, f"{self.module} {self.name}: {self.shape} on {shards} shards"
        return tuple(n // shards if i == self.axis else n for i, n in enumerate(self.shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truth:
    """What a checkpoint means. Flat dicts from our path to the whole float32 array; moments are None if slim.

    counters: "step", and for a full checkpoint "adam" and "schedule". Norms that differ between the shards and cannot
    be merged (layernorm-desync) have no entry.
    """

    params: Arrays
    mu: Arrays | None
    nu: Arrays | None
    counters: dict[str, int]


def leaves(arch: Arch) -> list[Leaf]:
    """The parameters in the order of the files: sorted by module and by name, as strings."""
    d, vocab = arch.d_model, arch.n_vocab
    found = [
        _leaf("embedding_shard/~/linear", "b", "embed/bias", (d,), "sum", std=0.3),
        _leaf("embedding_shard/~/linear", "w", "embed/tokens", (vocab, d), "concat", std=1.0),
        _leaf("projection_shard/~/linear", "b", "head/b", (vocab,), "concat", std=0.3),
        _leaf("projection_shard/~/linear", "w", "head/w", (d, vocab), "concat", axis=1, std=1 / math.sqrt(d)),
        *_norm(arch, "projection_shard", "head/ln", None),
    ]
    if arch.pe == "fixed":
        found += [_leaf("embedding_shard", "pos_embs", "embed/positions", (arch.seq, d), "concat", axis=1, std=0.5)]
    if arch.pe == "t5":
        found += [
            _leaf("relative_position_embs", "rel_embedding", "relative/bias", (arch.n_heads, 32), "concat", std=1.0)
        ]
    for i in range(arch.layers):
        found += _layer(arch, i)
    return sorted(found, key=lambda leaf: (leaf.module, leaf.name))


def _leaf(module: str, name: str, path: str | None, shape: tuple[int, ...], combine: Any, **more: Any) -> Leaf:
    return Leaf(module=_PREFIX + module, name=name, path=path, shape=shape, combine=combine, **more)


def _layer(arch: Arch, i: int) -> list[Leaf]:
    d, module = arch.d_model, f"layer_{i}/~/linear"
    std, wide_std = 1 / math.sqrt(d), 1 / math.sqrt(4 * d)
    found = [
        _leaf(f"{module}_{n}" if n else module, "w", f"layers/attn/{x}", (d, d), "concat", axis=1, layer=i, std=std)
        for n, x in enumerate(_HEADS_IN)
    ]
    return found + [
        _leaf(f"{module}_3", "w", "layers/attn/o", (d, d), "concat", layer=i, std=std),
        _leaf(f"{module}_4", "b", "layers/mlp/b_in", (4 * d,), "concat", layer=i, std=0.3),
        _leaf(f"{module}_4", "w", "layers/mlp/w_in", (d, 4 * d), "concat", axis=1, layer=i, std=std),
        _leaf(f"{module}_5", "b", "layers/mlp/b_out", (d,), "sum", layer=i, std=0.3),
        _leaf(f"{module}_5", "w", "layers/mlp/w_out", (4 * d, d), "concat", layer=i, std=wide_std),
        *_norm(arch, f"layer_{i}", "layers/ln_1", i),
    ]


def _norm(arch: Arch, module: str, path: str, layer: int | None) -> list[Leaf]:
    kind, _, suffix = arch.norm.partition("-")
    shape = () if kind == "scalenorm" else (arch.d_model,)
    if kind == "layernorm":
        name, combine = ("layer_norm", "desync") if suffix == "desync" else ("replicated_layer_norm", "first")
        initial, center, std = 1.0, 1.5, 0.3
    else:
        name, combine, initial = "rms_norm", "mean", math.sqrt(arch.d_model)
        center, std = 1.2 * initial, 0.2 * initial
    module = f"{module}/~/{name}"
    found = [
        _leaf(module, "scale", f"{path}/scale", shape, combine, layer=layer, center=center, std=std, initial=initial)
    ]
    if kind == "layernorm" or suffix == "bias":
        bias = None if suffix == "nobias" else f"{path}/bias"
        found += [_leaf(module, "offset", bias, shape, combine, layer=layer, std=0.3)]
    return found


def stored_shards(
    leaf: Leaf, whole: np.ndarray, shards: int, style: Style, rng: np.random.Generator, *, differ: bool = False
) -> np.ndarray:
    """What the shards hold of a parameter: (shards, *shard_shape) float32. `differ`: desync norms are not equal."""
    if leaf.combine == "concat":
        return np.stack(np.split(whole, shards, axis=leaf.axis))
    copies = np.repeat(whole[None], shards, axis=0)
    noise = rng.standard_normal(copies.shape, np.float32)
    if leaf.combine == "sum":
        # Divided after the repetition, so that trained copies are the same bits.
        copies = copies / np.float32(shards) + (np.float32(0.3) * noise if style == "unequal" else 0)
    elif leaf.combine == "first":
        copies[1:] = leaf.initial if style == "trained" else 2 * noise[1:] + 3
    elif leaf.combine == "desync" and differ:
        copies[1:] += noise[1:]
    return copies.astype(np.float32)


def merged(leaf: Leaf, stored: np.ndarray) -> np.ndarray | None:
    """What the shards' values mean together; None if nothing (docs/formats.md, 1.6)."""
    if leaf.combine == "concat":
        return np.concatenate(list(stored), axis=leaf.axis)
    if leaf.combine == "sum":
        return stored.astype(np.float64).sum(axis=0).astype(np.float32)
    if leaf.combine == "first" or (stored == stored[0]).all():
        return stored[0]
    assert leaf.combine == "desync", leaf
    return None


@dataclasses.dataclass(frozen=True)
class _Tree:
    """One tree of leaves: for each leaf what every shard stores, and what each means."""

    members: list[list[Member]]
    meaning: list[np.ndarray | None]


def _params(arch: Arch, shards: int, dtype: str, seed: int, style: Style, desync_unequal: bool) -> _Tree:
    # The whole values come from a generator of their own: they are the same on any number of shards.
    whole_rng, shard_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    tree = _Tree([], [])
    for leaf in leaves(arch):
        whole = np.float32(leaf.center) + np.float32(leaf.std) * whole_rng.standard_normal(leaf.shape, np.float32)
        whole = np.asarray(whole, np.float32)
        if leaf.path is None and style == "trained":
            whole = np.full(leaf.shape, leaf.initial, np.float32)
        member, values = encode(stored_shards(leaf, whole, shards, style, shard_rng, differ=desync_unequal), dtype)
        tree.members.append([Member(data, member.descr) for data in member.data])
        tree.meaning.append(merged(leaf, values))
    return tree


def _moments(arch: Arch, shards: int, seed: int, style: Style, desync_unequal: bool, *, positive: bool) -> _Tree:
    """mu, or nu if positive. Summed biases have the same on every shard, layernorms zeros but on the first."""
    rng = np.random.default_rng([seed, 3 if positive else 2])
    tree = _Tree([], [])
    for leaf in leaves(arch):
        whole = rng.standard_normal(leaf.shape, np.float32)
        whole = np.asarray(1e-6 * (whole * whole + 0.01) if positive else 1e-3 * whole, np.float32)
        if leaf.path is None and style == "trained":
            whole = np.zeros(leaf.shape, np.float32)
        if leaf.combine == "concat":
            stored = np.stack(np.split(whole, shards, axis=leaf.axis))
        else:
            stored = np.repeat(whole[None], shards, axis=0)
        if leaf.combine == "first":
            stored[1:] = 0
        unmergeable = leaf.combine == "desync" and desync_unequal and shards > 1
        if unmergeable:
            stored *= np.arange(1, shards + 1, dtype=np.float32).reshape(-1, *[1] * whole.ndim)
        tree.members.append([Member(data, "<f4") for data in stored])
        tree.meaning.append(None if unmergeable else whole)
    return tree


def by_path(arch: Arch, meaning: Iterable[np.ndarray | None]) -> Arrays:
    """Our flat dict of what the leaves mean: layers stacked by number, columns and rows of heads split in two axes."""
    single: Arrays = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for leaf, array in zip(leaves(arch), meaning, strict=True):
        if leaf.path is None or array is None:
            continue
        if leaf.layer is None:
            single[leaf.path] = array
        else:
            stacks.setdefault(leaf.path, {})[leaf.layer] = array
    stacked = {path: np.stack([of[i] for i in range(arch.layers)]) for path, of in stacks.items()}
    n, d, heads = arch.layers, arch.d_model, arch.n_heads
    for name in _HEADS_IN:
        stacked[f"layers/attn/{name}"] = stacked[f"layers/attn/{name}"].reshape(n, d, heads, arch.d_head)
    stacked["layers/attn/o"] = stacked["layers/attn/o"].reshape(n, heads, arch.d_head, d)
    return single | stacked


def pieces(n: int) -> list[range]:
    """Which of n leaves each of the 16 files of a shard holds."""
    k, m = divmod(n, N_FILES)
    return [range(p * k + min(p, m), (p + 1) * k + min(p + 1, m)) for p in range(N_FILES)]


def write_shard(directory: Path, members: Sequence[Member]) -> None:
    """`directory`/0.npz ... 15.npz of all leaves of a shard."""
    directory.mkdir(parents=True)
    for p, indices in enumerate(pieces(len(members))):
        write_npz(directory / f"{p}.npz", [members[i] for i in indices])


def write_v1(
    path: Path,
    arch: Arch,
    shards: int,
    *,
    variant: Literal["full", "slim", "slim_f16"] = "full",
    seed: int = 0,
    style: Style = "trained",
    step: int = 1201,
    adam_count: int = 901,
    schedule_count: int = 301,
    early_cast: bool = False,
    desync_unequal: bool = False,
) -> Truth:
    """Writes the bare step directory `path`, which must not exist, and returns what it means.

    Equal seeds give equal whole values, but for rounding, at every variant and number of shards; the truth of summed
    biases is the sum of what is stored.

    style: "trained": the copies of a summed bias are the same bits, and shards but the first still hold the initial
    layernorm. "unequal": summed biases differ, and those layernorms are some other values.
    early_cast: the parameters of a full checkpoint are bfloat16. desync_unequal: layernorm-desync differs by shard.
    """
    assert arch.n_heads % shards == 0, f"{arch.n_heads} heads on {shards} shards"
    dtype = "bfloat16" if early_cast and variant == "full" else DTYPES[variant]
    params = _params(arch, shards, dtype, seed, style, desync_unequal)
    counters, mu, nu = {"step": step}, None, None
    if variant == "full":
        counters |= {"adam": adam_count, "schedule": schedule_count}
        mu = _moments(arch, shards, seed, style, desync_unequal, positive=False)
        nu = _moments(arch, shards, seed, style, desync_unequal, positive=True)
    for s in range(shards):
        members = [of[s] for of in params.members]
        if mu is not None and nu is not None:
            state = [of[s] for of in mu.members + nu.members]
            members = [counter(adam_count), *state, counter(schedule_count), *members]
        write_shard(Path(path) / f"shard_{s}", [*members, counter(step)])
    return Truth(
        params=by_path(arch, params.meaning),
        mu=None if mu is None else by_path(arch, mu.meaning),
        nu=None if nu is None else by_path(arch, nu.meaning),
        counters=counters,
    )


def write_meta(path: Path, steps: Sequence[int], aux: Mapping[int, Mapping[str, Any]] | None = None) -> None:
    """meta.json (docs/formats.md, 1.8). A step that was saved twice is listed twice, with two equal keys in aux."""
    extras = [(s, {"train_loader": dict(aux[s])} if aux and s in aux else {}) for s in steps]
    pairs = ", ".join(f'"{s}": {json.dumps(extra)}' for s, extra in extras)
    path.write_text(f'{{"step": {steps[-1] if steps else 0}, "checkpoints": {list(steps)}, "aux": {{{pairs}}}}}')


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """A configuration as the JSON file `path`."""
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_model_directory(
    path: Path,
    arch: Arch,
    shards: int,
    steps: Sequence[int],
    *,
    aux: Mapping[int, Mapping[str, Any]] | None = None,
    config: bool = False,
    meta: bool | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[int, Truth]:
    """`path`/step_N for each step (each with another seed), meta.json and on demand config.json; step -> its truth.

    aux: step -> loader state {"used": [...], "file_idx": n}; steps without one get {}.
    meta: None: only for full checkpoints, as slimming wrote none. options: of `write_v1`.
    """
    path = Path(path)
    options |= {"seed": seed}
    truths = {}
    for i, step in enumerate(dict.fromkeys(steps)):
        truths[step] = write_v1(path / f"step_{step}", arch, shards, **options | {"seed": seed + i, "step": step})
    if options.get("variant", "full") == "full" if meta is None else meta:
        write_meta(path / "meta.json", steps, aux)
    if config:
        write_config(path / "config.json", arch.config(shards, early_cast=options.get("early_cast", False)))
    return truths
