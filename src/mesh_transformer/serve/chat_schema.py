"""The fields of chat requests and answers, as `schema` has those of the others."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from mesh_transformer.data.chat import SHOWN
from mesh_transformer.engine.request import MOST_ALTERNATIVES
from mesh_transformer.serve.schema import MOST_TOKENS, SamplingFields, Usage

ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys of a message beside role and content that a template may look at, and those that an answer of this protocol
# has and that say nothing when they are null.
_PASSED_ON = ("name", "tool_calls", "tool_call_id", "reasoning_content")
_NULL = ("refusal", "audio", "annotations", "function_call")


def _messages(value: Any) -> Any:
    """Messages as a template takes them: texts whole, and no keys that say nothing."""
    if type(value) is not list or not value:
        raise ValueError("not messages")
    return [_message(message) for message in value]


def _message(value: Any) -> dict[str, Any]:
    if type(value) is not dict or value.get("role") not in ROLES:
        raise ValueError("not a message")
    if any(value[key] is not None and (key, value[key]) != ("annotations", []) for key in _NULL if key in value):
        raise ValueError("not null")
    if set(value) - {"role", "content", *_PASSED_ON, *_NULL}:
        raise ValueError("an unknown key")
    content, calls = value.get("content"), value.get("tool_calls")
    if content is None and not (value["role"] == "assistant" and calls):
        raise ValueError("no content")
    found: dict[str, Any] = {"role": value["role"]}
    if "content" in value:  # a null is shown as what it is: templates ask for it
        found["content"] = None if content is None else _content(content)
    for key in _PASSED_ON:
        if value.get(key) is not None:
            found[key] = [_call(call) for call in _list(value[key])] if key == "tool_calls" else _text(value[key])
    return found


def _content(value: Any) -> str:
    """A text, or the texts of a list of parts, one a line."""
    if type(value) is str:
        return value
    parts = _list(value)
    if not all(type(part) is dict and set(part) == {"type", "text"} and part["type"] == "text" for part in parts):
        raise ValueError("not parts of text")
    return "\n".join(_text(part["text"]) for part in parts)


def _call(value: Any) -> dict[str, Any]:
    if type(value) is not dict or type(value.get("function")) is not dict:
        raise ValueError("not a tool call")
    if type(_arguments(value["function"])) is not dict:
        raise ValueError("no arguments")
    return value


def _arguments(function: dict[str, Any]) -> Any:
    """The arguments of a call, which OpenAI's protocol has as JSON text."""
    given = function.get("arguments", {})
    try:
        return json.loads(given, parse_constant=_no_constant) if type(given) is str else given
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages with the arguments of their tool calls as objects, which most templates take."""

    def call(given: dict[str, Any]) -> dict[str, Any]:
        function = given["function"]
        changed = {"arguments": _arguments(function)} if "arguments" in function else {}
        return {**given, "function": {**function, **changed}}

    def whole(message: dict[str, Any]) -> dict[str, Any]:
        return message | {"tool_calls": [call(each) for each in message["tool_calls"]]}

    return [whole(message) if "tool_calls" in message else message for message in messages]


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError("not a list")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("not a text")
    return value


def _tools(value: Any) -> Any:
    if value is None:
        return None
    if not all(type(tool) is dict and tool.get("type") == "function" for tool in _list(value)):
        raise ValueError("not tools")
    return value or None


def _object(value: Any) -> Any:
    if value is not None and type(value) is not dict:
        raise ValueError("not an object")
    return value or {}


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CALL_SCHEMA = {
    "type": "object",
    "properties": {
        "function": {"type": "object", "properties": {"arguments": {"anyOf": [{"type": "object"}, {"type": "string"}]}}}
    },
    "required": ["function"],
}
_TEXT_SCHEMA = {"type": ["string", "null"]}
_MESSAGE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}, {"type": "null"}]},
        "name": _TEXT_SCHEMA,
        "tool_call_id": _TEXT_SCHEMA,
        "reasoning_content": _TEXT_SCHEMA,
        "tool_calls": {"anyOf": [{"type": "array", "items": _CALL_SCHEMA}, {"type": "null"}]},
        **{key: {"type": "null"} for key in _NULL},
        "annotations": {"anyOf": [{"type": "array", "maxItems": 0}, {"type": "null"}]},
    },
    "required": ["role"],
    "additionalProperties": False,
}
_MESSAGES_SCHEMA = {"type": "array", "minItems": 1, "items": _MESSAGE_SCHEMA}
_TOOL_SCHEMA = {"type": "object", "properties": {"type": {"const": "function"}}, "required": ["type"]}
_TOOLS_SCHEMA = {"anyOf": [{"type": "array", "items": _TOOL_SCHEMA}, {"type": "null"}]}
_NAMES_SCHEMA = {"not": {"enum": list(SHOWN)}}
_OBJECT_SCHEMA = {"anyOf": [{"type": "object", "propertyNames": _NAMES_SCHEMA}, {"type": "null"}]}
_FORMAT_SCHEMA = {"anyOf": [{"const": {"type": "text"}}, {"type": "null"}]}


def _format(value: Any) -> Any:
    if value not in (None, {"type": "text"}):
        raise ValueError("not text")
    return value


Messages = Annotated[Any, BeforeValidator(_messages), WithJsonSchema(_MESSAGES_SCHEMA)]
Tools = Annotated[Any, BeforeValidator(_tools), WithJsonSchema(_TOOLS_SCHEMA)]
Variables = Annotated[Any, BeforeValidator(_object), WithJsonSchema(_OBJECT_SCHEMA)]
Format = Annotated[Any, BeforeValidator(_format), WithJsonSchema(_FORMAT_SCHEMA)]


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    messages: Messages = Field(
        description='a list of objects such as {"role": "user", "content": "Hello"}; role is '
        f"{', '.join(ROLES[:-1])} or {ROLES[-1]}, content a string or a list of parts of type text, the arguments of a "
        "tool call an object or its JSON text"
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        le=MOST_TOKENS,
        description="a whole number of at least 1, the most tokens to write (default: what the context has left)",
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MOST_TOKENS, description="a whole number of at least 1; the newer name of max_tokens"
    )
    logprobs: bool | None = Field(None, description="true or false: whether log-probabilities are told (default false)")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MOST_ALTERNATIVES,
        description=f"a whole number from 0 to {MOST_ALTERNATIVES}, together with logprobs",
    )
    tools: Tools = Field(None, description='a list of objects such as {"type": "function", "function": {...}}')
    tool_choice: Literal["none", "auto"] | None = Field(
        None, description='"auto" or "none": an answer is text, in which the model may write a call'
    )
    parallel_tool_calls: bool | None = Field(None, description="true or false; it has no effect")
    response_format: Format = Field(None, description='{"type": "text"}: answers are not held to another form')
    chat_template_kwargs: Variables = Field(
        None, validate_default=True, description="an object of variables of the model's own chat template"
    )


class TokenAlternative(BaseModel):
    """A token and its log-probability under the model itself; bytes of UTF-8, null for one without a text."""

    token: str
    logprob: float | None
    bytes: list[int] | None


class ChatToken(TokenAlternative):
    """A token of the answer, and the likeliest ones at its place."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the answer's tokens."""

    content: list[ChatToken]
    refusal: None = None


class ChatMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatDelta(BaseModel):
    """What an event adds to an answer; the role comes first."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(BaseModel):
    """Of its stream every event but the last ("[DONE]")."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
