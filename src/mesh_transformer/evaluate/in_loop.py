"""Evaluation during training: tasks are found and their data read before the run begins, then scored every so often."""

from __future__ import annotations

import dataclasses
from typing import Any

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import RunConfig
from mesh_transformer.config.tuning import EvaluateConfig
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.evaluate.installed import in_this_process, quietly
from mesh_transformer.evaluate.running import FEW_BOOTSTRAPS, SEEDS, plain_metrics, quiet_stdout
from mesh_transformer.evaluate.tasks import load_tasks
from mesh_transformer.evaluate.together import Computing
from mesh_transformer.model.policy import ComputePolicy
from mesh_transformer.processes import ONE, Processes
from mesh_transformer.shapes import Params
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout


class TrainingEvaluation:
    """The tasks of `[evaluate]`, ready to be run on parameters of one architecture and layout.

    Programs are compiled at the first call and used again by the following ones.
    """

    def __init__(
        self,
        evaluate: EvaluateConfig,
        cfg: ModelConfig,
        policy: ComputePolicy,
        tokenizer: Tokenizer | None,
        layout: Layout = ONE_DEVICE_LAYOUT,
        processes: Processes = ONE,
    ) -> None:
        """Finds the tasks and reads their data, in the first process; nothing is computed.

        Args:
            processes: that the layout spans; all of them make one of these, and call it at the same steps.

        Raises:
            UserError: lm-eval is missing, a task is not known, its data cannot be had, the run has no tokenizer, or
                the layout has a pipeline.
        """
        # No gradient is wanted, and so there is nothing to compute again.
        policy = dataclasses.replace(policy, remat="none")
        self._loaded: dict[str, Any] = {"tasks": {}}
        if not processes.is_first:
            self._computing = Computing(cfg, {}, policy, tokenizer, layout, processes=processes)
            return
        tasks = load_tasks(evaluate.tasks, include_path=evaluate.include_path, num_fewshot=evaluate.num_fewshot)
        from mesh_transformer.evaluate.harness import HarnessModel

        self._model = HarnessModel(cfg, {}, policy, tokenizer, layout, processes=processes)
        self._computing = self._model.computing
        self._limit = evaluate.limit
        self._loaded = tasks.manager.load(list(tasks.loaded))
        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEEDS[3])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, those of groups one by one; in the first process."""
        return tuple(self._loaded["tasks"])

    @property
    def n_compiled(self) -> int:
        """Programs compiled until now for scoring."""
        return self._computing.scorer.n_compiled

    def __call__(self, params: Params) -> dict[str, dict[str, float]]:
        """Metrics of each task and group with their standard errors: {"piqa": {"acc": 0.6, "acc_stderr": 0.01}}; in
        other processes than the first, nothing.

        Raises:
            UserError: a request cannot be computed.
        """
        self._computing.use(params)
        found: dict[str, dict[str, float]] = {}
        try:
            with self._computing.together():
                if self._loaded["tasks"]:
                    found = self._evaluate()
        finally:
            self._computing.use({})  # so that parameters which training goes on from are not kept
        return found

    def _evaluate(self) -> dict[str, dict[str, float]]:
        from lm_eval.evaluator import evaluate

        with in_this_process(), quietly(), quiet_stdout():
            found = evaluate(
                lm=self._model,
                task_dict=self._loaded,
                limit=self._limit,
                bootstrap_iters=FEW_BOOTSTRAPS,
                log_samples=False,
            )
        assert found is not None
        return plain_metrics(found)


def evaluation_of(
    run: RunConfig,
    policy: ComputePolicy,
    tokenizer: Tokenizer | None,
    layout: Layout,
    processes: Processes = ONE,
) -> TrainingEvaluation:
    """The evaluation that a run asks for. Raises UserError as `TrainingEvaluation`."""
    return TrainingEvaluation(run.evaluate, run.model, policy, tokenizer, layout, processes)
