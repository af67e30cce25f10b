"""What every handler needs: the model's facts, the engine, the options, the figures, and whether the server stops."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Literal

import mesh_transformer
from mesh_transformer.config.errors import UserError
from mesh_transformer.serve.metrics import Metrics
from mesh_transformer.serve.options import ServeOptions
from mesh_transformer.serve.tokens import TokenTexts

if TYPE_CHECKING:
    from mesh_transformer.config.model import ModelConfig
    from mesh_transformer.data.tokenizer import Tokenizer
    from mesh_transformer.engine.service import EngineService

WhenFull = Literal["slide", "stop"]
_MOST_SECONDS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the server knows of the model. when_full: what a text does that outgrows the context, as the engine was
    told. variant: whatever else changes answers (source, step, precision), part of the fingerprint.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    when_full: WhenFull = "slide"
    variant: str = ""

    @property
    def fingerprint(self) -> str:
        """Changes when the same seed might give another answer."""
        tokenizer: tuple[object, ...] = ()
        if self.tokenizer:
            templates = sorted(self.tokenizer.companions.templates.items())
            tokenizer = (self.tokenizer.sha256, self.tokenizer.begin, self.tokenizer.ends, templates)
        facts = (mesh_transformer.__version__, self.config, tokenizer, self.when_full, self.variant)
        return f"mt_{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


class Served:
    """A model behind its engine, being served. `stopping` is set once the server takes nothing more.

    Raises:
        UserError: more tokens of prompt are allowed than the model's context holds.
    """

    def __init__(self, model: ModelFacts, service: EngineService, options: ServeOptions) -> None:
        n_ctx = model.config.n_ctx
        if (options.max_prompt_tokens or 0) > n_ctx:
            raise UserError(
                f"max_prompt_tokens = {options.max_prompt_tokens} is out of range: the context holds {n_ctx}"
            )
        self.model, self.service, self.options = model, service, options
        self.max_prompt_tokens = options.max_prompt_tokens or n_ctx
        self.fingerprint, self.created = model.fingerprint, int(time.time())
        self.stopping = False
        self.metrics = Metrics(service)
        self.token_texts = TokenTexts(model.tokenizer)
        self._finished: deque[float] = deque(maxlen=64)

    def engine_ended(self) -> bool:
        """Whether the engine takes no requests though nobody has told the server to stop."""
        return self.service.ended and not self.stopping

    def count_finished(self) -> None:
        """A completion has ended and left its slot."""
        self._finished.append(time.monotonic())

    def retry_after(self) -> int:
        """Seconds until a place in the queue should be free, from the rate of the recent completions."""
        if len(self._finished) < 2:
            return 5
        rate = len(self._finished) / max(1e-3, time.monotonic() - self._finished[0])
        return min(_MOST_SECONDS, max(1, math.ceil(1 / rate)))
