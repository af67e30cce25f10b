"""What can be asked of `prepare`, and what it reports."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.data.documents import POLICIES
from mesh_transformer.data.normalize import check_ftfy


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How text becomes records; the defaults are the original's (docs/formats.md, section 10).

    Args:
        sequence_length: T; each record holds T + 1 ids.
        validation_fraction: this part of the documents, at least one, is packed once, in input order, as a data set of
            its own.
        seed: of the shuffles; one input file and one seed give the same records as in the original.
        preserve_order: no shuffling; files by path.
        treat_eot_as_text: `<|endoftext|>` in the text is text, and does not divide documents.
        min_unique_tokens: drops packed sequences with fewer distinct ids.
        n_repack_epochs: epochs written one after the other, each packed anew.
        keep_tail: what does not fill the last sequence of an epoch is kept, as a sequence filled up with end-of-text
            ids that are not learned. The other sequences are the same as without.
        ftfy, detokenize: normalize each document.
        invalid_utf8: "refuse", "replace" (by U+FFFD) or "skip" bytes that are not UTF-8.
        template: the lines are examples of which a part is learned, each a record of its own (data/supervised.py).
        cut_long: cut an example that is longer than a sequence, rather than leave it out.
        workers: processes for what Python does: `ftfy`, `detokenize` and the bytes tokenizer. More than one are
            spawned, so that a script needs `if __name__ == "__main__":`. The tokenizers library uses threads, as many
            as RAYON_NUM_THREADS says when it is first used, or one for each core.
        overwrite: replace a data set of this name.

    Raises:
        ConfigError: a value is impossible, or two do not go together.
        UserError: ftfy is asked for and not installed.
    """

    sequence_length: int = 2048
    validation_fraction: float = 0.0
    seed: int = 10
    preserve_order: bool = False
    treat_eot_as_text: bool = False
    min_unique_tokens: int = 0
    n_repack_epochs: int = 1
    keep_tail: bool = False
    ftfy: bool = False
    detokenize: bool = False
    invalid_utf8: str = "refuse"
    template: str | None = None
    cut_long: bool = False
    workers: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ConfigError(f"--sequence-length {self.sequence_length} must be at least 1")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"--validation-fraction {self.validation_fraction} must be at least 0 and less than 1")
        if self.n_repack_epochs < 1:
            raise ConfigError(f"--n-repack-epochs {self.n_repack_epochs} must be at least 1")
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers} must be at least 1")
        if self.invalid_utf8 not in POLICIES:
            raise ConfigError(f"--invalid-utf8 {self.invalid_utf8} is unknown; expected {', '.join(POLICIES)}")
        if self.template is None:
            if self.cut_long:
                raise ConfigError("--cut-long is for examples; pass --template too, or leave it out")
        else:
            packed = {
                "--min-unique-tokens": self.min_unique_tokens > 0,
                "--keep-tail": self.keep_tail,
                "--treat-eot-as-text": self.treat_eot_as_text,
                "--normalize-with-ftfy": self.ftfy,
                "--normalize-with-wikitext-detokenize": self.detokenize,
            }
            if given := [option for option, is_given in packed.items() if is_given]:
                raise ConfigError(f"{given[0]} is for packed text and does not go with --template; leave one out")
        if self.ftfy:
            check_ftfy()

    @property
    def width(self) -> int:
        """Ids in a record."""
        return self.sequence_length + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What `prepare` made. Counts of sequences are over all epochs; the rest is of one pass over the text.

    `documents` (of which `validation_documents` more are held out) are those that were tokenized: parts between
    `<|endoftext|>`, or examples. Dropped were `empty_documents`, `trailing_tokens` that did not fill the last sequence,
    `filtered_sequences` with too few distinct ids, examples that were too long or had nothing to learn.
    `invalid_bytes` were no UTF-8 and were replaced or skipped. `skipped` are the files of input directories that are
    not text. `first_sequence` is the text of the first record. `input_bytes` were read in `seconds`.
    """

    index: Path
    records: Path
    validation_index: Path | None
    validation_records: Path | None
    data_record: Path
    documents: int
    validation_documents: int
    tokens: int
    sequences: int
    validation_sequences: int
    trailing_tokens: int
    filtered_sequences: int
    empty_documents: int
    too_long_examples: int
    unlearned_examples: int
    invalid_bytes: int
    skipped: tuple[str, ...]
    first_sequence: str
    input_bytes: int
    seconds: float
