"""Any model into any format, piece by piece, with a certificate; the result appears whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mesh_transformer.checkpoint import huggingface, native_weights
from mesh_transformer.checkpoint.certificate import write_certificate
from mesh_transformer.checkpoint.certifying import Progress, certify_result, counter
from mesh_transformer.checkpoint.huggingface import HuggingFaceWeights, looks_huggingface, write_huggingface
from mesh_transformer.checkpoint.legacy import v1_writer, v2_writer
from mesh_transformer.checkpoint.legacy.files import DirectoryFiles
from mesh_transformer.checkpoint.legacy.finding import CONFIG, META, looks_legacy
from mesh_transformer.checkpoint.legacy.v1 import LegacyWeights
from mesh_transformer.checkpoint.legacy.v2 import LegacyV2Weights
from mesh_transformer.checkpoint.lora import LoraWeights
from mesh_transformer.checkpoint.manifest import write_manifest
from mesh_transformer.checkpoint.opening import CHECKPOINT_FILE
from mesh_transformer.checkpoint.quantized import quantized_pieces
from mesh_transformer.checkpoint.quantized_weights import (
    QuantizedWeights,
    looks_quantized,
    planned_bytes,
    write_quantized,
)
from mesh_transformer.checkpoint.weights import MOMENTS, Weights, stored_bytes
from mesh_transformer.config.errors import CheckpointError, ConfigError, UserError
from mesh_transformer.files import atomic_directory, clear_leftovers, is_out_of_space
from mesh_transformer.model.params import is_multiplied, named_specs, size
from mesh_transformer.model.quantize import check_model as check_groups
from mesh_transformer.model.quantize import check_quantize

Target = Literal["native", "huggingface", "legacy", "legacy-v2"]
TARGETS: tuple[Target, ...] = ("native", "huggingface", "legacy", "legacy-v2")
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
_GPT_J_SHARDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to make of a model.

    Attributes:
        to: the format.
        quantize: one of `quantize.QUANTIZATIONS`, for "native": matrices of products are rounded to it; None: they are
            not.
        dtype: what parameters are rounded to; None keeps what is stored (of Hugging Face and v1, which have one dtype
            for all, that of the large matrices).
        n_shards: of v1; 0: as the source, else 8 or the most that divides it.
        with_optimizer: moments and counts come along.
        tokenizer: files to put beside the model.
        end_of_text: its id, which Hugging Face's configuration names.
    """

    to: Target
    quantize: str | None = None
    dtype: np.dtype | None = None
    n_shards: int = 0
    with_optimizer: bool = False
    tokenizer: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    end_of_text: int | None = None


def convert(
    weights: Weights,
    target: Path,
    conversion: Conversion,
    *,
    overwrite: bool = False,
    certify: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Writes `weights` at `target`, reads it back, compares, and certifies; returns the certificate's facts.

    Args:
        target: a directory that must not exist, unless `overwrite`; one named step_N is a v1 or v2 step directory
            itself, any other becomes the model directory.
        certify: False leaves reading back and conversion.json out.
        progress: called with a stage, the bytes done and those of the whole stage.

    Raises:
        UserError: the target exists, cannot hold the model, or the disk is full; nothing is left behind.
        CheckpointError: the source is damaged, or what was written cannot be read back.
    """
    check(weights, conversion)
    # What a conversion that died left there: its space counts as free, and what it was about to replace comes back.
    clear_leftovers(target.absolute().parent, re.escape(target.name))
    _check_place(weights, target, overwrite)
    _check_space(weights, target, conversion)
    with _errors_that_teach(target), atomic_directory(target, overwrite=overwrite) as temporary:
        with np.errstate(over="raise"):
            step_directory = _write(temporary, target.name, weights, conversion, progress)
        if not certify:
            if conversion.to == "native":
                write_manifest(temporary)
            return {}
        back = _reopen(temporary, step_directory, conversion)
        facts = certify_result(weights, back, _casts(weights, conversion), conversion.with_optimizer, progress)
        files = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
        write_certificate(temporary, facts, [] if conversion.to == "native" else files)
        if conversion.to == "native":
            write_manifest(temporary)
    return facts


def check(weights: Weights, conversion: Conversion) -> None:
    """Returns if the format can hold the model.

    Raises:
        UserError: it cannot; the message says why and what can.
    """
    if conversion.to not in TARGETS:
        raise UserError(f"format {conversion.to!r} is not known; expected one of {', '.join(TARGETS)}")
    _check_quantization(weights, conversion)
    if conversion.with_optimizer:
        if conversion.to == "huggingface":
            raise UserError("a Hugging Face directory holds no optimizer state; convert to native or legacy for that")
        if weights.counters is None:
            raise UserError(f"{weights.where}: holds no optimizer state; leave --with-optimizer out")
    if conversion.n_shards and conversion.to != "legacy":
        raise UserError(f"--shards {conversion.n_shards} is for --to legacy; {conversion.to} has no such shards")
    if conversion.to == "huggingface":
        huggingface.check_target(weights.cfg)
    elif conversion.to == "legacy":
        v1_writer.check_target(weights.cfg, shards_of(weights, conversion))
    elif conversion.to == "legacy-v2" and weights.cfg.architecture != "v2":
        raise ConfigError(
            f"model.architecture = {weights.cfg.architecture!r}: a v2 checkpoint holds the v2 architecture only; "
            "use --to legacy"
        )


def _check_quantization(weights: Weights, conversion: Conversion) -> None:
    check_quantize(conversion.quantize)
    if isinstance(weights, QuantizedWeights):
        if conversion.quantize is not None:
            raise UserError(
                f"{weights.where}: is rounded to {weights.quantize} already, and rounding it to {conversion.quantize} "
                "would round twice; convert the model that it was made of"
            )
        if conversion.dtype is None:
            raise UserError(
                f"{weights.where}: its matrices are rounded to {weights.quantize}, and a copy of them in another "
                "format would pass for the original; convert the model that it was made of, or say --dtype float32 to "
                "write the rounded weights as they are computed with"
            )
    if conversion.quantize is None:
        return
    if conversion.to != "native":
        raise UserError(f"--quantize {conversion.quantize} is for --to native; {conversion.to} has no such weights")
    if conversion.with_optimizer:
        raise UserError("--quantize is for models that are computed with and not trained; leave --with-optimizer out")
    check_groups(conversion.quantize, weights.cfg)


def shards_of(weights: Weights, conversion: Conversion) -> int:
    """How many v1 shards to write: as asked, as the source has, 8 as the original did, or the most that divide."""
    if conversion.n_shards:
        return conversion.n_shards
    own = getattr(weights, "n_shards", 0)
    cfg = weights.cfg
    sizes = (cfg.n_heads, cfg.n_vocab, cfg.d_model, cfg.d_ff)
    return own or max(n for n in range(1, _GPT_J_SHARDS + 1) if not any(size % n for size in sizes))


def kept_dtypes(weights: Weights, conversion: Conversion) -> dict[str, np.dtype]:
    """Parameter path -> the dtype in which its values are written."""
    paths = named_specs(weights.cfg)
    if conversion.dtype is not None:
        return dict.fromkeys(paths, conversion.dtype)
    if conversion.to in ("huggingface", "legacy"):
        return dict.fromkeys(paths, weights.main_dtype)
    return {path: weights.dtype_of(path) for path in paths}


def _check_place(weights: Weights, target: Path, overwrite: bool) -> None:
    sources = weights.places() if isinstance(weights, LoraWeights) else [weights.where]
    for source in (source.resolve() for source in sources if weights.format != "memory"):
        place = target.resolve()
        if source.is_relative_to(place) or (source.is_dir() and place.is_relative_to(source)):
            raise CheckpointError(f"{target}: holds the source, {source}, or lies in it; choose another place")
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise CheckpointError(f"{target}: exists already; choose another place, or --overwrite")
    is_ours = (target / CHECKPOINT_FILE).is_file() or looks_quantized(target)
    if not (is_ours or looks_huggingface(target) or looks_legacy(target)) and (
        not target.is_dir() or any(target.iterdir())
    ):
        raise CheckpointError(f"{target}: is no model, so --overwrite does not remove it; choose another place")


def _check_space(weights: Weights, target: Path, conversion: Conversion) -> None:
    needed = _parameter_bytes(weights, conversion)
    if conversion.with_optimizer:
        needed += stored_bytes(weights, MOMENTS)
    place = target.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{target}: needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free in {place}; "
            "free some, or choose another place"
        )


def _parameter_bytes(weights: Weights, conversion: Conversion) -> int:
    """Of what is to be written, without moments."""
    if conversion.quantize is not None:
        return planned_bytes(weights, conversion.quantize, conversion.dtype)
    kept = kept_dtypes(weights, conversion)
    return sum(size(spec, weights.cfg) * kept[path].itemsize for path, spec in named_specs(weights.cfg).items())


@contextlib.contextmanager
def _errors_that_teach(target: Path) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise ConfigError(
            f"{target}: the model has a value that is too large for this dtype (float16 ends at 65504), and would "
            "become infinite\nkeep the stored dtype, or choose --dtype bfloat16; nothing is left of it"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: how TensorStore reports what the system says
        if is_out_of_space(error):
            raise CheckpointError(
                f"{target}: no space left on the disk; what was written of it is removed\n"
                "free some, or choose another place"
            ) from error
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"{target}: cannot be written ({error.strerror or error}); nothing is left of it"
        ) from error


def _write(temporary: Path, name: str, weights: Weights, conversion: Conversion, progress: Progress) -> Path:
    """Writes everything but certificate and manifest; returns the directory with the parameters."""
    kept = kept_dtypes(weights, conversion)
    total = _parameter_bytes(weights, conversion)
    total += stored_bytes(weights, MOMENTS) if conversion.with_optimizer else 0
    if conversion.to == "legacy":
        total = stored_bytes(weights, weights.kinds() if conversion.with_optimizer else ("params",))
    count = counter(progress, "writing", total)
    if conversion.quantize is not None:
        quantized = quantized_pieces(weights, conversion.quantize)
        how: dict[str, Any] = {"dtype": conversion.dtype, "files": conversion.tokenizer}
        write_quantized(temporary, weights, quantized, conversion.quantize, progress=count, **how)
        return temporary
    if conversion.to == "native":
        native_weights.write_native(
            temporary,
            weights,
            dtype=conversion.dtype,
            with_optimizer=conversion.with_optimizer,
            files=conversion.tokenizer,
            progress=count,
        )
        return temporary
    if conversion.to == "huggingface":
        write_huggingface(
            temporary,
            weights,
            dtype=kept["embed/tokens"],
            tokenizer=conversion.tokenizer,
            end_of_text=conversion.end_of_text,
            progress=count,
        )
        return temporary
    step_directory = temporary
    step = weights.step or 0
    if not _STEP.fullmatch(name):
        step_directory = temporary / f"step_{step}"
        step_directory.mkdir()
        meta = {"step": step, "checkpoints": [step], "aux": {str(step): dict(weights.extras)}}
        (temporary / META).write_text(json.dumps(meta) + "\n", encoding="utf-8")
    if conversion.to == "legacy":
        n_shards = shards_of(weights, conversion)
        document = v1_writer.config_document(weights.cfg, n_shards)
        v1_writer.write_v1(
            step_directory,
            weights,
            n_shards,
            dtype=kept["embed/tokens"],
            with_optimizer=conversion.with_optimizer,
            progress=count,
        )
    else:
        document = v2_writer.config_document(weights.cfg)
        v2_writer.write_v2(
            step_directory,
            weights,
            dtype=conversion.dtype,
            with_optimizer=conversion.with_optimizer,
            progress=count,
        )
    (temporary / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for file, data in conversion.tokenizer.items():
        (temporary / file).write_bytes(data)
    return step_directory


def _reopen(temporary: Path, step_directory: Path, conversion: Conversion) -> Weights:
    if conversion.quantize is not None:
        return QuantizedWeights(temporary, has_manifest=False)
    if conversion.to == "native":
        return native_weights.open_unverified(temporary)
    if conversion.to == "huggingface":
        return HuggingFaceWeights(temporary)
    raw = json.loads((temporary / CONFIG).read_bytes())
    if conversion.to == "legacy":
        return LegacyWeights(step_directory, DirectoryFiles(step_directory), raw, CONFIG)
    return LegacyV2Weights(step_directory, raw, CONFIG)


def _casts(weights: Weights, conversion: Conversion) -> dict[str, str]:
    """Path -> what a parameter is rounded to, of those whose type changes."""
    casts = {
        path: kept.name for path, kept in kept_dtypes(weights, conversion).items() if kept != weights.dtype_of(path)
    }
    if conversion.quantize is not None:
        matrices = (path for path, spec in named_specs(weights.cfg).items() if is_multiplied(spec))
        casts |= dict.fromkeys(matrices, conversion.quantize)
    return casts
