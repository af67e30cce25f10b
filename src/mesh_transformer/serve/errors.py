"""Errors as clients of OpenAI's protocol expect them: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response


class ApiError(Exception):
    """A request that ends with an error status.

    Attributes:
        status: of HTTP.
        message: what was given, what was expected, how to mend it.
        kind: "invalid_request_error", "authentication_error", "rate_limit_error" or "server_error".
        param: the field that is wrong, if it is one.
        code: a word for programs, if there is one.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer. Written in ASCII, since a message may quote half of a surrogate pair."""
        content = json.dumps(self.body()).encode()
        return Response(content, self.status, media_type="application/json", headers=self.headers)


class ClientGone(Exception):
    """The client has closed its connection; there is nobody to answer."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, param=param, code=code)


def shown(value: object, length: int = 60) -> str:
    """A value that a client sent, as it would write it, shortened."""
    text = json.dumps(value)
    return text if len(text) <= length else text[:length] + "..."


def shutting_down() -> ApiError:
    """503."""
    return ApiError(
        503,
        "the server is shutting down; ask it again in a while",
        kind="server_error",
        code="shutting_down",
        headers={"Retry-After": "5"},
    )
