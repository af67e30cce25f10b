"""How a context and its continuation become token ids: as lm-evaluation-harness does it, or as the original did."""

from __future__ import annotations

from collections.abc import Sequence

from mesh_transformer.config.errors import UserError
from mesh_transformer.data.normalize import fix_text
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.engine.packing import Pair


def encode_pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """The ids of each (context, continuation) as lm-evaluation-harness' own models have them.

    Spaces that end the context go to the continuation. The continuation's tokens are those of the whole text beyond as
    many as the context has by itself; before them stand the context's own, and what the tokenizer puts before every
    text. (Where a token of the whole text reaches over the border, these are not quite the text's tokens; the harness
    has it so.) An empty context is the tokenizer's beginning-of-text, or end-of-text where it has none, unless the
    continuation begins with it.

    Raises:
        UserError: nothing is left to score, or the context is empty and there is no end-of-text token.
    """
    # All at once, since the tokenizer then uses every core.
    begun = [text for context, continuation in texts if context for text in (context + continuation, context.rstrip())]
    alone = [continuation for context, continuation in texts if not context]
    prompts = iter(tokenizer.encode_prompts(begun, allow_special=True))
    plain = iter(tokenizer.encode_batch(alone, allow_special=True))
    return [
        _checked(_cut(tokenizer, next(prompts), next(prompts)) if text[0] else _started(tokenizer, next(plain)), *text)
        for text in texts
    ]


def _cut(tokenizer: Tokenizer, whole: list[int], before: list[int]) -> Pair:
    """A pair out of the ids of the whole text and of the context alone."""
    # A context of nothing but spaces leaves none; the harness keeps no token before it either.
    return Pair(before, whole[len(before) :]) if before else Pair([start_of_text(tokenizer)], whole)


def _started(tokenizer: Tokenizer, ids: list[int]) -> Pair:
    """A pair of an empty context and the continuation's ids."""
    prefix = start_of_text(tokenizer)
    return Pair(ids[:1], ids[1:]) if ids and ids[0] == prefix else Pair([prefix], ids)


def encode_legacy(tokenizer: Tokenizer, context: str, continuation: str, n_ctx: int) -> Pair:
    """The ids of a pair as the original's adaptor had them: `<|endoftext|>` and the cleaned context, then the cleaned
    continuation encoded by itself; of both, the newest `n_ctx` tokens.

    Cleaned: mended by ftfy, in Unicode form NFKC.

    Raises:
        UserError: nothing is left to score, ftfy is missing, or there is no end-of-text token.
    """
    head, tail = tokenizer.encode_batch([clean(context), clean(continuation)], allow_special=True)
    head = [end_of_text(tokenizer), *head]
    room = n_ctx - len(tail)
    if room < 1:
        raise UserError(
            f"the continuation has {len(tail)} tokens, and with the original's rules the context of {n_ctx} holds "
            f"{n_ctx - 1} and one before them; leave --legacy-prompts out, or shorten it"
        )
    return _checked(Pair(head[-room:], tail), context, continuation)


def clean(text: str) -> str:
    """Text as the original cleaned it. Raises UserError if ftfy is missing."""
    return fix_text(text)


def start_of_text(tokenizer: Tokenizer) -> int:
    """The id that stands before a text. Raises UserError if there is none."""
    return end_of_text(tokenizer) if tokenizer.start is None else tokenizer.start


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that stands between texts. Raises UserError if there is none."""
    if tokenizer.end_of_text is None:
        raise UserError(
            f"the tokenizer {tokenizer.name} has no end-of-text token to stand before a text that nothing precedes"
        )
    return tokenizer.end_of_text


def _checked(pair: Pair, context: str, continuation: str) -> Pair:
    if not pair.continuation:
        raise UserError(
            f"after the context {_shown(context)} the continuation {_shown(continuation)} has no token of its own; "
            "expected text to score"
        )
    return pair


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"...{text[-60:]}")
