"""What one model says of the texts that a report looks at; called for the model before and after, one in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mesh_transformer.api import Model
from mesh_transformer.shapes import Float, Int

SAMPLE_TOKENS = 100
_COPY_TOKENS = 64  # of a continuation that is compared with what the row says
_PROMPT_TOKENS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Material:
    """What both models are given.

    held_out: name of a validation set -> rows. training: rows that the run was trained on. Rows are int32
    [n, T + 1]; an id that is not learned stands as ~id. prompts: token ids.
    """

    prompts: Sequence[Sequence[int]]
    held_out: Mapping[str, Int[np.ndarray, "rows seq_plus_one"]]
    training: Int[np.ndarray, "rows seq_plus_one"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copied:
    """How much of a row a model writes by itself, greedily, after the row's first half.

    prompt, truth, written: token ids; longest: of the longest run of tokens that truth and written share.
    """

    prompt: list[int]
    truth: list[int]
    written: list[int]
    longest: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """What a model said.

    samples: a completion of each prompt. log_probs: set -> [rows, T], the log-probability of every token after those
    before it, in nats; NaN where it is not learned. copied: "training" and each set -> one for each row.
    """

    samples: list[list[int]]
    log_probs: Mapping[str, Float[np.ndarray, "rows seq"]]
    copied: Mapping[str, list[Copied]]

    def losses(self, name: str) -> np.ndarray:
        """Mean loss of every sequence of a set, in nats a token."""
        return -np.nanmean(self.log_probs[name], axis=1)


def observe(model: Model, material: Material, *, seed: int) -> Observation:
    """Everything that a report compares; texts are written with the seed, so that nothing but the model differs."""
    samples = [
        model.generate([list(prompt)], max_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.95, seed=seed + i)[0].tokens
        for i, prompt in enumerate(material.prompts)
    ]
    log_probs = {name: log_probabilities(model, rows) for name, rows in material.held_out.items()}
    rows_of = {"training": material.training, **material.held_out}
    copied = {name: copies_of(model, rows) for name, rows in rows_of.items()}
    return Observation(samples=samples, log_probs=log_probs, copied=copied)


def ids_of(row: np.ndarray) -> np.ndarray:
    """The ids that a row is read as."""
    return np.where(row < 0, ~row, row)


def log_probabilities(model: Model, rows: Int[np.ndarray, "rows seq_plus_one"]) -> Float[np.ndarray, "rows seq"]:
    """Of every token but the first, given those before it; NaN where the row says that it is not learned."""
    found = np.full((rows.shape[0], rows.shape[1] - 1), np.nan)
    for i, row in enumerate(rows):  # one at a time: the logits of a row may take hundreds of megabytes
        ids = ids_of(row)
        logits = model.logits(ids[None, :-1])[0].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        at_token = np.take_along_axis(logits, ids[1:, None], axis=-1)[:, 0]
        found[i] = np.where(row[1:] < 0, np.nan, at_token - np.log(np.exp(logits).sum(axis=-1)))
    return found


def copies_of(model: Model, rows: Int[np.ndarray, "rows seq_plus_one"]) -> list[Copied]:
    """What the model goes on with after each row's first half; rows that have nothing to go on with are left out."""
    cut = [halves for row in rows if (halves := halves_of(row))]
    if not cut:
        return []
    prompts, n_tokens = [prompt for prompt, _ in cut], max(len(truth) for _, truth in cut)
    completions = model.generate(prompts, max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
    found = []
    for (prompt, truth), completion in zip(cut, completions, strict=True):
        written = completion.tokens[: len(truth)]
        longest = longest_shared_run(truth, written)
        found.append(Copied(prompt=prompt, truth=truth, written=written, longest=longest))
    return found


def halves_of(row: Int[np.ndarray, " seq_plus_one"]) -> tuple[list[int], list[int]] | None:
    """A row's first half and the tokens after it; of a row with a prompt that is not learned, the prompt and the rest.

    None where nothing follows.
    """
    learned = np.flatnonzero(row >= 0)
    if learned.size < 2:
        return None
    ids, first = ids_of(row[: learned[-1] + 1]), int(learned[0])
    cut = first if first > 1 else len(ids) // 2
    return ids[:cut].tolist(), ids[cut : cut + _COPY_TOKENS].tolist()


def longest_shared_run(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest run of consecutive elements that stands in both."""
    longest, ending_here = 0, [0] * (len(b) + 1)
    for x in a:
        # From the right, so that what ends one element before is still that of the previous x.
        for j in range(len(b), 0, -1):
            ending_here[j] = ending_here[j - 1] + 1 if x == b[j - 1] else 0
            longest = max(longest, ending_here[j])
    return longest


def prompt_of(row: Int[np.ndarray, " seq_plus_one"]) -> list[int]:
    """The beginning of a row, to be continued: its prompt where it has one, else its first tokens."""
    learned = np.flatnonzero(row >= 0)
    first = int(learned[0]) if learned.size else len(row)
    length = first if first > 1 else min(_PROMPT_TOKENS, max(1, len(row) // 2))
    return ids_of(row[:length]).tolist()
