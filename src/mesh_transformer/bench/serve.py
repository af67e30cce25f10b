"""`bench serve`: many texts of mixed lengths through the engine behind `serve`, and through peers' batches."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mesh_transformer.bench.contenders import facts, ours, peers, ratios, with_weights
from mesh_transformer.bench.export import exported
from mesh_transformer.bench.rounds import spread, take_turns
from mesh_transformer.bench.work import texts as wanted_texts
from mesh_transformer.config.errors import RunError, UserError
from mesh_transformer.config.model import ModelConfig

PEERS = ("hf", "ctranslate2")


def bench_serve(
    model: ModelConfig | str,
    *,
    texts: int,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    max_batch: int,
    precisions: Sequence[str],
    against: Sequence[str],
    rounds: int,
    warmup: int,
    progress: Callable[[str], None],
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Every contender writes all texts, one contender after the other, round by round; JSON-serialisable.

    All texts are there from the beginning. Tokens a second are those that were asked for, over the time until the
    last text is done. A text's first token is seen when its contender can show it: ours at the step that writes it,
    CTranslate2 in its callback, Hugging Face, which streams no batches, with its whole batch.

    Args:
        model: an architecture, whose weights are random then, or where a model lies.
        prompt_tokens, output_tokens: smallest and largest of a text.
        max_batch: texts computed together, by everybody.
        options: of `convert`, where `model` is a path.

    Raises:
        UserError: a peer or a precision is not known, a peer is not installed, or the lengths do not fit the context.
        RunError: a contender or a converter failed.
    """
    mine, theirs = ours(precisions), peers(against, PEERS)
    work = {"texts": texts, "prompt_tokens": list(prompt_tokens), "output_tokens": list(output_tokens)}
    work["max_batch"] = max_batch
    with exported(model, ctranslate2="ctranslate2" in against, progress=progress, options=options) as found:
        cfg = found.cfg
        if prompt_tokens[1] + output_tokens[1] > cfg.n_ctx:
            raise UserError(
                f"--prompt-tokens up to {prompt_tokens[1]} and --output-tokens up to {output_tokens[1]} do not fit the "
                f"model's context of {cfg.n_ctx} together; give smaller ones"
            )
        common = {"kind": "serve", "threads": os.cpu_count() or 1, "n_vocab": cfg.n_vocab, **work}
        specs = with_weights({**mine, **theirs}, found, common)
        descriptions, answers = take_turns(specs, rounds, warmup, progress)
    asked = sum(text.n_tokens for text in wanted_texts(common, 0))
    for name, turns in answers.items():
        if wrong := [turn["written"] for turn in turns if turn["written"] != asked or len(turn["firsts"]) != texts]:
            raise RunError(f"contender {name} wrote {wrong[0]} tokens of the {asked} that were asked for")
    how: dict[str, Any] = {"precisions": precisions, "against": against, "rounds": rounds, "warmup": warmup}
    return {
        **facts("serve", cfg, random=isinstance(model, ModelConfig), **how),
        "threads": common["threads"],
        **work,
        "contenders": {
            name: _figures(turns) | {"precision": specs[name]["precision"], "described": descriptions[name]}
            for name, turns in answers.items()
        },
        "ratios": ratios(answers, mine, theirs),
    }


def _figures(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of a turn; tokens a second; seconds from the beginning to a text's first token, of all rounds."""
    firsts = [second for turn in turns for second in turn["firsts"]]
    return {
        "seconds": spread([turn["whole"] for turn in turns]),
        "tokens_per_second": spread([turn["written"] / turn["whole"] for turn in turns]),
        "first_token_seconds": {"median": statistics.median(firsts), "max": max(firsts)},
    }
