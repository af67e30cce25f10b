"""The files beside a tokenizer.json, and what they say: special tokens, chat templates, the ids that end a text.

They are Hugging Face's (tokenizer_config.json, special_tokens_map.json, chat_template.jinja, chat_templates/NAME.jinja,
generation_config.json), and are kept as they are wherever the tokenizer is stored. A config.json is a model's: what is
wrong with it is said where a model is read, and to a tokenizer a damaged one is none.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.config.errors import DataError

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
DEFAULT = "default"
_SPECIAL = "special_tokens_map.json"
_KEPT = (CONFIG, _SPECIAL, TEMPLATE, GENERATION)
# Where transformers has put further templates.
_FOLDERS = ("additional_chat_templates", "chat_templates")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MODEL = "config.json"

Read = Callable[[str], bytes | None]


@dataclasses.dataclass(frozen=True)
class Companions:
    """What is known of a tokenizer beside its vocabulary.

    Attributes:
        files: name -> contents, to be kept with it.
        special: "bos_token" and the like -> the token.
        templates: name -> Jinja text that makes a prompt of messages; the usual one is "default".
        ends: ids that end a text which a model writes; empty where nothing says so.
    """

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ends: tuple[int, ...] = ()


def companions_in(directory: Path) -> Companions:
    """The companions in a directory.

    Raises:
        DataError: a file cannot be read or is damaged; it is named.
    """

    def read(name: str) -> bytes | None:
        path = directory / name
        try:
            return path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error

    found = {file.stem: f"{folder}/{file.name}" for folder in _FOLDERS for file in (directory / folder).glob("*.jinja")}
    return companions_of(read, str(directory), dict(sorted(found.items())))


def companions_of(read: Read, where: str, more: Mapping[str, str] | None = None) -> Companions:
    """The companions that `read` finds by their names; None stands for a file that is not there.

    Args:
        where: of the files, for messages.
        more: template name -> file, of further templates.

    Raises:
        DataError: a file is damaged; it is named.
    """
    files = {name: data for name in _KEPT if (data := read(name)) is not None}
    config = _object(files.get(CONFIG), f"{where}/{CONFIG}")
    special = _special(_object(files.get(_SPECIAL), f"{where}/{_SPECIAL}")) | _special(config)
    templates = _templates(config.get("chat_template"), f"{where}/{CONFIG}")
    if TEMPLATE in files:
        templates[DEFAULT] = _text(files[TEMPLATE], f"{where}/{TEMPLATE}")
    further = {name: _text(read(file) or b"", f"{where}/{file}") for name, file in (more or {}).items()}
    if further:
        # One file holds them all, so that no directory has to be kept.
        templates |= further
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        files[CONFIG] = json.dumps(config | {"chat_template": listed}, indent=2, ensure_ascii=False).encode()
        files.pop(TEMPLATE, None)
    if GENERATION not in files:
        said = _said_by_model(read(_MODEL))
        if said:
            files[GENERATION] = json.dumps(said).encode() + b"\n"
    return Companions(files, special, templates, _ends(files.get(GENERATION), f"{where}/{GENERATION}"))


def _object(data: bytes | None, where: str) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); it is damaged, copy it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected a JSON object; it is damaged, copy it again")
    return found


def _said_by_model(data: bytes | None) -> dict[str, Any]:
    """What a config.json says of ends and beginnings; nothing, where it is damaged or another program's."""
    try:
        model = _object(data, _MODEL)
        said = {key: model[key] for key in ("bos_token_id", "eos_token_id") if model.get(key) is not None}
        _ends(json.dumps(said).encode(), _MODEL)
    except (DataError, RecursionError):
        return {}
    return said if "model_type" in model else {}


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); copy it again") from error


def _special(found: Mapping[str, Any]) -> dict[str, str]:
    """Tokens are written as strings, or as objects with their content."""
    given = {name: found.get(name) for name in _NAMES}
    contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in given.items()}
    return {name: token for name, token in contents.items() if isinstance(token, str)}


def _templates(given: Any, where: str) -> dict[str, str]:
    """One template, or a list of {name, template}."""
    listed = [{"name": DEFAULT, "template": given}] if isinstance(given, str) else given or []
    try:
        found = {each["name"]: each["template"] for each in listed}
    except (TypeError, KeyError) as error:
        raise DataError(f"{where}: chat_template is no text and no list of {{name, template}}") from error
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise DataError(f"{where}: a name or a template in chat_template is no text")
    return found


def _ends(data: bytes | None, where: str) -> tuple[int, ...]:
    given = _object(data, where).get("eos_token_id")
    several = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(token) is int for token in several):
        raise DataError(f"{where}: eos_token_id is {given!r:.80}; expected a token id or a list of them")
    return tuple(dict.fromkeys(several))
