"""Opening a model of any format, found by looking: native, the original's v1 and v2, Hugging Face, a Hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from mesh_transformer.checkpoint import opening
from mesh_transformer.checkpoint.certificate import CERTIFICATE, verify_certificate
from mesh_transformer.checkpoint.huggingface import HuggingFaceWeights, looks_huggingface
from mesh_transformer.checkpoint.legacy.finding import looks_legacy, open_legacy
from mesh_transformer.checkpoint.lora import LORA, LoraWeights, open_base
from mesh_transformer.checkpoint.native_weights import NativeWeights
from mesh_transformer.checkpoint.quantized_weights import looks_quantized, open_quantized
from mesh_transformer.checkpoint.weights import Weights
from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.files import is_leftover

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
# What of a repository a GPT-J is read from; safetensors, or .bin where there are none.
_HUB_FILES = [
    *("config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"),
    # What the tokenizer's companions are read from.
    *("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "*.jinja", "tokenizer.model"),
]
_HUB_TORCH_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def open_weights(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    config: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Weights:
    """Opens a model without reading its parameters.

    Args:
        path: a run directory, a native checkpoint, a quantised model, a Hugging Face directory, an original step or
            model directory or an archive of one, or, where no such path exists and the network allows, a Hub id
            `owner/name@revision`.
        step: which checkpoint, where there are several; by default the newest intact one.
        config: the configuration of an original checkpoint; other formats hold their own.
        report: called with one line for each damaged checkpoint passed over, and each thing that was assumed.

    Raises:
        CheckpointError: there is no model, or it is damaged; the file is named.
        ConfigError: `config` cannot be used.
    """
    where = Path(path)
    if where.exists() and is_leftover(where.absolute().name):
        raise CheckpointError(
            f"{where}: left by a conversion or save that did not finish; repeat that, it clears this away"
        )
    if not where.exists():
        where = _from_hub(os.fspath(path))
    if looks_quantized(where):
        _no_config(where, config, "a quantised model")
        return open_quantized(where, step)
    if opening.looks_native(where):
        _no_config(where, config, "a native checkpoint")
        return _open_native(where, step, report)
    if looks_legacy(where):
        for directory in (where, where.parent):
            if (directory / CERTIFICATE).is_file():
                verify_certificate(directory)
                break
        weights = open_legacy(where, step, config)
    elif looks_huggingface(where) or _has_huggingface_files(where):
        _no_config(where, config, "a Hugging Face directory")
        if step is not None:
            raise CheckpointError(f"{where}: a Hugging Face directory has no steps; leave step = {step} out")
        verify_certificate(where)
        weights = HuggingFaceWeights(where)
    else:
        raise CheckpointError(
            f"{where}: holds no model; expected a run directory or checkpoint, a Hugging Face directory,\n"
            "or the original's step_N directory (shard_0, ...), its model directory or a .tar.zst of it"
        )
    for note in weights.notes:
        report(note)
    return weights


def _open_native(path: Path, step: int | None, report: Callable[[str], None]) -> Weights:
    """Where every checkpoint is damaged the error says how the newest is."""
    passed_over: list[str] = []
    try:
        directory, metadata = opening.open_native(path, step, passed_over.append)
    except CheckpointError as error:
        raise CheckpointError("\n".join([str(error), *passed_over[:1]])) from error
    for line in passed_over:
        report(line)
    if LORA not in metadata:
        return NativeWeights(directory, metadata)
    return LoraWeights(directory, metadata, open_base(metadata, directory, open_weights, report))


def _has_huggingface_files(path: Path) -> bool:
    """Whether there are weights, so that a damaged config.json is called that and not absent."""
    return path.is_dir() and any((path / name).exists() for name in ("model.safetensors", "pytorch_model.bin"))


def _no_config(path: Path, config: str | None, kind: str) -> None:
    if config is not None:
        raise CheckpointError(f"{path}: {kind} holds its own configuration; leave {config} out")


def _from_hub(name: str) -> Path:
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name}: there is no such file or directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, revision = match[1], match[2]
    try:
        found = Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
        if not list(found.glob("*.safetensors")):
            snapshot_download(repository, revision=revision, allow_patterns=_HUB_TORCH_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{name}: there is no such file or directory, and the Hugging Face Hub does not give it either\n({reason})"
        ) from error
    return found
