"""What the original's how-to advises for fine-tuning, as remarks on a configuration that departs from it."""

from __future__ import annotations

from mesh_transformer.config.run import RunConfig

# The original's guide, for all parameters.
_FULL_RATE = (1e-5, 5e-5)
# Ten times as much, and around the 2e-4 of Hu et al. 2021. B
# begins at zero, and a step of Adam in A and B changes the product by less than the same step in the matrix would.
_LORA_RATE = (1e-4, 5e-4)
_END = (5, 10)  # parts of the peak
_WARMUP = (0.05, 0.10)  # of the steps


def tuning_advice(run: RunConfig) -> list[str]:
    """A line for each value of the schedule that lies outside what is advised for a run that begins from a model.

    Remarks, never errors. Those that compare with the steps are left out while the run is given in epochs.
    """
    train = run.train
    low, high = _LORA_RATE if run.lora else _FULL_RATE
    kind = "with [lora]" if run.lora else "of all parameters"
    lines = []
    if not low <= train.learning_rate <= high:
        lines.append(
            f"train.learning_rate = {train.learning_rate:g}; usual in fine-tuning {kind} is {low:g} to {high:g}"
        )
    if train.steps is None:
        return lines
    most, least = (train.learning_rate / part for part in _END)
    if not _about(least, train.end_learning_rate, most):
        lines.append(
            f"train.end_learning_rate = {train.end_learning_rate:g}; usual in fine-tuning is a tenth to a fifth of "
            f"train.learning_rate, {least:g} to {most:g}"
        )
    # Of few steps no whole number may lie between; the nearest is as good.
    shortest, longest = int(_WARMUP[0] * train.steps), -int(-_WARMUP[1] * train.steps // 1)
    if not shortest <= train.warmup_steps <= longest:
        lines.append(
            f"train.warmup_steps = {train.warmup_steps}; usual in fine-tuning is 5 to 10 % of the {train.steps} "
            f"steps, {shortest} to {longest}"
        )
    rest = max(0, train.steps - train.warmup_steps)
    if train.anneal_steps != rest:
        lines.append(
            f"train.anneal_steps = {train.anneal_steps}; usual in fine-tuning is what remains after the warm-up, {rest}"
        )
    return lines


def _about(low: float, value: float, high: float) -> bool:
    """low <= value <= high, rounding aside."""
    return low * (1 - 1e-6) <= value <= high * (1 + 1e-6)
