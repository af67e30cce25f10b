"""From the bytes of a request to a JSON object: bounded in size and time, and strict."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from mesh_transformer.serve.errors import ApiError, ClientGone, bad_request
from mesh_transformer.serve.options import ServeOptions

# A body that is too large is read to this size and thrown away: closing at once would reset the connection, and most
# clients would never see the answer that says why.
_MOST_DISCARDED = 32 << 20


async def read_body(request: Request, options: ServeOptions) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 413 more than `max_body_bytes`, 408 not there after `body_timeout`.
        ClientGone: the connection was closed before its end.
    """
    try:
        async with asyncio.timeout(options.body_timeout):
            return await _read(request, options.max_body_bytes)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {options.body_timeout:g} seconds; send it faster",
            code="body_timeout",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ClientGone from None


async def _read(request: Request, most: int) -> bytes:
    announced = request.headers.get("content-length", "")
    too_large = announced.isdecimal() and int(announced) > most
    if too_large and "expect" in request.headers:
        # The client waits to be told to send; it is told not to.
        _refuse_size(most)
    size, parts = 0, []
    async for part in request.stream():
        size += len(part)
        too_large = too_large or size > most
        if not too_large:
            parts.append(part)
        elif size > _MOST_DISCARDED:
            break
    if too_large:
        _refuse_size(most)
    return b"".join(parts)


def _refuse_size(most: int) -> NoReturn:
    message = f"the body is larger than {most:,} bytes, which is the most that this server reads; send less"
    raise ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: 400; not UTF-8, not JSON, a key twice, NaN or an infinity, half of a surrogate pair, or no object.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(
            f"the body is not UTF-8: byte 0x{body[error.start]:02x} at position {error.start} "
            "does not belong there; send JSON in UTF-8"
        ) from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise bad_request("the body is nested too deeply; no field of this server needs so many levels") from None
    except ValueError as error:  # JSONDecodeError, and numbers of thousands of digits
        raise bad_request(f"the body is not JSON ({error}); expected an object such as {{}}") from None
    if not isinstance(value, dict):
        names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
        raise bad_request(f"the body is {names.get(type(value), 'a number')}; expected a JSON object")
    if b"\\ud" in body or b"\\uD" in body:
        _refuse_half_pairs(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise bad_request(f"the field {json.dumps(key)} is given twice; give it once", param=key)
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise bad_request(f"the body holds {name}, which is not JSON; expected finite numbers")


def _refuse_half_pairs(value: dict[str, Any]) -> None:
    for field, content in value.items():
        try:
            json.dumps([field, content], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            name = json.dumps(field)[1:-1]
            message = f"{name} holds {half}, half of a surrogate pair, which is no character; remove or replace it"
            raise bad_request(message, param=name) from None
