"""Generation under numerical differences: which tokens must agree, and which may not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mesh_transformer.api import Model


@dataclasses.dataclass(frozen=True)
class Agreement:
    """tokens: compared. differing: texts that go apart, each where the best two logits are closer than the bound; what
    comes after is not compared.
    """

    tokens: int
    differing: int


def greedy_agreement(
    prompts: Sequence[Sequence[int]],
    expected: Sequence[list[int]],
    found: Sequence[list[int]],
    model: Model,
    bound: float,
) -> Agreement:
    """Compares greedy texts; `model` and `expected` are those of one device.

    Args:
        bound: twice the largest difference of a logit that arithmetic in another order may make.

    Raises:
        AssertionError: a token differs where the best two logits are further apart than `bound`.
    """
    tokens = differing = 0
    for prompt, ours, theirs in zip(prompts, expected, found, strict=True):
        assert len(ours) == len(theirs)
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
        tokens += at
        if at < len(ours):
            logits = np.sort(model.logits([[*prompt, *ours[:at]]])[0, -1])
            margin = float(logits[-1] - logits[-2])
            assert margin <= bound, f"token {at} differs though the margin is {margin}"
            differing += 1
    return Agreement(tokens, differing)
