"""What /openapi.json says beyond what FastAPI finds out: bodies that the handlers read themselves, errors, the key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mesh_transformer.serve import chat_schema, schema

_REF = "#/components/schemas/{model}"
_REQUESTS = (
    *(schema.CompletionRequest, chat_schema.ChatRequest, schema.CompleteRequest, schema.PredictRequest),
    schema.GetPredictionRequest,
)
_EVENT = {
    "type": "object",
    "description": "One server-sent event; data is a Completion as JSON (of a chat: an object of the kind "
    "chat.completion.chunk), an ErrorAnswer, or [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_WHY = {
    400: "A field, or the body, is wrong.",
    401: "The API key is missing or wrong.",
    404: "Not known here.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "The model failed on this request.",
    503: "The server is shutting down.",
    504: "The answer was not done in time.",
}


def documented(
    request: type[BaseModel] | None, answer: type[BaseModel], *statuses: int, stream: bool = False, path: str = ""
) -> Any:
    """The options of a route that describe its body, its answer and its errors.

    Args:
        statuses: of errors, beside those that every route with a body has.
        stream: whether the answer may be server-sent events.
        path: a string that is a part of the path.
    """
    errors = [400, 408, 413, 429, 500, 503, 504, *statuses] if request else [*statuses]
    errors += [404, 415] if stream else []
    responses: dict[int | str, Any] = {
        status: {"model": schema.ErrorAnswer, "description": _WHY[status]} for status in sorted(errors)
    }
    responses[200] = {"model": answer}
    if stream:
        responses[200]["content"] = {"text/event-stream": {"schema": _EVENT}}
    # The handlers answer by themselves; nothing is to be converted.
    options: dict[str, Any] = {"response_model": None, "responses": responses}
    if request is not None:
        content = {"application/json": {"schema": {"$ref": _REF.format(model=request.__name__)}}}
        options["openapi_extra"] = {"requestBody": {"content": content, "required": True}}
    if path:
        # Declared to FastAPI, it would announce an error of its own shape.
        parameter = {"name": path, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        options["openapi_extra"] = {"parameters": [parameter]}
    return options


def describe(api: FastAPI, *, key: bool) -> None:
    """Replaces the description that FastAPI makes by one that holds everything; `key` where one is asked for."""

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            found = get_openapi(title=api.title, version=api.version, routes=api.routes)
            modes: Any = [(model, "validation") for model in _REQUESTS]
            _, requests = models_json_schema(modes, ref_template=_REF)
            components = found.setdefault("components", {})
            components.setdefault("schemas", {}).update(requests["$defs"])
            if key:
                _add_key(found)
            api.openapi_schema = found
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


def _add_key(found: dict[str, Any]) -> None:
    found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    content = {"application/json": {"schema": {"$ref": _REF.format(model="ErrorAnswer")}}}
    for path, operations in found["paths"].items():
        if path != "/health":
            for operation in operations.values():
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = {"description": _WHY[401], "content": content}
