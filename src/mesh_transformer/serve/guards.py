"""What stands before every handler, as plain ASGI: figures, other origins, the key, and clients that do not read."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mesh_transformer.serve.errors import ApiError
from mesh_transformer.serve.page import is_page
from mesh_transformer.serve.served import Served

# Any page of any origin may use these, as it could the original's.
_OPEN_TO_ALL = ("/complete", "/model/")
_SECONDS_TO_REMEMBER = "600"
_Header = tuple[str, str]


class Observe:
    """Counts requests by endpoint and status, and takes their time. An answer never begun counts as 499."""

    def __init__(self, app: ASGIApp, served: Served, endpoints: Iterable[str]) -> None:
        self._app, self._metrics, self._endpoints = app, served.metrics, frozenset(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            endpoint = self._endpoint(scope["path"])
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.request_seconds.labels(endpoint).observe(time.monotonic() - begun)

    def _endpoint(self, path: str) -> str:
        # Few and fixed: whatever a client can invent would become a time series.
        if path in self._endpoints:
            return path
        return next((p for p in ("/v1/models/", "/page/") if path.startswith(p)), "other")


class WriteTimeout:
    """Gives up an answer that its client does not take; whatever makes it is ended, and the connection closed."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app, self._served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""

        async def bounded(message: Message) -> None:
            try:
                async with asyncio.timeout(self._served.options.write_timeout):
                    await send(message)
            except TimeoutError:
                raise _SlowReader from None

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, bounded)
        except _SlowReader:
            self._served.metrics.slow.inc()


class _SlowReader(Exception):
    pass


class Cors:
    """Headers for pages of other origins: all of them at the original's endpoints, those allowed at /v1/*.

    Preflights are answered here, since they carry no key.
    """

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app, self._allowed = app, served.options.allow_origins
        # With a key, Authorization must be named: "*" does not cover it.
        self._open_headers = "*" if served.options.api_key is None else "*, Authorization"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        origin = Headers(scope=scope).get("origin")
        headers = self._headers(scope["path"], origin)
        allowed = any(name == "Access-Control-Allow-Origin" for name, _ in headers)
        if scope["method"] == "OPTIONS" and allowed:
            await Response(headers=dict([*headers, *self._preflight(scope["path"])]))(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                for name, value in headers:
                    found.append(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)

    def _headers(self, path: str, origin: str | None) -> list[_Header]:
        if path.startswith(_OPEN_TO_ALL) or (path.startswith("/v1/") and "*" in self._allowed):
            return [("Access-Control-Allow-Origin", "*")]
        if path.startswith("/v1/") and self._allowed:
            vary = ("Vary", "Origin")
            return [("Access-Control-Allow-Origin", origin), vary] if origin in self._allowed and origin else [vary]
        return []

    def _preflight(self, path: str) -> list[_Header]:
        remembered = ("Access-Control-Max-Age", _SECONDS_TO_REMEMBER)
        if path.startswith(_OPEN_TO_ALL):
            return [
                ("Access-Control-Allow-Headers", self._open_headers),
                ("Access-Control-Allow-Methods", "*"),
                remembered,
            ]
        return [
            ("Access-Control-Allow-Headers", "Authorization, Content-Type"),
            ("Access-Control-Allow-Methods", "GET, POST"),
            remembered,
        ]


class ApiKey:
    """Asks for the key, everywhere but at /health and the page's own files."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app, self._key = app, served.options.api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        path = scope.get("path", "")
        if scope["type"] != "http" or self._key is None or path == "/health" or is_page(path):
            await self._app(scope, receive, send)
            return
        try:
            self._check(Headers(scope=scope).get("authorization"))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, given: str | None) -> None:
        assert self._key is not None
        scheme, _, key = (given or "").partition(" ")
        # Compared in a time that does not tell how much of it was right.
        right = hmac.compare_digest(key.strip().encode(), self._key.encode())
        if scheme.lower() == "bearer" and right:
            return
        what = "no API key was given" if given is None else "the API key is wrong"
        raise ApiError(
            401,
            f"{what}; expected the header Authorization: Bearer KEY",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
