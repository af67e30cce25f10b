"""Evaluation during training: tasks are found and their data read before the run begins, then scored every so often."""

from __future__ import annotations

import dataclasses

import jax

from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import RunConfig
from mesh_transformer.config.tuning import EvaluateConfig
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.evaluate.installed import in_this_process, quietly
from mesh_transformer.evaluate.running import FEW_BOOTSTRAPS, SEEDS, plain_metrics, quiet_stdout
from mesh_transformer.evaluate.tasks import load_tasks
from mesh_transformer.model.policy import ComputePolicy
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
    ) -> None:
        """Finds the tasks and reads their data; nothing is computed.

        Raises:
            UserError: lm-eval is missing, a task is not known, its data cannot be had, the run has no tokenizer, or
                the layout has a pipeline or spans processes.
        """
        if jax.process_count() > 1:
            raise UserError(
                f"evaluate.tasks cannot run within a training of {jax.process_count()} processes; leave evaluate.every "
                "out, and evaluate its checkpoints with: mesh-transformer evaluate RUN --tasks ..."
            )
        tasks = load_tasks(evaluate.tasks, include_path=evaluate.include_path, num_fewshot=evaluate.num_fewshot)
        from mesh_transformer.evaluate.harness import HarnessModel

        # No gradient is wanted, and so there is nothing to compute again.
        self._model = HarnessModel(cfg, {}, dataclasses.replace(policy, remat="none"), tokenizer, layout)
        self._limit = evaluate.limit
        self._loaded = tasks.manager.load(list(tasks.loaded))
        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEEDS[3])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, those of groups one by one."""
        return tuple(self._loaded["tasks"])

    @property
    def n_compiled(self) -> int:
        """Programs compiled until now for scoring."""
        return self._model.scorer.n_compiled

    def __call__(self, params: Params) -> dict[str, dict[str, float]]:
        """Metrics of each task and group with their standard errors: {"piqa": {"acc": 0.6, "acc_stderr": 0.01}}.

        Raises:
            UserError: a request cannot be computed.
        """
        from lm_eval.evaluator import evaluate

        model = self._model.with_params(params)
        try:
            with in_this_process(), quietly(), quiet_stdout():
                found = evaluate(
                    lm=model,
                    task_dict=self._loaded,
                    limit=self._limit,
                    bootstrap_iters=FEW_BOOTSTRAPS,
                    log_samples=False,
                )
        finally:
            model.with_params({})  # so that parameters which training goes on from are not kept
        assert found is not None
        return plain_metrics(found)


def evaluation_of(
    run: RunConfig, policy: ComputePolicy, tokenizer: Tokenizer | None, layout: Layout
) -> TrainingEvaluation:
    """The evaluation that a run asks for. Raises UserError as `TrainingEvaluation`."""
    return TrainingEvaluation(run.evaluate, run.model, policy, tokenizer, layout)
