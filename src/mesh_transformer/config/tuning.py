"""What fine-tuning and evaluation during training add to a run."""

from __future__ import annotations

import dataclasses

from mesh_transformer.config import checks
from mesh_transformer.config.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021): the model rests, and to each target matrix W is added scale A B.

    A [inputs, rank] begins random, B [rank, outputs] begins zero, scale = alpha / rank. `targets` are matrices by the
    last part of their name in the parameter table (q, k, v, o, w_in, w_out) or by Hugging Face's (q_proj, fc_in, ...);
    which of them the model has is checked when it is known.

    Raises:
        ConfigError: a value is impossible.
    """

    rank: int
    alpha: float | None = None  # None: twice the rank
    targets: tuple[str, ...] = ("q", "v")

    def __post_init__(self) -> None:
        checks.check_count("lora.rank", self.rank, 1)
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)
        checks.check_number("lora.alpha", self.alpha, positive=True)
        object.__setattr__(self, "targets", checks.check_texts("lora.targets", self.targets, '["q", "v"]'))
        if not self.targets:
            raise ConfigError('lora.targets = [] names no matrix; expected some, for example ["q", "v"]')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Tasks of lm-evaluation-harness that run during training, every so many steps and once more after the last.

    `include_path` is a directory of tasks beside the harness's own. `limit` items of each task at most, `num_fewshot`
    examples before each; None leaves both to the task.

    Raises:
        ConfigError: a value is impossible.
    """

    tasks: tuple[str, ...] = ()
    every: int = 0  # steps; 0: never
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", checks.check_texts("evaluate.tasks", self.tasks, '["lambada_openai"]'))
        checks.check_count("evaluate.every", self.every, 0)
        if self.every and not self.tasks:
            raise ConfigError(
                f"evaluate.every = {self.every} has nothing to evaluate: evaluate.tasks is empty\n"
                'name tasks, for example evaluate.tasks = ["lambada_openai"], or leave evaluate.every out'
            )
        for name, least in (("limit", 1), ("num_fewshot", 0)):
            if getattr(self, name) is not None:
                checks.check_count(f"evaluate.{name}", getattr(self, name), least)
        if self.include_path is not None:
            checks.check_text("evaluate.include_path", self.include_path, "tasks")
