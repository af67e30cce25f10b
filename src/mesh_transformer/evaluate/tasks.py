"""Tasks of lm-evaluation-harness by name, found and with their data read before a model is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mesh_transformer.config.errors import UserError
from mesh_transformer.evaluate.installed import quietly, require_harness

# The preset of the table that the original published for GPT-J; `zero_shot` makes its row.
TABLE = "gpt-j-table"
# Several tasks under one name, each with its number of examples before a question: what the original ran, and its
# 15-shot cloze.
PRESETS: dict[str, dict[str, int]] = {
    TABLE: {
        "lambada_openai": 0,
        "piqa": 0,
        "hellaswag": 0,
        "winogrande": 0,
        "mathqa": 0,
        "pubmedqa": 0,
        "lambada_openai_cloze_yaml": 15,
    }
}
# What `datasets` reads from files, whatever they hold.
_FILE_READERS = ("json", "csv", "text", "parquet", "arrow", "pandas", "xml")
_MOST_NEAR = 3
_PROBE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Loaded tasks, as the harness takes them; `manager` knows all others."""

    loaded: tuple[Any, ...]
    manager: Any

    @property
    def by_name(self) -> dict[str, Any]:
        """Every task by its name, those of groups too."""
        return dict(self.manager.load(list(self.loaded))["tasks"])


def load_tasks(names: Sequence[str], *, include_path: str | None = None, num_fewshot: int | None = None) -> Tasks:
    """Finds tasks, groups and presets by name (`*` stands for anything) and reads their data.

    Args:
        include_path: a directory of tasks beside the harness's own; its names come first.
        num_fewshot: examples before each question; None leaves it to the task or preset.

    Raises:
        UserError: the harness is missing, a name is not known, or data cannot be had.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(
            f"include_path = {include_path}: there is no such directory; expected one of task files (.yaml)"
        )
    wanted = _expanded(names, num_fewshot)
    with quietly():
        # The harness' own tasks are thousands of files: they are not read where nobody asks for one.
        manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
        if manager is None or not set(wanted) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=include_path)
        found = {each: n for name, n in wanted.items() for each in _matching(name, manager)}
        loaded = [_load(name, n, manager) for name, n in found.items()]
    return Tasks(tuple(task for of_name in loaded for task in of_name), manager)


def _expanded(names: Sequence[str], num_fewshot: int | None) -> dict[str, int | None]:
    """Name -> examples before each question, presets taken apart."""
    wanted: dict[str, int | None] = {}
    for name in names:
        if name not in PRESETS:
            wanted[name] = num_fewshot
        elif num_fewshot is not None:
            raise UserError(f"{name} says itself how many examples stand before each question; leave num_fewshot out")
        else:
            wanted.update(PRESETS[name])
    if not wanted:
        raise UserError(f"no tasks; name some, for example lambada_openai, or a preset: {', '.join(PRESETS)}")
    return wanted


def _matching(name: str, manager: Any) -> list[str]:
    matches: list[str] = manager.match_tasks([name])
    if matches:
        return matches
    near = difflib.get_close_matches(name, [*PRESETS, *manager.all_tasks], n=_MOST_NEAR, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else "no name is near it"
    raise UserError(
        f"task {name!r} is not known; {hint}\n"
        "all names: python -m mesh_transformer.evaluate.lm_eval ls tasks; your own: include_path, a directory of .yaml"
    )


def _load(name: str, num_fewshot: int | None, manager: Any) -> list[Any]:
    with _offline_if_needed(name, manager):
        try:
            loaded = manager.load([name])
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
            raise UserError(f"task {name}: {_why(error)}") from error
    for task in loaded["tasks"].values():
        # A task that names its number (0) keeps it, as with the harness' own command.
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
    groups = list(loaded["groups"].values())
    inner = {id(each) for group in groups for each in (*group.get_all_tasks(), *group.get_all_groups())}
    return [each for each in (*groups, *loaded["tasks"].values()) if id(each) not in inner]


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    if isinstance(error, ImportError):
        return f"it needs a package that is not installed ({text})"
    if isinstance(error, OSError):
        return f"its data cannot be had ({text}); connect once, so that it is kept in the cache, or name other tasks"
    return f"it cannot be loaded ({type(error).__name__}: {text})"


@contextlib.contextmanager
def _offline_if_needed(name: str, manager: Any) -> Iterator[None]:
    """Where the data is in local files, or the Hugging Face Hub does not answer, nothing is sent anywhere.

    The libraries count what is loaded from local files too, and try again for half a minute where nobody answers. Their
    settings are changed for the moment, not the environment; what is in their cache is found.
    """
    if _needs_hub(name, manager) and _hub_answers():
        yield
        return
    import datasets
    import huggingface_hub

    settings: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [each.HF_HUB_OFFLINE for each in settings]
    bars = not datasets.are_progress_bars_disabled()
    for each in settings:
        each.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
        for each, value in zip(settings, before, strict=True):
            each.HF_HUB_OFFLINE = value


def _needs_hub(name: str, manager: Any) -> bool:
    entry = manager.task_index.get(name)
    where = (entry.cfg or {}).get("dataset_path") if entry is not None else None
    return not (isinstance(where, str) and (where in _FILE_READERS or Path(where).exists()))


def _hub_answers() -> bool:
    import huggingface_hub

    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # whatever the installed version's HTTP library raises; only whether it answers is of interest
        return False
    return True
