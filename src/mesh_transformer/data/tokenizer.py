"""Text to token ids and back: the GPT-2 BPE, plain bytes, or any tokenizer.json."""

from __future__ import annotations

import abc
import codecs
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh_transformer.config.errors import ConfigError, DataError
from mesh_transformer.data.companions import Companions, companions_in
from mesh_transformer.data.decoding import Pieces, pieces_of
from mesh_transformer.data.files import make_directory, write_atomic
from mesh_transformer.data.gpt2_files import gpt2_vocabulary

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
BUILT_IN = ("gpt2", "bytes")

# The end-of-text names of other families, for a tokenizer.json that does not know GPT-2's.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_BYTES_FILE = {"type": "bytes", "n_vocab": 257, "end_of_text": 256}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer(abc.ABC):
    """A tokenizer whose ids are 0..n_vocab-1. Made by `load_tokenizer`, `from_bytes` and `train_bpe`.

    `name` is "gpt2", "bytes" or the name of the file it came from; `end_of_text`, which stands between documents, is
    None where there is no such token; `companions` is what the files beside it say.
    """

    name: str
    n_vocab: int
    end_of_text: int | None
    companions: Companions = dataclasses.field(default_factory=Companions, kw_only=True)

    @property
    def begin(self) -> tuple[int, ...]:
        """What this tokenizer puts before every text that is read as a whole: Llama's `<s>`; often nothing."""
        return ()

    @property
    def start(self) -> int | None:
        """The id that stands before a text which nothing precedes: its first of `begin`, or end-of-text."""
        return next(iter(self.begin), self.end_of_text)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text which a model writes: those that came with the model, or end-of-text."""
        known = tuple(token for token in self.companions.ends if 0 <= token < self.n_vocab)
        return known or (() if self.end_of_text is None else (self.end_of_text,))

    def encode_prompt(self, text: str, *, allow_special: bool = False) -> list[int]:
        """`encode` with `begin` before it, as transformers' tokenizers give it; once, where the text has it already."""
        return self.encode_prompts([text], allow_special=allow_special)[0]

    def encode_prompts(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """`encode_prompt` of each text; faster than one by one. Raises DataError as `encode` does."""
        begin, several = list(self.begin), self.encode_batch(texts, allow_special=allow_special)
        return [ids if begin and ids[: len(begin)] == begin else begin + ids for ids in several]

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
        """The text of `ids`. Ids outside the vocabulary give nothing; bytes that are no UTF-8 give U+FFFD.

        A space that the tokenizer puts before every text is not part of it.
        """
        pieces = [data for data in map(self.token_bytes, ids) if data]
        pieces[:1] = map(self.without_beginning, pieces[:1])
        return b"".join(pieces).decode("utf-8", errors="replace")

    def without_beginning(self, data: bytes) -> bytes:
        """The bytes of a text's first token, without the space that the tokenizer put before the text."""
        return data

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

    def files(self) -> dict[str, bytes]:
        """Name -> contents of tokenizer.json and its companions, as they are kept beside a model."""
        return {**self.companions.files, FILE_NAME: self.to_bytes()}

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `directory/tokenizer.json` and its companions: its path. Raises DataError if one cannot be written."""
        make_directory(Path(directory))
        for name, data in self.files().items():
            write_atomic(Path(directory) / name, data)
        return Path(directory) / FILE_NAME


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
    def _pieces(self) -> Pieces | None:
        return pieces_of(self._description.get("decoder"))

    @property
    def byte_level(self) -> bool:
        return self._pieces is not None

    @functools.cached_property
    def begin(self) -> tuple[int, ...]:
        # By tokenizer.json alone: beside it transformers drops add_bos_token of tokenizer_config.json too.
        if not self.backend.num_special_tokens_to_add(False):
            return ()
        alone, whole = (self.backend.encode("a", add_special_tokens=added).ids for added in (False, True))
        at = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
        return tuple(whole[:at])

    @functools.cached_property
    def start(self) -> int | None:
        named = (self.companions.special.get(name) for name in ("bos_token", "eos_token"))
        known = (self.backend.token_to_id(token) for token in named if token is not None)
        # As lm-evaluation-harness chooses it.
        return next((token for token in (*self.begin, *known) if token is not None), self.end_of_text)

    def without_beginning(self, data: bytes) -> bytes:
        return data if self._pieces is None else self._pieces.beginning(data)

    def decode(self, ids: Iterable[int]) -> str:
        if self.byte_level:
            return super().decode(ids)
        known = [int(token) for token in ids if 0 <= token < self.n_vocab]
        return self.backend.decode(known, skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        text = self.backend.id_to_token(int(token)) if 0 <= token < self.n_vocab else None
        if text is None:
            return b""
        return (self._pieces or Pieces()).bytes_of(text)

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


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `spec` names: "gpt2", "bytes", a tokenizer.json, or a directory that holds one.

    Of a file, what stands beside it is read too.

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
    return from_bytes(data, name=str(path), companions=companions_in(path.parent))


def from_bytes(data: bytes, *, name: str = FILE_NAME, companions: Companions | None = None) -> Tokenizer:
    """The tokenizer in the content of a tokenizer.json; `name` is the file's, for `Tokenizer.name` and messages.

    Raises:
        DataError: not JSON, or not a tokenizer.
    """
    found = _from_bytes(data, name)
    if companions is None or companions == Companions():
        return found
    named = companions.special.get("eos_token")
    end = found.end_of_text
    if end is None and named is not None and isinstance(found, _LibraryTokenizer):
        end = found.backend.token_to_id(named)
    return dataclasses.replace(found, end_of_text=end, companions=companions)


def _from_bytes(data: bytes, name: str) -> Tokenizer:
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

    vocabulary, merges = gpt2_vocabulary()
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return _wrap(backend, "gpt2")


class IncrementalDecoder:
    """Decodes ids as they arrive and never emits a part of a character: it holds the bytes back until it is whole.

    What all `push` calls and the closing `flush` return, put together, is the text of all ids: with `begins`,
    `tokenizer.decode` of them; without, what they add to a text before them, the space at its beginning included.
    """

    def __init__(self, tokenizer: Tokenizer, *, begins: bool = False) -> None:
        self._tokenizer, self._begins = tokenizer, begins
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._emitted = ""

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after these further ids; often empty in the middle of a character."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"".join(map(self._bytes, ids)))
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids)
        return self._emit("" if text.endswith("\ufffd") else text)

    def flush(self) -> str:
        """What was held back, an incomplete character as U+FFFD. The decoder is then at its end."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._emit(self._tokenizer.decode(self._ids))

    def _bytes(self, token: int) -> bytes:
        data = self._tokenizer.token_bytes(token)
        if self._begins and data:
            self._begins, data = False, self._tokenizer.without_beginning(data)
        return data

    def _emit(self, text: str) -> str:
        # Tokens that are not bytes decode by context (spaces, for one), so the whole is decoded and the rest emitted.
        new = text[len(self._emitted) :]
        self._emitted += new
        return new


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
