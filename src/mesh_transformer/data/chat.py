"""From messages to a prompt, by the Jinja template that came with a model's tokenizer.

The template sees what transformers' `apply_chat_template` shows it, and gives the same text. It is a stranger's
program: it runs in Jinja's sandbox, which lets it change nothing and reach nothing but the messages and the date. It is
trusted with processor time and memory: nothing stops one that computes without end.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mesh_transformer.config.errors import UserError
from mesh_transformer.data.companions import DEFAULT
from mesh_transformer.data.tokenizer import Tokenizer

# Characters of a prompt: more than any context holds, and little enough to be held.
LONGEST = 1 << 23
# What is shown to every template beside its own variables.
SHOWN = ("messages", "tools", "documents", "add_generation_prompt")
_TOOL_USE = "tool_use"

Message = Mapping[str, Any]


class NoTemplate(UserError):
    """The model has no chat template."""


class BrokenTemplate(UserError):
    """A text is no Jinja template."""


class WrongType(UserError):
    """A template did with a value what its type does not allow, such as joining an object to a text."""


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation, up to where the assistant's next words begin.

    Args:
        messages: JSON objects with "role" and "content", which the template sees as they are.
        tools: what the assistant may call, as JSON schemas; a template named "tool_use" is taken where there is one.
        add_generation_prompt: whether the beginning of an answer is part of it.
        variables: of the template's own, such as {"enable_thinking": False}; none of `SHOWN`.

    Raises:
        NoTemplate: the tokenizer came with none.
        WrongType: the template fails on the type of something.
        UserError: the template refuses the messages, fails on them, or makes more than `LONGEST` characters of them;
            or `variables` has names of `SHOWN`.
    """
    check_variables(variables or {})
    compiled = _compiled(_template(tokenizer, has_tools=tools is not None))
    from jinja2 import UndefinedError

    shown = (list(messages), tools, None, add_generation_prompt)
    known = {**_special(tokenizer), **(variables or {}), **dict(zip(SHOWN, shown, strict=True))}
    parts: list[str] = []
    n_characters = 0
    try:
        for part in compiled.generate(known):
            parts.append(part)
            n_characters += len(part)
            if n_characters > LONGEST:
                break
    except Exception as error:  # a template may raise whatever Python can
        kind = WrongType if isinstance(error, TypeError | UndefinedError) else UserError
        raise kind(f"the model's chat template cannot make a prompt of these messages: {_said(error)}") from error
    if n_characters > LONGEST:
        raise UserError(f"the model's chat template makes more than {LONGEST:,} characters of these messages")
    return "".join(parts)


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], **how: Any) -> list[int]:
    """The ids of `render_chat`, in which names of special tokens are those tokens; nothing is put before them.

    A name of a special token in a message is that token too, as it is in transformers.
    """
    return tokenizer.encode(render_chat(tokenizer, messages, **how), allow_special=True)


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raises UserError for a variable that has one of the names of `SHOWN`."""
    taken = [name for name in SHOWN if name in variables]
    if taken:
        raise UserError(
            f"{', '.join(taken)} cannot be a template's own variable: it is shown to every one; leave it out"
        )


def prepare(tokenizer: Tokenizer) -> list[str]:
    """Does ahead what a first conversation would wait for; what is wrong with the templates, each by its name."""
    said = []
    for name, text in tokenizer.companions.templates.items():
        try:
            _compiled(text)
        except UserError as error:
            said.append(f"the chat template {name!r} cannot be used: {' '.join(str(error).split())}")
    if tokenizer.companions.templates:
        tokenizer.encode("a", allow_special=True)
    return said


def read_template(file: str | os.PathLike[str]) -> str:
    """The Jinja template in a file.

    Raises:
        UserError: the file cannot be read, or is no template, or Jinja is not installed.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read as a chat template ({error})\ngive a file of Jinja text in UTF-8"
        ) from error
    try:
        _compiled(text)
    except BrokenTemplate as error:
        raise UserError(f"{file}: {error}\nmend it, or leave --chat-template out for the model's own") from error
    return text


def with_template(tokenizer: Tokenizer, text: str) -> Tokenizer:
    """The tokenizer with a Jinja template in the place of those that it came with."""
    companions = dataclasses.replace(tokenizer.companions, templates={DEFAULT: text})
    return dataclasses.replace(tokenizer, companions=companions)


def _special(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens that a template may name; end-of-text alone where nothing was said of them."""
    if tokenizer.companions.special or tokenizer.end_of_text is None:
        return dict(tokenizer.companions.special)
    return dict.fromkeys(("bos_token", "eos_token"), tokenizer.decode([tokenizer.end_of_text]))


def _template(tokenizer: Tokenizer, *, has_tools: bool) -> str:
    templates = tokenizer.companions.templates
    for name in (_TOOL_USE, DEFAULT) if has_tools else (DEFAULT,):
        if name in templates:
            return templates[name]
    named = f"; its templates {', '.join(sorted(templates))} lack the name {DEFAULT}" if templates else ""
    raise NoTemplate(
        f"this model's tokenizer has no chat template{named}: messages cannot be made into a prompt\n"
        "use plain prompts, or serve it with --chat-template FILE"
    )


def _said(error: Exception) -> str:
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    return " ".join(str(message).split())[:300]


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> Any:
    """A template ready to be filled in.

    Raises:
        BrokenTemplate: the text is no template.
        UserError: Jinja is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise UserError("chat templates need jinja2\ninstall it: pip install 'mesh-transformer[serve]'")
    try:
        return _environment().from_string(text)
    except Exception as error:  # Jinja's own, and what Python says of the code that Jinja makes of it
        raise BrokenTemplate(f"the chat template is no Jinja template: {_said(error)}") from error


@functools.cache
def _environment() -> Any:
    """As transformers' templates expect it."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.ext import loopcontrols as loop_controls
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, by which training marks an assistant's words: they are written as they are."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's name and kind

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuses products and powers that would fill the memory."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            for one, other in ((left, right), (right, left)):
                n = len(one) if isinstance(one, str | list | tuple) else 0
                if isinstance(other, int) and n * other > LONGEST:
                    raise SecurityError(f"a product of more than {LONGEST:,} parts")
            if operator == "**" and isinstance(right, int) and right > 64:
                raise SecurityError(f"a power of {right}")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loop_controls])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _namespace(),
    }
    del environment.globals["lipsum"]  # text by the megabyte, which no prompt needs
    return environment


class _Dict:
    """What `dict` is to a template: it makes dictionaries and is not their class, which leads out of sandboxes."""

    def __call__(self, *arguments: Any, **given: Any) -> dict[Any, Any]:
        return dict(*arguments, **given)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


def _namespace() -> Any:
    """Jinja's namespace without names that begin with an underscore, by which sandboxes were left."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace holds no {name!r}")

    class Names(Namespace):
        def __init__(*arguments: Any, **given: Any) -> None:
            for name in dict(*arguments[1:], **given):
                check(name)
            Namespace.__init__(*arguments, **given)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return Names


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own writes letters that HTML knows as escapes.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
