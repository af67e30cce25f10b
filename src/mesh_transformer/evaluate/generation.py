"""The options of a `generate_until` request as this project's: names as in lm-evaluation-harness and Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh_transformer.config.errors import UserError
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.sample.options import SamplingOptions

_DEFAULT_TOKENS = 256  # as the harness' `hf` model
# Their names for the number of tokens, the first one given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_PASSED_ON: dict[str, type[int] | type[float]] = {"top_p": float, "top_k": int, "min_p": float}


def sampling_options(
    given: Mapping[str, Any], tokenizer: Tokenizer, n_ctx: int, *, seed: int, sample: int
) -> SamplingOptions:
    """Greedy unless `do_sample` or a temperature says otherwise; end-of-text always ends a text.

    Args:
        given: until (one stop string or several), max_gen_toks, do_sample, temperature, top_p, top_k, min_p.
        sample: number of this completion among those of the same prompt.

    Raises:
        UserError: another option is given, a value is impossible, or no room is left for a prompt.
    """
    rest = dict(given)
    lengths = {name: rest.pop(name, None) for name in _LENGTHS}
    length = next((name for name, n in lengths.items() if n is not None), None)
    n_tokens = _DEFAULT_TOKENS if length is None else int(_number(length, lengths[length], int))
    until = rest.pop("until", None) or []
    stops = [until] if isinstance(until, str) else list(until)
    do_sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    heat = None if temperature is None else _number("temperature", temperature, float)
    passed: dict[str, Any] = {
        name: _number(name, rest.pop(name), kind) for name, kind in _PASSED_ON.items() if rest.get(name) is not None
    }
    others = [name for name, value in rest.items() if value is not None]
    if others:
        raise UserError(
            f"generation option {others[0]} = {rest[others[0]]!r} is not supported; expected until, do_sample, "
            f"temperature, {', '.join(_PASSED_ON)} or {_LENGTHS[0]}"
        )
    if not 0 < n_tokens < n_ctx:
        raise UserError(
            f"max_gen_toks = {n_tokens} leaves no room for a prompt in a context of {n_ctx}; expected 1 to {n_ctx - 1} "
            f"(--gen_kwargs max_gen_toks={max(1, n_ctx // 2)})"
        )
    if do_sample is None:
        heat = heat or 0.0
    else:
        heat = (1.0 if heat is None else heat) if do_sample else 0.0
    if tokenizer.end_of_text is not None:  # its name in the text ends it too
        stops.append(tokenizer.decode([tokenizer.end_of_text]))
    return SamplingOptions(
        max_tokens=n_tokens,
        temperature=heat,
        seed=seed,
        sample=sample,
        stop=tuple(dict.fromkeys(stop for stop in stops if stop)),
        **passed,
    )


def _number(name: str, value: Any, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"generation option {name} = {value!r}: expected a number") from error
