"""What the operator of a server decides: its name, its key, and every limit."""

from __future__ import annotations

import dataclasses
import math
import re

from mesh_transformer.config.errors import UserError

_ORIGIN = re.compile(r"\*|https?://[^/\s]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of the server. Sizes are in bytes, times in seconds.

    name: what clients call the model. api_key: what they must send as a bearer token, None for no key.
    max_prompt_tokens: of one prompt, None for the model's context. max_body_bytes: of a request.
    max_tokens_limit: the largest max_tokens. max_choices: completions of one request, prompts times n.
    request_timeout: from a request's arrival to the end of its answer. body_timeout: for a request's body to arrive.
    write_timeout: for a client to take what is sent. shutdown_timeout: for what runs to finish once the server has been
    told to stop. allow_origins: of the web pages that may use /v1/*, "*" for all. max_results, results_seconds: how
    many predictions of /model/predict are kept, and for how long after they are done.

    Raises:
        UserError: a value is outside its range; the message names both.
    """

    name: str
    api_key: str | None = None
    max_prompt_tokens: int | None = None
    max_body_bytes: int = 1 << 20
    max_tokens_limit: int = 4096
    max_choices: int = 128
    request_timeout: float = 600.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    shutdown_timeout: float = 30.0
    allow_origins: tuple[str, ...] = ()
    max_results: int = 1000
    results_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise UserError(f"the served model's name {self.name!r} cannot be used; expected printable characters")
        if self.api_key == "":
            raise UserError(
                "the API key is empty, which would ask for none\ngive one, or leave out option and variable"
            )
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise UserError("the API key cannot be sent in a header; expected printable ASCII characters, no spaces")
        for name in ("max_prompt_tokens", "max_body_bytes", "max_tokens_limit", "max_choices", "max_results"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} = {value} is out of range: at least 1")
        for name in ("request_timeout", "body_timeout", "write_timeout", "results_seconds"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"{name} = {value} is out of range: more than 0 seconds, and finite")
        if not 0 <= self.shutdown_timeout < math.inf:
            raise UserError(f"shutdown_timeout = {self.shutdown_timeout} is out of range: at least 0, and finite")
        for origin in self.allow_origins:
            if not _ORIGIN.fullmatch(origin):
                raise UserError(f"the origin {origin!r} cannot be used; expected https://host, https://host:port, or *")
