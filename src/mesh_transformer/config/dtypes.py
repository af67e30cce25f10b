"""The names by which a user calls the floating-point types."""

from __future__ import annotations

from mesh_transformer.config.checks import nearest, shown
from mesh_transformer.config.errors import ConfigError

# Bytes of a value.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = tuple(ITEMSIZE)
SHORT_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def dtype_name(name: str, *, key: str = "dtype") -> str:
    """The long form of a dtype's name: float32, bfloat16 or float16, also given as f32, bf16 or f16.

    `key` is what the message calls the value.

    Raises:
        ConfigError: there is no such dtype; the message lists those that exist.
    """
    if isinstance(name, str) and SHORT_NAMES.get(name, name) in DTYPES:
        return SHORT_NAMES.get(name, name)
    names = [*DTYPES, *SHORT_NAMES]
    close = nearest(name, names) if isinstance(name, str) else None
    hint = f"; did you mean {close}?" if close else ""
    raise ConfigError(f"{key} = {shown(name)} is not a known dtype; expected one of: {', '.join(names)}{hint}")
