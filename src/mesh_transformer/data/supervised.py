"""Examples of which only a part is learned: prompts with completions, and conversations, laid out by a template.

A template is a TOML file of strings with fields in braces (`{{` and `}}` are braces):

prompt = "Question: {prompt}\\nAnswer:"        # of a line with prompt and completion; any of its fields may stand here
completion = " {completion}{end_of_text}"
system = "{content}\\n\\n"                      # of a line with messages: one string for each role
user = "User: {content}\\n"
assistant = "Assistant: {content}{end_of_text}\\n"

`completion` and `assistant` are learned from their first field to their last; the words around them, and everything
else, are only read. `{end_of_text}` is the tokenizer's end-of-text id.
"""

from __future__ import annotations

import dataclasses
import string
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.config.errors import DataError
from mesh_transformer.data.documents import check_surrogates

_END = "end_of_text"
_LEARNED = ("completion", "assistant")
_PAIR = ("prompt", "completion")
BUILT_IN_TEMPLATES = {
    "plain": {
        "prompt": "{prompt}",
        "completion": "{completion}{end_of_text}",
        "system": "{content}\n\n",
        "user": "User: {content}\n",
        "assistant": "Assistant: {content}{end_of_text}",
    },
    "question": {"prompt": "Question: {prompt}\nAnswer:", "completion": " {completion}{end_of_text}"},
}

# Text (None: the end-of-text id), and whether it is learned.
Segment = tuple[str | None, bool]


@dataclasses.dataclass(frozen=True)
class Template:
    """How a line becomes text: `parts` maps prompt, completion and roles to (literal, field or None) pairs."""

    name: str
    parts: Mapping[str, tuple[tuple[str, str | None], ...]]

    def segments(self, where: str, line: Any) -> list[Segment]:
        """What one line of JSON says, in order; neighbours that are learned alike are one segment.

        Raises:
            DataError: it has neither messages nor the fields that the template names; begins with `where`.
        """
        if not isinstance(line, dict):
            raise DataError(f"{where}: expected an object with 'prompt' and 'completion', or with 'messages'")
        found: list[Segment] = []
        if "messages" in line:
            messages = line["messages"]
            if not isinstance(messages, list) or not messages:
                raise DataError(f"{where}: 'messages' must be a list of objects with 'role' and 'content', not empty")
            for message in messages:
                if not isinstance(message, dict):
                    raise DataError(f"{where}: a message must be an object with 'role' and 'content'")
                role = message.get("role")
                if not isinstance(role, str) or role in _PAIR or role not in self.parts:
                    known = ", ".join(sorted(set(self.parts) - set(_PAIR))) or "none"
                    raise DataError(f"{where}: role {role!r} is not in template {self.name}; its roles are {known}")
                found += self._fill(where, role, message)
        else:
            for name in _PAIR:
                if name not in self.parts:
                    raise DataError(f"{where}: template {self.name} has no {name!r}; a line without messages needs it")
                found += self._fill(where, name, line)
        return _merged(found)

    def _fill(self, where: str, name: str, values: Mapping[str, Any]) -> list[Segment]:
        parts = self.parts[name]
        fields = [i for i, (_, field) in enumerate(parts) if field is not None]
        learned_role = name in _LEARNED
        filled: list[Segment] = []
        for i, (literal, field) in enumerate(parts):
            between = learned_role and fields[0] < i <= fields[-1]
            filled.append((literal, between))
            if field == _END:
                filled.append((None, learned_role))
            elif field is not None:
                value = values.get(field)
                if not isinstance(value, str):
                    raise DataError(f"{where}: the field {field!r}, which template {self.name} names, must be a string")
                check_surrogates(where, value)
                filled.append((value, learned_role))
        return filled


def _merged(segments: list[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for text, learned in segments:
        if text == "":
            continue
        last = merged[-1] if merged else (None, False)
        if text is not None and last[0] is not None and last[1] == learned:
            merged[-1] = (last[0] + text, learned)
        else:
            merged.append((text, learned))
    return merged


def load_template(spec: str) -> Template:
    """The template that `spec` names: one of BUILT_IN_TEMPLATES, or a TOML file.

    Raises:
        DataError: no such template, or one that is malformed.
    """
    if spec in BUILT_IN_TEMPLATES:
        content: dict[str, Any] = dict(BUILT_IN_TEMPLATES[spec])
    else:
        try:
            content = tomllib.loads(Path(spec).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                f"template {spec!r} is neither {' nor '.join(BUILT_IN_TEMPLATES)}, and the file cannot be read "
                f"({error.strerror or error})"
            ) from error
        except ValueError as error:
            raise DataError(f"template {spec}: not TOML in UTF-8 ({error})") from error
    parts = {name: _parse(spec, name, text) for name, text in content.items()}
    if not any(name in parts for name in _LEARNED):
        raise DataError(f"template {spec}: has neither 'completion' nor 'assistant', so that nothing would be learned")
    if ("prompt" in parts) != ("completion" in parts):
        raise DataError(f"template {spec}: 'prompt' and 'completion' belong together; give both or neither")
    return Template(spec, parts)


def _parse(spec: str, name: str, text: Any) -> tuple[tuple[str, str | None], ...]:
    where = f"template {spec}, {name}"
    if not isinstance(text, str):
        raise DataError(f"{where}: {text!r} is not a string; expected text with fields in braces, such as {{content}}")
    try:
        parsed = [(literal, field, format_, conversion) for literal, field, format_, conversion in
                  string.Formatter().parse(text)]  # fmt: skip
    except ValueError as error:
        raise DataError(f"{where}: {error}; write {{{{ and }}}} for braces that are text") from error
    for _, field, format_, conversion in parsed:
        if field is not None and (format_ or conversion or not field.isidentifier()):
            raise DataError(f"{where}: {{{field}}} is not a plain name; write {{{{ and }}}} for braces that are text")
    if not any(field not in (None, _END) for _, field, _, _ in parsed):
        raise DataError(f"{where}: has no field; expected one in braces, such as {{content}}")
    return tuple((literal, field) for literal, field, _, _ in parsed)
