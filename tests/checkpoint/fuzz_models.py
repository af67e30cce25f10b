"""Sound models and data sets of every format, small, for the fuzz test to damage."""

from __future__ import annotations

import gzip
import json
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import zstandard

from checkpoint import hf_cases
from checkpoint.torch_bytes import rebuilt, storage, write
from legacy.generator import Arch, write_model_directory
from legacy.generator_v2 import ArchV2, write_v2
from mesh_transformer.api import conversion
from mesh_transformer.checkpoint.convert import convert
from mesh_transformer.checkpoint.huggingface import write_huggingface
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.checkpoint.weights import assemble
from mesh_transformer.data.tfrecord import write_records
from mesh_transformer.data.tokenizer import train_bpe

ARCH = Arch(layers=2, d_model=16, n_heads=2, n_vocab=264, seq=16)
ARCH_V2 = ArchV2(d_model=16, n_heads=2, d_head=8, seq=16, cores_per_replica=2)
# Every split axis divides by the 16 devices of two hosts.
ARCH_V2_HOSTS = ArchV2(d_model=32, n_heads=4, d_head=8, n_vocab=272, seq=16, cores_per_replica=4)
SEQUENCE_LENGTH, VOCABULARY, N_RECORDS = 12, 300, 6
SHARD_BYTES = 12_000
# How a packed file begins, and the ways out of it and into it.
PACKERS: list[tuple[bytes, Callable[[bytes], bytes], Callable[[bytes], bytes]]] = [
    (b"\x1f\x8b", gzip.decompress, gzip.compress),
    (b"\x28\xb5\x2f\xfd", lambda data: zstandard.ZstdDecompressor().decompress(data), zstandard.compress),
    (b"\x78\x9c", zlib.decompress, zlib.compress),
]


def make(root: Path) -> None:
    """`root`/NAME for each name of `fuzz_cases.SUBJECTS`."""
    root.mkdir(parents=True)
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog. " * 20], ARCH.n_vocab)
    _originals(root, tokenizer.to_bytes())
    v1, v2 = open_weights(root / "v1"), open_weights(root / "v2")
    whole = {"with_optimizer": True}
    convert(v1, root / "v1-converted", conversion("legacy", tokenizer, **whole))
    convert(v2, root / "v2-converted", conversion("legacy-v2", tokenizer, **whole))
    convert(v1, root / "native", conversion("native", tokenizer, **whole))
    convert(v1, root / "hf", conversion("huggingface", tokenizer))
    convert(v1, root / "hf-bare", conversion("huggingface", tokenizer), certify=False)
    (root / "hf-shards").mkdir()
    write_huggingface(
        root / "hf-shards",
        v1,
        dtype=np.dtype(np.float32),
        tokenizer={},
        end_of_text=0,
        max_shard_bytes=SHARD_BYTES,
    )
    _torch_files(root)
    params = jax.tree.map(jnp.asarray, assemble(v1))
    with CheckpointStore(root / "run" / "checkpoints", keep_last=1, keep_every=0) as store:
        files = {"tokenizer.json": tokenizer.to_bytes()}
        store.save(3, {"params": params}, metadata={"model": v1.cfg.to_dict()}, files=files, wait=True)
    _records(root)


def _originals(root: Path, tokenizer: bytes) -> None:
    write_model_directory(root / "v1", ARCH, 2, [5], aux={5: {"used": ["a.tfrecords"], "file_idx": 1}}, config=True)
    (root / "v1" / "tokenizer.json").write_bytes(tokenizer)
    write_model_directory(root / "v1-slim", ARCH, 2, [5], variant="slim", config=True)
    write_model_directory(root / "v1-float16", ARCH, 1, [5], variant="slim_f16", config=True)
    write_v2(root / "v2", ARCH_V2, step=7, config=True)
    write_v2(root / "v2-hosts", ARCH_V2_HOSTS, step=7, hosts=2, config=True)
    for suffix in ("tar", "tar.gz", "tar.zst"):
        directory = root / suffix.replace(".", "-")
        directory.mkdir()
        (directory / "config.json").write_bytes((root / "v1-slim" / "config.json").read_bytes())
        plain = directory / "step_5.tar"
        with tarfile.open(plain, "w") as archive:
            archive.add(root / "v1-slim" / "step_5", "step_5")
        data = plain.read_bytes()
        if suffix != "tar":
            plain.unlink()
            pack = PACKERS[0 if suffix == "tar.gz" else 1][2]
            (directory / f"step_5.{suffix}").write_bytes(pack(data))


def _torch_files(root: Path) -> None:
    weights = open_weights(root / "hf-bare")
    tensors = hf_cases.hf_tensors(weights.cfg, assemble(weights))
    config = (root / "hf-bare" / "config.json").read_bytes()
    for name, form in (("bin", "zip"), ("bin-deflated", "deflated"), ("bin-old", "old")):
        (root / name).mkdir()
        (root / name / "config.json").write_bytes(config)
        _torch_file(root / name / "pytorch_model.bin", tensors, form)
    (root / "bin-shards").mkdir()
    (root / "bin-shards" / "config.json").write_bytes(config)
    names = sorted(tensors)
    parts = {f"pytorch_model-{i + 1:05d}-of-00002.bin": names[i::2] for i in range(2)}
    for file, held in parts.items():
        _torch_file(root / "bin-shards" / file, {name: tensors[name] for name in held}, "zip")
    weight_map = {name: file for file, held in parts.items() for name in held}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (root / "bin-shards" / "pytorch_model.bin.index.json").write_text(index)


def _torch_file(path: Path, tensors: Mapping[str, np.ndarray], form: str) -> None:
    keys = {name: str(i) for i, name in enumerate(tensors)}
    state = {name: rebuilt(storage(keys[name], a.size), a.shape) for name, a in tensors.items()}
    write(path, state, {keys[name]: a for name, a in tensors.items()}, form)


def _records(root: Path) -> None:
    rng = np.random.default_rng(3)
    for directory in ("records", "records-index", "records-zstd"):
        (root / directory).mkdir()
        for name in "ab":
            ids = rng.integers(0, VOCABULARY, (N_RECORDS, SEQUENCE_LENGTH + 1))
            write_records(root / directory / f"{name}.tfrecords", list(ids))
    for path in (root / "records-zstd").iterdir():
        path.write_bytes(zlib.compress(path.read_bytes()))
    (root / "records-index" / "all.index").write_text("a.tfrecords\nb.tfrecords\n")
