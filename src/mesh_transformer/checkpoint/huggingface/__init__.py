"""Hugging Face GPT-J directories, in and out. Mapping: docs/formats.md, section 2."""

from mesh_transformer.checkpoint.huggingface.config import CONFIG, looks_huggingface, read_config
from mesh_transformer.checkpoint.huggingface.reader import HuggingFaceWeights
from mesh_transformer.checkpoint.huggingface.writer import MAX_SHARD_BYTES, check_target, write_huggingface

__all__ = [
    "CONFIG",
    "MAX_SHARD_BYTES",
    "HuggingFaceWeights",
    "check_target",
    "looks_huggingface",
    "read_config",
    "write_huggingface",
]
