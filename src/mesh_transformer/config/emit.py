"""Write a nested dict as TOML. The standard library reads TOML but does not write it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def emit_toml(nested: Mapping[str, Any]) -> str:
    """TOML text: plain values first, then each table as a section whose own tables are inline. None is left out."""
    lines = [_line(key, value) for key, value in nested.items() if value is not None and not _is_table(value)]
    for name, section in nested.items():
        if _is_table(section):
            lines += ["", f"[{_key(name)}]"]
            lines += [_line(key, value) for key, value in section.items() if value is not None]
    return "\n".join(lines) + "\n"


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _line(key: str, value: object) -> str:
    return f"{_key(key)} = {_value(value)}"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _value(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            return _string(value)
        case Mapping():
            inside = ", ".join(_line(key, entry) for key, entry in value.items())
            return f"{{ {inside} }}" if inside else "{}"
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
        case _:
            raise TypeError(f"no TOML for a value of type {type(value).__name__}")


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but TOML wants DEL escaped as well, and has no surrogate pairs (hence ensure_ascii).
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
