"""Whether a request can be served, found out before anything is computed for it."""

from __future__ import annotations

from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.engine.request import MOST_ALTERNATIVES, Request


def checked_prompt(
    request: Request, cfg: ModelConfig, tokenizer: Tokenizer | None, *, longest: int | None
) -> list[int]:
    """The prompt that stands for a request's, which is not empty.

    Args:
        longest: tokens that a text may have, prompt included; None: it ends by itself where the context does.

    Raises:
        UserError: a prompt is empty without an end-of-text token to start from, longer than the context, or holds ids
            outside the vocabulary; more tokens are asked for than a text may have; there are stop strings but no
            tokenizer; an option has another value than it may.
    """
    prompt, options = list(request.prompt), request.options
    if not prompt:
        if tokenizer is None or tokenizer.start is None:
            raise UserError("the prompt is empty and this model has no end-of-text token to start from")
        prompt = [tokenizer.start]
    if len(prompt) > cfg.n_ctx:
        raise UserError(
            f"the prompt has {len(prompt)} tokens but the model's context holds {cfg.n_ctx}; "
            f"shorten it by {len(prompt) - cfg.n_ctx}"
        )
    outside = [t for t in [*prompt, *(t for t, _ in options.logit_bias)] if not 0 <= t < cfg.n_vocab]
    if outside:
        raise UserError(f"token id {outside[0]} is outside the model's vocabulary of {cfg.n_vocab} ids")
    if tokenizer is None and options.stop:
        raise UserError("stop strings are found in text, and this model has no tokenizer; give one, or leave them out")
    if longest is not None and len(prompt) + options.max_tokens > longest:
        raise UserError(
            f"max_tokens = {options.max_tokens} after a prompt of {len(prompt)} tokens is more than the "
            f"{longest} tokens that a text may have here; ask for at most {longest - len(prompt)}"
        )
    if request.logprobs is not None and not 0 <= request.logprobs <= MOST_ALTERNATIVES:
        raise UserError(f"logprobs = {request.logprobs} is out of range: at least 0 and at most {MOST_ALTERNATIVES}")
    if request.prompt_logprobs and request.logprobs is None:
        raise UserError("prompt_logprobs needs logprobs: the number of alternatives, 0 for none")
    return prompt
