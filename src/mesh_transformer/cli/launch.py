"""`mesh-transformer launch`."""

from __future__ import annotations

import inspect

import typer

from mesh_transformer.cli.train import train

# The options that both commands have are declared there.
_TRAIN = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}


def launch(
    config: str = _TRAIN["config"],
    workers: int = typer.Option(..., "--workers", min=1, metavar="N", help="Processes; one a host with accelerators."),
    address: str | None = typer.Option(
        None, "--address", metavar="HOST:PORT", help="A running Ray cluster; `auto` finds it. Default: a local one."
    ),
    devices_per_worker: int = typer.Option(
        1, "--devices-per-worker", min=1, metavar="K", help="GPUs or TPU chips of a worker, or devices made of its CPU."
    ),
    max_failures: int = typer.Option(
        3, "--max-failures", min=0, help="Times that failed workers are replaced and the run goes on by itself."
    ),
    worker_timeout: float = typer.Option(
        100.0, "--worker-timeout", metavar="S", help="Seconds without a sign of life that make a worker count as dead."
    ),
    set_: list[str] = _TRAIN["set_"],
    new: bool = _TRAIN["new"],
    init_from: str | None = _TRAIN["init_from"],
    fresh_optimizer: bool = _TRAIN["fresh_optimizer"],
    keep_schedule: bool = _TRAIN["keep_schedule"],
    init_step: int | None = _TRAIN["init_step"],
    init_config: str | None = _TRAIN["init_config"],
    yes: bool = _TRAIN["yes"],
) -> None:
    """The same training over the workers of a Ray cluster, which are replaced when they fail."""
    import dataclasses
    import os

    from mesh_transformer.cli.console import TrainingDisplay, note, stopped_note
    from mesh_transformer.cli.train import begin_from_options, check_new
    from mesh_transformer.cluster.launch import run_on_workers
    from mesh_transformer.cluster.options import ClusterOptions
    from mesh_transformer.cluster.worker import TrainingTask, traces
    from mesh_transformer.config.load import load_run_config, to_toml
    from mesh_transformer.train.run import open_data

    options = ClusterOptions(
        workers=workers,
        address=address,
        devices_per_worker=devices_per_worker,
        max_failures=max_failures,
        worker_timeout=worker_timeout,
    )
    begin_from = begin_from_options(
        init_from, fresh_optimizer=fresh_optimizer, keep_schedule=keep_schedule, step=init_step, config=init_config
    )
    if begin_from is not None and os.path.exists(begin_from.model):
        begin_from = dataclasses.replace(begin_from, model=os.path.abspath(begin_from.model))
    if begin_from is not None and begin_from.config is not None:
        begin_from = dataclasses.replace(begin_from, config=os.path.abspath(begin_from.config))
    run, notes = load_run_config(config, set_, n_devices=lambda: workers * devices_per_worker)
    for line in notes:
        note(line)
    check_new(run, new=new, yes=yes)
    if address is None:
        open_data(run)  # what is wrong with it is said before a cluster is started
    task = TrainingTask(
        configuration=to_toml(run),
        init_from=begin_from,
        earlier=traces(run.run_directory) if new else {},
        display=TrainingDisplay,
    )
    result = run_on_workers(task, options, note)
    if result.stopped_by is not None:
        note(stopped_note(result.step, result.stopped_by))
        raise typer.Exit(128 + result.stopped_by)
    note(f"done: step {result.step}; see {run.run_directory}")
