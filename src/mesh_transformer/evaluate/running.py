"""Tasks run on a model, through lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.config.errors import UserError
from mesh_transformer.evaluate.installed import in_this_process, quietly
from mesh_transformer.evaluate.tasks import TABLE, Tasks
from mesh_transformer.files import make_directories, write_atomically

# random, numpy, torch, examples before a question: the harness' own.
SEEDS = (0, 1234, 1234, 1234)
# Draws for standard errors that have no formula: the harness' own, and during training.
BOOTSTRAPS = 100_000
FEW_BOOTSTRAPS = 1_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the harness is told beside tasks and model, under its own names and with its own defaults."""

    limit: float | None = None
    samples: Mapping[str, list[int]] | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    seed: tuple[int | None, int | None, int | None, int | None] = SEEDS
    system_instruction: str | None = None
    log_samples: bool = False
    predict_only: bool = False
    write_out: bool = False
    confirm_run_unsafe_code: bool = False
    bootstrap_iters: int = BOOTSTRAPS


def run_tasks(model: Any, tasks: Tasks, options: RunOptions) -> dict[str, Any]:
    """The harness' results: "results", "configs", "n-samples", ..., and "samples" where they are wanted.

    model: a `harness.HarnessModel`.

    Raises:
        UserError: a request cannot be computed, or the harness refuses the tasks or options.
    """
    from lm_eval import simple_evaluate

    how = dataclasses.asdict(options)
    seeds = dict(zip(("random", "numpy_random", "torch_random", "fewshot_random"), how.pop("seed"), strict=True))
    try:
        with in_this_process(), quietly(), quiet_stdout():
            found = simple_evaluate(
                model=model,
                tasks=list(tasks.loaded),
                task_manager=tasks.manager,
                **{f"{name}_seed": seed for name, seed in seeds.items()},
                **how,
            )
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(f"lm-evaluation-harness: {' '.join(str(error).split())[:300]}") from error
    assert found is not None
    return dict(found)


def plain_metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Task -> metric -> value: "acc,none" is "acc", "acc_stderr,none" "acc_stderr"; what is no number is left out.

    A filter other than "none" stays in the name, as "exact_match,strict".
    """
    plain: dict[str, dict[str, float]] = {}
    for task, metrics in results["results"].items():
        numbers = {name.removesuffix(",none"): value for name, value in metrics.items() if "," in name}
        plain[task] = {name: float(value) for name, value in numbers.items() if not isinstance(value, str)}
    return plain


def write_results(results: Mapping[str, Any], output: Path) -> list[Path]:
    """The results as JSON, as the harness writes them; beside them, if there are any, answers in
    OUTPUT_samples_TASK.jsonl and the row of the published table in OUTPUT_table.md.

    Returns the files.
    """
    from lm_eval.utils import handle_non_serializable

    def text(value: Any, **how: Any) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **how)

    make_directories(output.absolute().parent)
    files = {output: text({name: value for name, value in results.items() if name != "samples"}, indent=2) + "\n"}
    for task, samples in results.get("samples", {}).items():
        place = output.with_name(f"{output.stem}_samples_{task.replace(os.sep, '_')}.jsonl")
        files[place] = "".join(text(sample) + "\n" for sample in samples)
    if TABLE in results:
        files[output.with_name(f"{output.stem}_table.md")] = results[TABLE]["markdown"]
    for place, content in files.items():
        write_atomically(place, content.encode())
    return list(files)


def tables(results: Mapping[str, Any]) -> str:
    """The harness' tables: of tasks, and of groups if there are any."""
    from lm_eval.utils import make_table

    shown = [make_table(dict(results))]
    if results.get("groups"):
        shown.append(make_table(dict(results), "groups"))
    return "\n".join(shown)


def quiet_stdout() -> contextlib.AbstractContextManager[Any]:
    """Within it what the harness prints goes to standard error: it is not the command's output."""
    return contextlib.redirect_stdout(sys.stderr)
