"""From a JSON object to a request, with errors that name the field, what it was and what is expected."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mesh_transformer.serve.errors import ApiError, bad_request, shown
from mesh_transformer.serve.schema import StreamOptions, Strict

Asked = TypeVar("Asked", bound=Strict)
_NESTED: dict[str, type[BaseModel]] = {"stream_options": StreamOptions}


def validate(kind: type[Asked], data: dict[str, Any]) -> Asked:
    """`data` as a request of this kind. Raises ApiError (400) for the first field that is wrong."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # include_url and context cost time and are not shown.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _explain(kind, data, first) from None


def _explain(kind: type[BaseModel], data: dict[str, Any], error: Any) -> ApiError:
    place, fields, path = error["loc"], kind.model_fields, str(error["loc"][0])
    if path in _NESTED and len(place) > 1 and isinstance(data[path], dict):
        # Of what the union's branches say, only the object's own fields are of interest.
        inner = next(p for p in place[1:] if p in _NESTED[path].model_fields or p in data[path])
        fields, data, name = _NESTED[path].model_fields, data[path], str(inner)
        path = f"{path}.{name}"
    else:
        name = path
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        known = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(fields)}"
        return bad_request(f"the field {shown(name)} is not known; {known}", param=path)
    expected = fields[name].description
    if name not in data:
        return bad_request(f"{path} is missing; expected {expected}", param=path)
    return bad_request(f"{path} = {shown(data[name])}; expected {expected}", param=path)
