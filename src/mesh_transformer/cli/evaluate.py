"""`mesh-transformer evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mesh_transformer.cli import model_options

if TYPE_CHECKING:
    from mesh_transformer.api import Model
    from mesh_transformer.config.model import ModelConfig
    from mesh_transformer.evaluate.running import RunOptions
    from mesh_transformer.evaluate.tasks import Tasks
    from mesh_transformer.processes import Processes

_TASKS_TIMEOUT = 3600.0  # seconds that one process may read data or a model beyond the others
# lm-eval's flags that this command does not take, and why.
_REFUSED = {
    "model": "the model is the argument MODEL",
    "model_args": "this command has options of its own for them: --dtype, --mesh, ...",
    "device": "JAX chooses it; JAX_PLATFORMS=cpu, cuda or tpu before the command does",
    "max_batch_size": "texts are put together by their lengths",
    "fewshot_as_multiturn": "tasks are asked in plain text, without a chat template",
    "apply_chat_template": "tasks are asked in plain text, without a chat template",
}
_ELSEWHERE = (
    "use_cache", "cache_requests", "check_integrity", "show_config", "verbosity", "wandb_args", "wandb_config_args",
    "trackio_args", "hf_hub_log_args", "trust_remote_code", "metadata",
)  # fmt: skip


def evaluate(
    context: typer.Context,
    model: model_options.Model,
    tasks: list[str] = typer.Option(
        [], "--tasks", "-t", metavar="A,B", help="Of lm-evaluation-harness, or gpt-j-table: the original's table."
    ),
    include_path: Path | None = typer.Option(
        None, "--include-path", "--include_path", metavar="DIR", help="Task files (.yaml) of your own."
    ),
    num_fewshot: int | None = typer.Option(
        None, "--num-fewshot", "--num_fewshot", "-f", min=0, help="Examples before each question."
    ),
    limit: float | None = typer.Option(
        None, "--limit", "-L", help="Questions of each task; below 1, this part of them. For trying out."
    ),
    text: Path | None = typer.Option(None, "--text", metavar="FILE", help="Perplexity of a text file."),
    output: Path | None = typer.Option(
        None, "--output", "--output-path", "--output_path", "-o", metavar="F.json", help="Results as JSON."
    ),
    log_samples: bool = typer.Option(
        False, "--log-samples", "--log_samples", "-s", help="Every answer too, in F_samples_TASK.jsonl."
    ),
    predict_only: bool = typer.Option(
        False, "--predict-only", "--predict_only", "-x", help="Answers alone, no metrics; as --log-samples."
    ),
    samples: str | None = typer.Option(
        None, "--samples", "-E", metavar="JSON", help='Which questions, {"task": [0, 5]}; JSON or a file of it.'
    ),
    gen_kwargs: list[str] = typer.Option(
        [], "--gen-kwargs", "--gen_kwargs", metavar="K=V,...", help="For tasks that write, e.g. temperature=0.8."
    ),
    seed: str | None = typer.Option(
        None, "--seed", metavar="N[,N,N,N]", help="random, numpy, torch, examples; default 0,1234,1234,1234."
    ),
    batch_size: str = typer.Option(
        "auto", "--batch-size", "--batch_size", "-b", help="Rows at one time at the most; auto: by their length."
    ),
    system_instruction: str | None = typer.Option(
        None, "--system-instruction", "--system_instruction", metavar="TEXT", help="Text before every question."
    ),
    write_out: bool = typer.Option(False, "--write-out", "--write_out", "-w", help="Show the first prompts."),
    confirm_run_unsafe_code: bool = typer.Option(
        False, "--confirm-run-unsafe-code", "--confirm_run_unsafe_code", help="Run tasks that run written code."
    ),
    legacy_prompts: bool = typer.Option(
        False, "--legacy-prompts", help="Prompts as the original made them: end-of-text before, cleaned, cut apart."
    ),
    dtype: model_options.Dtype = None,
    quantize: model_options.Quantize = None,
    tokenizer: model_options.Tokenizer = None,
    step: model_options.Step = None,
    mesh: model_options.Mesh = None,
    config: model_options.Config = None,
) -> None:
    """Score a model on tasks of lm-evaluation-harness, and on a text file."""
    _refuse(model, context.args)
    from mesh_transformer.cli.session import open_model, start_session
    from mesh_transformer.config.errors import UserError

    if not tasks and text is None:
        raise UserError("nothing to evaluate; give --tasks A,B or --text FILE")
    of_tasks = {
        "--include-path": include_path, "--num-fewshot": num_fewshot, "--limit": limit, "--log-samples": log_samples,
        "--predict-only": predict_only, "--samples": samples, "--gen-kwargs": gen_kwargs, "--seed": seed,
        "--system-instruction": system_instruction, "--write-out": write_out, "--legacy-prompts": legacy_prompts,
    }  # fmt: skip
    # A number may be 0, which is not False.
    unused = [name for name, value in of_tasks.items() if not (value is None or value is False or value == [])]
    if unused and not tasks:
        raise UserError(f"{unused[0]} is for tasks, and none is named; give --tasks A,B too, or leave it out")
    if (log_samples or predict_only) and output is None:
        raise UserError("--log-samples and --predict-only write answers beside the results; give --output F.json too")
    if output is not None and output.is_dir():
        raise UserError(f"--output {output} is a directory; expected a file, for example {output / 'results.json'}")
    words = _read(text) if text is not None else None
    n_rows = _batch_size(batch_size)
    start_session()
    from mesh_transformer.cli.console import note
    from mesh_transformer.processes import Watchdog, check_same, join, version_facts

    processes = join(note)
    if processes.count > 1:
        check_same(processes, {"options": repr(sorted(context.params.items())), **version_facts()})
    found, options, names = None, None, list[str]()
    if tasks:
        from mesh_transformer.evaluate.running import RunOptions
        from mesh_transformer.evaluate.tasks import load_tasks

        options = RunOptions(
            limit=_limit(limit),
            samples=_samples(samples, limit),
            gen_kwargs=_gen_kwargs(gen_kwargs),
            seed=_seeds(seed),
            system_instruction=system_instruction,
            log_samples=log_samples or predict_only,
            predict_only=predict_only,
            write_out=write_out,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
        names = [name for each in tasks for name in each.replace(",", " ").split()]
        where = str(include_path) if include_path else None
        with processes.agree("tasks", _TASKS_TIMEOUT):  # before the model, which may be big
            if processes.is_first:
                found = load_tasks(names, include_path=where, num_fewshot=num_fewshot)
    with processes.agree("opening of the model", _TASKS_TIMEOUT):
        opened = open_model(
            model, dtype=dtype, tokenizer=tokenizer, step=step, config=config, mesh=mesh, quantize=quantize,
            together=processes.count > 1,
        )  # fmt: skip
    results: dict[str, Any] = {}
    with Watchdog(processes, 0):
        if options is not None:
            results = _run_tasks(opened, found, options, processes, legacy_prompts, n_rows)
            _add_row(results, names, opened.config, model, legacy_prompts)
        if words is not None:
            results["text"] = _score_text(opened, str(text), words, n_rows, shown=processes.is_first)
        if output is not None and processes.is_first:
            _write(results, output, with_tasks=found is not None)


def _run_tasks(
    opened: Model,
    tasks: Tasks | None,
    options: RunOptions,
    processes: Processes,
    legacy_prompts: bool,
    n_rows: int | None,
) -> dict[str, Any]:
    """The harness' results, shown; nothing in other processes than the first, which compute what that one says."""
    if tasks is None:
        from mesh_transformer.evaluate.together import Computing

        model = opened.config, opened.params, opened.policy, opened.tokenizer, opened.layout
        with Computing(*model, processes=processes, batch_size=n_rows).together():
            return {}
    from mesh_transformer.cli.console import StageDisplay, note
    from mesh_transformer.evaluate.harness import HarnessModel
    from mesh_transformer.evaluate.running import SEEDS, run_tasks, tables

    seed = options.seed[2]
    with StageDisplay() as display:
        harness = HarnessModel.of(
            opened,
            legacy_prompts=legacy_prompts,
            seed=(SEEDS[2] or 0) if seed is None else seed,
            batch_size=n_rows,
            progress=display.progress,
            processes=processes,
        )
        with harness.computing.together():
            results = run_tasks(harness, tasks, options)
    if opened.source is not None:
        results["config"]["model_args"] = {"pretrained": str(opened.source.path), "step": opened.source.step}
    typer.echo(tables(results))
    if harness.scorer.counts.texts:
        note(str(harness.scorer.counts))
    if harness.n_written:
        note(f"{harness.n_written:,} tokens written")
    return results


def _add_row(results: dict[str, Any], names: list[str], cfg: ModelConfig, model: str, legacy_prompts: bool) -> None:
    """Of the preset of the published table: its row into the results, and shown."""
    from mesh_transformer.evaluate.tasks import TABLE
    from mesh_transformer.evaluate.zero_shot import row_of

    if TABLE in names and results:  # which the first process alone has
        row = row_of(results, cfg, Path(model).name or model, legacy_prompts=legacy_prompts)
        if row is not None:
            results[TABLE] = row
            typer.echo(row["markdown"])


def _score_text(opened: Model, name: str, words: str, n_rows: int | None, *, shown: bool) -> dict[str, Any]:
    """The text's figures; every process computes its part of them."""
    from mesh_transformer.cli.console import StageDisplay
    from mesh_transformer.config.errors import UserError
    from mesh_transformer.engine.scoring import Scorer
    from mesh_transformer.evaluate.perplexity import evaluate_text

    if opened.tokenizer is None:
        raise UserError("this model has no tokenizer, and --text is text; give one: --tokenizer gpt2")
    scorer = Scorer(opened.config, opened.policy, opened.layout, most_rows=n_rows)
    with StageDisplay() as display:
        report = evaluate_text(scorer, opened.params, opened.tokenizer, words, display.progress)
    if not shown:
        return {}
    typer.echo(f"{name}: {report.tokens:,} tokens, {report.bytes:,} bytes, {report.words:,} words")
    typer.echo(
        f"{report.nats_per_token:.4f} nats a token (perplexity {report.token_perplexity:,.3f}), "
        f"{report.bits_per_byte:.4f} bits a byte, word perplexity {report.word_perplexity:,.3f}"
    )
    return {"file": name, **report.to_dict()}


def _write(results: dict[str, Any], output: Path, *, with_tasks: bool) -> None:
    from mesh_transformer.cli.console import note

    if with_tasks:
        from mesh_transformer.evaluate.running import write_results

        files = write_results(results, output)
    else:
        import json

        from mesh_transformer.files import make_directories, write_atomically

        make_directories(output.absolute().parent)
        write_atomically(output, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
        files = [output]
    note(f"written: {', '.join(map(str, files))}")


def _refuse(model: str, given: list[str]) -> None:
    """Names an option that is not taken: lm-eval's with the reason, others as the command line library would."""
    from mesh_transformer.config.errors import UserError

    unknown = [each for each in (model, *given) if each.startswith("-") and len(each) > 1]
    if unknown:
        option = unknown[0].partition("=")[0]
        name = option.lstrip("-").replace("-", "_")
        if name in _REFUSED:
            raise UserError(f"{option} is not taken here: {_REFUSED[name]}")
        if name in _ELSEWHERE:
            raise UserError(
                f"{option} is not taken here; lm-eval's own command takes it:\npython -m mesh_transformer.evaluate."
                "lm_eval --model mesh_transformer --model_args pretrained=MODEL --tasks ..."
            )
        raise UserError(f"no such option: {option}\nsee: mesh-transformer evaluate --help")
    if given:
        raise UserError(f"unexpected argument: {given[0]}; several tasks are joined by commas: --tasks A,B")


def _read(path: Path) -> str:
    from mesh_transformer.config.errors import UserError

    try:
        words = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: cannot be read as UTF-8 text ({error})") from error
    if not words.strip():
        raise UserError(f"--text {path}: holds nothing but white space; expected text to score")
    return words


def _batch_size(given: str) -> int | None:
    from mesh_transformer.config.errors import UserError

    if given == "auto":
        return None
    if not given.isdigit() or int(given) < 1:
        raise UserError(f"--batch-size {given}: expected auto or a whole number of at least 1")
    return int(given)


def _limit(given: float | None) -> float | None:
    from mesh_transformer.config.errors import UserError

    if given is None or given < 1:
        if given is not None and not given > 0:
            raise UserError(f"--limit {given:g}: expected a number of questions, or a part of them between 0 and 1")
        return given
    if given != int(given):
        raise UserError(f"--limit {given:g}: expected a whole number of questions, or a part of them below 1")
    return int(given)


def _samples(given: str | None, limit: float | None) -> Any:
    import json

    from mesh_transformer.config.errors import UserError

    if given is None:
        return None
    if limit is not None:
        raise UserError("--samples and --limit both say which questions; give one of them")
    try:
        found = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--samples {given}: neither JSON nor a file of it ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(each, list) for each in found.values()):
        raise UserError(f'--samples {given}: expected {{"task": [0, 5]}}, the numbers of questions by task')
    return found


def _gen_kwargs(given: list[str]) -> dict[str, Any] | None:
    import json

    from mesh_transformer.config.errors import UserError

    if not given:
        return None
    options: dict[str, Any] = {}
    for each in given:
        if each.lstrip().startswith("{"):
            try:
                options |= json.loads(each)
            except ValueError as error:
                raise UserError(f"--gen-kwargs {each}: is not JSON ({error})") from error
            continue
        for part in each.split(","):
            name, equals, value = part.partition("=")
            if not equals:
                raise UserError(f"--gen-kwargs {each}: {part} has no value; expected temperature=0.8,top_p=0.9 or JSON")
            options[name.strip()] = _value(value.strip())
    return options


def _value(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "null": None}.get(text, text)


def _seeds(given: str | None) -> Any:
    from mesh_transformer.config.errors import UserError
    from mesh_transformer.evaluate.running import SEEDS

    if given is None:
        return SEEDS
    parts = given.split(",")
    values = [None if part == "None" else int(part) if part.isdigit() else -1 for part in parts]
    if len(values) not in (1, 4) or -1 in values or any(v is not None and v >= 2**32 for v in values):
        raise UserError(f"--seed {given}: expected one whole number, or four of them (or None) with commas between")
    return tuple(values * (4 // len(values)))
