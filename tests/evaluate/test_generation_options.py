"""The harness' generation options as this project's."""

from __future__ import annotations

from typing import Any

import pytest

from mesh_transformer.config.errors import UserError
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.evaluate.generation import sampling_options
from mesh_transformer.sample.options import SamplingOptions

END = "<|endoftext|>"


def options(given: dict[str, Any], n_ctx: int = 512) -> SamplingOptions:
    return sampling_options(given, load_tokenizer("bytes"), n_ctx, seed=3, sample=1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_tokens": 256, "temperature": 0.0, "stop": (END,)}),
        ({"until": "x", "max_gen_toks": 5}, {"max_tokens": 5, "temperature": 0.0, "stop": ("x", END)}),
        ({"until": ["x", "", "y", "x"]}, {"max_tokens": 256, "temperature": 0.0, "stop": ("x", "y", END)}),
        ({"max_new_tokens": 7, "max_tokens": 9}, {"max_tokens": 7, "temperature": 0.0, "stop": (END,)}),
        ({"do_sample": False, "temperature": 0.7}, {"max_tokens": 256, "temperature": 0.0, "stop": (END,)}),
        ({"temperature": 0.7}, {"max_tokens": 256, "temperature": 0.7, "stop": (END,)}),
        ({"do_sample": True}, {"max_tokens": 256, "temperature": 1.0, "stop": (END,)}),
        (
            {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1},
            {"max_tokens": 256, "temperature": 0.5, "stop": (END,), "top_p": 0.9, "top_k": 4, "min_p": 0.1},
        ),
    ],
)
def test_options(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert options(given) == SamplingOptions(seed=3, sample=1, **expected)


def test_the_request_is_left_as_it_was() -> None:
    given = {"until": ["x"], "max_gen_toks": 5}
    options(given)
    assert given == {"until": ["x"], "max_gen_toks": 5}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, r"generation option num_beams = 4 is not supported; expected until, do_sample"),
        (
            {"max_gen_toks": 512},
            r"max_gen_toks = 512 leaves no room for a prompt in a context of 512; expected 1 to 511",
        ),
        ({"max_gen_toks": 0}, r"max_gen_toks = 0 leaves no room"),
        ({"top_p": 2, "do_sample": True}, r"top_p = 2\.0 is out of range"),
        ({"temperature": "warm"}, r"generation option temperature = 'warm': expected a number"),
    ],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options(given)
