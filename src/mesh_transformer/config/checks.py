"""Checks of single values; every message names the key, the value, what is allowed and the nearest mend."""

from __future__ import annotations

import datetime
import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mesh_transformer.config.errors import ConfigError

# Step and sequence counters are 32-bit integers on the device.
MAX_COUNT = 2**31 - 1
# A random key is made from 32 bits.
MAX_SEED = 2**32 - 1

_TYPE_NAMES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (str, "string"),
    (dict, "table"),
    ((list, tuple), "array"),
    ((datetime.date, datetime.time), "date or time"),
    (type(None), "null"),
)
EXAMPLES = {"boolean": "true", "integer": "8", "number": "1.2e-4", "string": '"text"'}


def type_name(value: object) -> str:
    """What a configuration file calls the type of `value`."""
    return next((name for kind, name in _TYPE_NAMES if isinstance(value, kind)), type(value).__name__)


def shown(value: object) -> str:
    """`value` on one line as a configuration file would write it, cut after about 80 characters."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        # A lone surrogate cannot be printed.
        text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    elif isinstance(value, int) and value.bit_length() > 256:
        text = f"an integer of {value.bit_length()} bits"  # Python refuses to print the longest ones
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def dotted(*parts: str) -> str:
    """A full key such as `data.validation.pile`; a part that is no bare TOML key is quoted."""
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else shown(part) for part in parts)


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known word that looks most like `given`, if any looks like it."""
    return next(iter(difflib.get_close_matches(given, list(known), n=1)), None)


def check_type(key: str, value: object, expected: str, example: str = "") -> None:
    """Refuse `value` unless its type, in the words of `type_name`, is `expected`.

    Raises:
        ConfigError: it is another; the message gives both and an example.
    """
    found = type_name(value)
    if found == expected:
        return
    mend = example or EXAMPLES[expected]
    if expected == "string" and found in ("integer", "number", "boolean", "date or time"):
        mend = f'"{shown(value)}", in quotes'
    elif expected == "integer" and isinstance(value, float) and value.is_integer() and abs(value) <= MAX_COUNT:
        mend = str(int(value))
    raise ConfigError(f"{key} = {shown(value)} is of type {found}; expected {_article(expected)}, such as {mend}")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def check_count(key: str, value: object, minimum: int, maximum: int = MAX_COUNT) -> None:
    """Refuse anything but an integer from `minimum` to `maximum`.

    Raises:
        ConfigError: it is not one.
    """
    check_type(key, value, "integer")
    assert isinstance(value, int)
    if value < minimum:
        raise ConfigError(f"{key} = {shown(value)} is too small; expected at least {minimum}")
    if value > maximum:
        raise ConfigError(f"{key} = {shown(value)} is too large; expected at most {maximum}")


def check_number(key: str, value: object, *, positive: bool = False) -> None:
    """Refuse anything but a finite number that is at least 0, or above 0 where `positive`.

    Raises:
        ConfigError: it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        check_type(key, value, "number")
    assert isinstance(value, int | float)
    bound = "above 0" if positive else "at least 0"
    finite = value.bit_length() <= 1000 if isinstance(value, int) else math.isfinite(value)
    if not finite or value < 0 or (positive and value == 0):
        raise ConfigError(f"{key} = {shown(value)} cannot be used; expected a finite number {bound}")


def check_text(key: str, value: object, example: str, *, empty: bool = False) -> None:
    """Refuse anything but a string of valid Unicode without NUL; the empty string too, unless `empty`.

    Raises:
        ConfigError: it is not one; the message gives `example`.
    """
    check_type(key, value, "string", f'"{example}"')
    assert isinstance(value, str)
    if not value and not empty:
        raise ConfigError(f'{key} = "" is empty; expected a string such as "{example}"')
    if "\0" in value or not _is_unicode(value):
        raise ConfigError(f"{key} = {shown(value)} holds a NUL or is not valid Unicode; rename it without that")


def check_texts(key: str, value: object, example: str) -> tuple[str, ...]:
    """The strings of a list; refuses anything else, and one that stands twice.

    Raises:
        ConfigError: it is no list of strings, or one of them is empty or stands twice.
    """
    check_type(key, value, "array", example)
    assert isinstance(value, list | tuple)
    for entry in value:
        check_text(f"an entry of {key}", entry, json.loads(example)[0])
        if list(value).count(entry) > 1:
            raise ConfigError(f"{key} = {shown(list(value))} holds {shown(entry)} twice; remove one")
    return tuple(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_choice(key: str, value: object, allowed: Sequence[Any]) -> None:
    """Refuse anything but one of `allowed`.

    Raises:
        ConfigError: it is none of them; the message lists them and names the nearest.
    """
    if any(value == choice and type(value) is type(choice) for choice in allowed):
        return
    close = nearest(value, [c for c in allowed if isinstance(c, str)]) if isinstance(value, str) else None
    hint = f"; did you mean {shown(close)}?" if close else ""
    raise ConfigError(f"{key} = {shown(value)} is not known; expected one of: {', '.join(map(shown, allowed))}{hint}")
