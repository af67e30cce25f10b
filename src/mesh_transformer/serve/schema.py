"""The fields of requests and answers, declared once: what is checked, what errors say, what /openapi.json shows.

A field's description is written to follow the word "expected".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from mesh_transformer.engine.request import MOST_ALTERNATIVES
from mesh_transformer.sample.options import MOST_BIASES

MOST_STOPS = 16
# Looking for a stop string costs its length at every token.
LONGEST_STOP = 1000
# Of the original's protocols, which set no bound; here nearly every token is as likely as any other.
HOTTEST = 100
MOST_TOKENS = 2**31 - 1


class Strict(BaseModel):
    """Unknown fields are refused, and so are values of another type, "5" for 5 and true for 1 among them."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


# ---------------------------------------------------------------------------------------------------------- requests


def _prompt(value: Any) -> Any:
    # By hand: a union of list types would try each on all of a long list, and report every item.
    if value is None or type(value) is str:
        return value
    if type(value) is list:
        if all(type(item) is int for item in value) or all(type(item) is str for item in value):
            return value
        if all(type(item) is list and all(type(token) is int for token in item) for item in value):
            return value
    raise ValueError("not a prompt")


def _stop(value: Any) -> Any:
    several = value if type(value) is list else [] if value is None else [value]
    if len(several) > MOST_STOPS or not all(type(s) is str and 0 < len(s) <= LONGEST_STOP for s in several):
        raise ValueError("not stop strings")
    return several


def _logit_bias(value: Any) -> Any:
    if value is None:
        return {}
    if type(value) is not dict or len(value) > MOST_BIASES:
        raise ValueError("not a map of biases")
    found = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and key == str(int(key))):
            raise ValueError("not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError("not a bias")
        found[int(key)] = float(bias)
    return found


def _integer(value: Any) -> Any:
    if value is not None and (type(value) is not int or not -(2**63) <= value < 2**63):
        raise ValueError("not a 64-bit integer")
    return value


def _number(value: Any) -> Any:
    # An integer of hundreds of digits is valid JSON, and no float.
    if type(value) is int and abs(value) > 2**53:
        raise ValueError("out of range")
    return value


_STRINGS = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        _TOKENS,
        {"type": "array", "items": _TOKENS},
        {"type": "null"},
    ]
}
_STOP_SCHEMA = {
    "anyOf": [_STRINGS, {"type": "array", "items": _STRINGS, "maxItems": MOST_STOPS}, {"type": "null"}],
}
_BIAS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
            "maxProperties": MOST_BIASES,
        },
        {"type": "null"},
    ]
}
_SEED_SCHEMA = {"anyOf": [{"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, {"type": "null"}]}

Number = Annotated[float, BeforeValidator(_number)]
Prompt = Annotated[Any, BeforeValidator(_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
Stop = Annotated[Any, BeforeValidator(_stop), WithJsonSchema(_STOP_SCHEMA)]
LogitBias = Annotated[Any, BeforeValidator(_logit_bias), WithJsonSchema(_BIAS_SCHEMA)]
Seed = Annotated[Any, BeforeValidator(_integer), WithJsonSchema(_SEED_SCHEMA)]


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = Field(
        None, description="true for a last chunk with the counts of tokens and no choices, or false"
    )
    include_obfuscation: Literal[False] | None = Field(
        None, description="false: chunks are never padded to hide the lengths of tokens"
    )


class SamplingFields(Strict):
    """What every request for texts may say: OpenAI's fields, and top_k, min_p, min_tokens and ignore_eos."""

    model: str | None = Field(None, description="the name of the served model, a string")
    temperature: Number | None = Field(
        None, ge=0, le=2, description="a number from 0 to 2; 0 always takes the likeliest token (default 1)"
    )
    top_p: Number | None = Field(None, ge=0, le=1, description="a number from 0 to 1 (default 1)")
    n: int | None = Field(
        None, ge=1, le=MOST_TOKENS, description="a whole number of at least 1, completions of each prompt (default 1)"
    )
    stream: bool | None = Field(None, description="true or false (default false)")
    stream_options: StreamOptions | None = Field(
        None, description='an object such as {"include_usage": true}, together with stream'
    )
    stop: Stop = Field(
        None,
        validate_default=True,
        description=f"a string or a list of up to {MOST_STOPS} strings, none empty or longer than {LONGEST_STOP:,} "
        "characters",
    )
    presence_penalty: Number | None = Field(None, ge=-2, le=2, description="a number from -2 to 2 (default 0)")
    frequency_penalty: Number | None = Field(None, ge=-2, le=2, description="a number from -2 to 2 (default 0)")
    logit_bias: LogitBias = Field(
        None,
        validate_default=True,
        description='an object of up to 300 token ids and numbers from -100 to 100, such as {"50256": -100}',
    )
    seed: Seed = Field(None, description="a whole number of 64 bits; the same seed and request give the same answer")
    user: str | None = Field(None, description="a string; it has no effect")
    top_k: int | None = Field(
        None, ge=0, le=MOST_TOKENS, description="a whole number of at least 0, 0 for no limit (default 0)"
    )
    min_p: Number | None = Field(None, ge=0, le=1, description="a number from 0 to 1 (default 0)")
    min_tokens: int | None = Field(
        None, ge=0, le=MOST_TOKENS, description="a whole number of at least 0, tokens before end-of-text may come"
    )
    ignore_eos: bool | None = Field(
        None, description="true or false: whether to go on past end-of-text (default false)"
    )


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    prompt: Prompt = Field(
        None,
        description="a string, a list of strings, a list of token ids, or a list of lists of token ids; "
        "without it, or empty, the text begins at end-of-text",
    )
    max_tokens: int | None = Field(
        None, ge=0, le=MOST_TOKENS, description="a whole number of at least 0, the most tokens to write (default 16)"
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MOST_ALTERNATIVES,
        description=f"a whole number from 0 to {MOST_ALTERNATIVES}, alternatives reported beside each token",
    )
    echo: bool | None = Field(
        None, description="true or false: whether the answer begins with the prompt (default false)"
    )
    best_of: int | None = Field(
        None,
        description="null or the value of n: choosing among more completions than are returned is not offered",
    )
    suffix: None = Field(None, description="null: text after the completion is not taken into account")


class CompleteRequest(Strict):
    """The body of POST /complete."""

    context: str = Field(description="a string, the text to go on from")
    top_p: Number = Field(ge=0, le=1, description="a number from 0 to 1")
    temp: Number = Field(
        ge=0, le=HOTTEST, description=f"a number from 0 to {HOTTEST}; 0 always takes the likeliest token"
    )


class PredictRequest(Strict):
    """The body of POST /model/predict."""

    context: str = Field(description="a string, the text to go on from")
    temp: Number | None = Field(
        None,
        ge=0,
        le=HOTTEST,
        description=f"a number from 0 to {HOTTEST}; 0 always takes the likeliest token (default 1)",
    )
    top_p: Number | None = Field(None, ge=0, le=1, description="a number from 0 to 1 (default 0.9)")
    top_k: int | None = Field(
        None, ge=0, le=MOST_TOKENS, description="a whole number of at least 0, 0 for no limit (default 50)"
    )
    length: int | None = Field(
        None, ge=0, le=MOST_TOKENS, description="a whole number of at least 0, the tokens to write (default 256)"
    )


class GetPredictionRequest(Strict):
    """The body of POST /model/get_prediction."""

    qid: int = Field(ge=1, le=2**63 - 1, description="a whole number of at least 1, as /model/predict answered it")


# ----------------------------------------------------------------------------------------------------------- answers


class Logprobs(BaseModel):
    """Log-probabilities (natural logarithm) under the model itself, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of a text")
    top_logprobs: list[dict[str, float] | None] = Field(description="the likeliest tokens, and the token itself")
    text_offset: list[int] = Field(description="where each token begins in the choice's text, in code points")


class Choice(BaseModel):
    """One completion, or a piece of one."""

    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class PromptTokensDetails(BaseModel):
    """Of the prompts' tokens."""

    cached_tokens: int = Field(description="taken over from earlier requests with the same prefix")


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Completion(BaseModel):
    """The answer of /v1/completions, and of its stream every event but the last ("[DONE]")."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer with an error status."""

    error: ErrorObject


class ModelCard(BaseModel):
    """The served model. max_model_len: tokens of its context."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """The served models: one."""

    object: Literal["list"]
    data: list[ModelCard]


class CompleteAnswer(BaseModel):
    """The answer of /complete."""

    completion: str


class PredictAnswer(BaseModel):
    """The answer of /model/predict."""

    qid: int


class Prediction(BaseModel):
    """The answer of /model/get_prediction. time: seconds from asking to done."""

    context: str
    completion: str
    time: float


class Health(BaseModel):
    """The answer of /health."""

    status: Literal["ok", "warming up", "shutting down"]
