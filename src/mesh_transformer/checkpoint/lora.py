"""Checkpoints of a run with low-rank adaptation: the adapter, and where the model is that it was trained on.

Such a checkpoint holds A and B of every target under "params" ("params/layers/attn/q/a"), their moments, the counters,
and in checkpoint.json:

    lora        rank, alpha, targets (paths of the parameter table)
    init_from   the base: given (as it was named), path (absolute), format, step, config, and digest: the sha256 of
                its parameters that `inspect --digest` prints

Read as a model it is the merged one, a matrix of a layer at a time: the base W plus alpha / rank A B.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.checkpoint import opening
from mesh_transformer.checkpoint.families import family_of
from mesh_transformer.checkpoint.logical import fingerprint
from mesh_transformer.checkpoint.names import hf_table
from mesh_transformer.checkpoint.slices import ArrayReader
from mesh_transformer.checkpoint.weights import Format, Kind, Piece, Weights
from mesh_transformer.config.checks import shown
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.model import ModelConfig, differing_fields
from mesh_transformer.config.tuning import LoraConfig
from mesh_transformer.model.lora import adaptable, factor_shape, factor_specs

LORA, BASE = "lora", "init_from"  # keys of checkpoint.json

Opener = Callable[..., Weights]  # `models.open_weights`


@dataclasses.dataclass(frozen=True)
class LoraRecord:
    """What checkpoint.json says of an adapter; targets: paths of the parameter table, in its order."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What A B is multiplied with."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}


def target_paths(targets: Iterable[str], cfg: ModelConfig) -> tuple[str, ...]:
    """Paths of the matrices that are meant, in the order of the parameter table.

    A target is the last part of a path ("q"), a whole path ("layers/attn/q"), or, of an architecture that Hugging Face
    has too, what the matrix's module is called there ("q_proj").

    Raises:
        ConfigError: one of them is none of the model's matrices; the message lists those that are.
    """
    names = target_names(cfg)
    found: set[str] = set()
    for target in targets:
        meant = {path for path, known in names.items() if target in (path, *known)}
        if not meant:
            there = ", ".join(" or ".join(known) for known in names.values())
            raise ConfigError(f"lora.targets: {shown(target)} is no matrix of this model; it has {there}")
        found |= meant
    return tuple(path for path in names if path in found)


def target_names(cfg: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Path -> names by which a configuration may call the matrix: ours, and Hugging Face's where it has one.

    One that means several matrices there means them here: GPT-2's `c_attn` is q, k and v, its `c_proj` o and w_out.
    """
    modules = hf_modules(cfg) if family_of(cfg) is not None else {}
    names: dict[str, tuple[str, ...]] = {}
    for path in adaptable(cfg):
        module = modules.get(path, "")
        theirs = (module.rsplit(".", 1)[-1], module) if module else ()
        names[path] = tuple(dict.fromkeys((path.rsplit("/", 1)[-1], *theirs)))
    return names


def hf_modules(cfg: ModelConfig) -> dict[str, str]:
    """Path -> the end of its module's name in its Hugging Face family that no other module of a layer shares: "q_proj",
    "lm_head", GPT-2's "attn.c_proj". q, k and v in one tensor have one module.
    """
    modules = {
        path: name.rsplit(".", 1)[0]
        for name, tensor in hf_table(cfg).items()
        if tensor.layer in (None, 0)
        for path in tensor.paths
    }

    def shortest(module: str) -> str:
        parts = module.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        others = set(modules.values()) - {module}
        return next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))

    return {path: shortest(module) for path, module in modules.items() if path in adaptable(cfg)}


def record_of(lora: LoraConfig | None, cfg: ModelConfig) -> LoraRecord | None:
    """The record of a configuration's adapter; None without one.

    Raises:
        ConfigError: a target is none of the model's matrices.
    """
    if lora is None:
        return None
    assert lora.alpha is not None  # filled in by the configuration
    return LoraRecord(lora.rank, float(lora.alpha), target_paths(lora.targets, cfg))


def stored_record(metadata: Mapping[str, Any], where: Path) -> LoraRecord:
    """The record that checkpoint.json holds.

    Raises:
        CheckpointError: it cannot be understood.
    """
    try:
        entry = metadata[LORA]
        record = LoraRecord(int(entry["rank"]), float(entry["alpha"]), tuple(entry["targets"]))
        known = adaptable(opening.stored_model(metadata, where))
        if record.rank < 1 or not record.targets or not set(record.targets) <= known.keys():
            raise ValueError("no such matrices")
        return record
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where / opening.CHECKPOINT_FILE}: its record of low-rank adaptation cannot be understood ({error}); "
            "the checkpoint is damaged, or was written by another version"
        ) from error


def base_record(base: Weights, given: str, config: str | None, progress: Callable[[int], None]) -> dict[str, Any]:
    """What a checkpoint records of the base, JSON values; reads the whole of it for the digest."""
    return {
        "given": given,
        "path": str(base.where.absolute()),
        "format": base.format,
        "step": base.step,
        "config": os.path.abspath(config) if config is not None and Path(config).exists() else config,
        "digest": fingerprint(base, progress).digest,
    }


def open_base(
    metadata: Mapping[str, Any],
    where: Path,
    open_weights: Opener,
    report: Callable[[str], None],
    *,
    instead: tuple[str, int | None, str | None] | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Weights:
    """The model that the adapter in checkpoint `where` was trained on, opened and found to be that.

    Args:
        open_weights: `models.open_weights`.
        instead: where the base is now (model, step, config), if not where it was.
        progress: called with the bytes read.

    Raises:
        CheckpointError: it is gone, or its parameters are others now.
    """
    record = metadata.get(BASE)
    if not isinstance(record, Mapping) or not {"path", "digest"} <= record.keys():
        raise CheckpointError(f"{where / opening.CHECKPOINT_FILE}: does not say what its adapter was trained on")
    path, step, config = instead or (str(record["path"]), None, record.get("config"))
    if instead is None and not Path(path).exists():
        given = record.get("given")
        raise CheckpointError(
            f"{where}: its adapter was trained on {path}, which is gone"
            + (f" (it was given as {given})" if given != path else "")
            + "\nput the base back there, or a link to it; `train` finds it elsewhere with --init-from"
        )
    # Of what has one step only; a run's checkpoint is recorded as the directory of its step.
    base = open_weights(path, step=step, config=config, report=report)
    digest = fingerprint(base, progress).digest
    if digest != record["digest"]:
        raise CheckpointError(
            f"{where}: its adapter was trained on a model with digest {str(record['digest'])[:16]}, and {base.where} "
            f"has {digest[:16]}\nput the base back as it was, or begin a run of another name from the new one"
        )
    return base


class LoraWeights(Weights):
    """A checkpoint of an adapter and its base, read as the merged model; counters, which are the adapter's, are not.

    Raises:
        CheckpointError: its arrays are not those that its record means, or the base is of another architecture.
    """

    format: Format = "native"

    def __init__(self, directory: Path, metadata: Mapping[str, Any], base: Weights) -> None:
        self.where, self.metadata, self.base = directory, metadata, base
        self.cfg = opening.stored_model(metadata, directory)
        self.step = int(metadata["step"])
        self.record = stored_record(metadata, directory)
        self.dtypes = base.dtypes
        self.readers = base.readers
        self._arrays = ArrayReader(directory / opening.STATE)
        self._check()

    def read(self, piece: Piece, kind: Kind = "params") -> np.ndarray:
        assert kind == "params", "an adapter's moments are not the model's"
        values = self.base.read(piece)
        if piece.path not in self.record.targets:
            return values
        a, b = (self.factor(piece, name) for name in ("a", "b"))
        rank = self.record.rank
        change = a.reshape(-1, rank) @ b.reshape(rank, -1)
        change *= np.float32(self.record.scale)
        change += values.reshape(change.shape)
        return change.reshape(values.shape).astype(values.dtype)

    def factor(self, piece: Piece, name: str) -> np.ndarray:
        """float32: "a" [*inputs rank] or "b" [rank *outputs] of one layer of a target.

        Raises:
            CheckpointError: it is damaged.
        """
        return self._arrays.read(f"params/{piece.path}/{name}", piece.layer)

    def order(self) -> list[Piece]:
        return self.base.order()

    def tokenizer_file(self) -> Path | None:
        return super().tokenizer_file() or self.base.tokenizer_file()

    def places(self) -> list[Path]:
        """Every directory that the model is read from."""
        return [self.where, *(self.base.places() if isinstance(self.base, LoraWeights) else [self.base.where])]

    def describe(self) -> dict[str, Any]:
        """What is merged into what; JSON values."""
        return {**self.record.to_dict(), "base": str(self.base.where)}

    def _check(self) -> None:
        stored = self.metadata["arrays"]
        for path in self.record.targets:
            for name, spec in factor_specs(adaptable(self.cfg)[path]).items():
                array = f"params/{path}/{name}"
                expected = {"shape": list(factor_shape(spec, self.cfg, self.record.rank)), "dtype": "float32"}
                if stored.get(array) != expected:
                    raise CheckpointError(
                        f"{self.where}: array {array} is {stored.get(array)}, but its record makes it {expected}; "
                        "the checkpoint is damaged, or was written by another version"
                    )
        differing = differing_fields(self.base.cfg, self.cfg, () if self.cfg.position == "fixed" else ("n_ctx",))
        if differing:
            raise CheckpointError(
                f"{self.where}: its base, {self.base.where}, is of another architecture: it differs in "
                f"{', '.join(differing)}; one of the two is damaged"
            )
