"""Four-bit numbers of weights: the choice of each group's scale, and two numbers to a byte."""

from __future__ import annotations

import numpy as np

ZERO = 8  # the number that stands for a weight of 0; numbers are 0..15
_LOW, _HIGH = -ZERO, 15 - ZERO

# What the largest weight of a group, with its sign, is divided by to give a scale: the first puts it on the last level,
# the next three beyond that, where it is cut off in favour of finer steps for the rest; the last puts it on a level
# that has an opposite.
CANDIDATES = (-8.0, -8.4, -8.8, -9.4, -7.0)
_BLOCK = 1 << 16  # weights at a time: they and what is made of them stay in a core's cache


def round_groups(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [inputs, outputs] -> (uint8 [inputs / 2, outputs], float16 scales [inputs / group, outputs]).

    A group is `group` (even) weights that follow one another along the inputs. Its scale is that of the candidates,
    rounded to float16, with the smallest sum of squared errors, the first of equal ones; a weight becomes the nearest
    of the 16 levels. A group of zeros has scale 0.

    Raises:
        ValueError: a weight is not finite, or so large that its scale is not.
    """
    n_inputs, n_outputs = w.shape
    values = np.empty((n_inputs // 2, n_outputs), np.uint8)
    scale = np.empty((n_inputs // group, n_outputs), np.float16)
    columns = min(n_outputs, max(64, _BLOCK // group))
    rows = max(1, _BLOCK // (group * columns))  # of groups
    for g in range(0, len(scale), rows):
        for n in range(0, n_outputs, columns):
            groups, cols = slice(g, g + rows), slice(n, n + columns)
            block = np.asarray(w[g * group : (g + rows) * group, cols], np.float32)
            block = block.reshape(-1, group, block.shape[1])
            numbers, scale[groups, cols] = _best(block)
            pairs = numbers.reshape(-1, 2, block.shape[2])
            values[g * group // 2 : (g + rows) * group // 2, cols] = pairs[:, 0] | pairs[:, 1] << 4
    return values, scale


def _best(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [groups, group, outputs] -> numbers 0..15 in the same shape, float16 scales [groups, outputs]."""
    high, low = w.max(1), w.min(1)
    largest = np.where(high >= -low, high, low)
    if not np.isfinite(largest).all():  # NaN is the largest and the smallest of its group
        raise ValueError("a weight is not finite")
    best_error = np.full(largest.shape, np.inf, np.float32)
    best_scale = np.zeros(largest.shape, np.float32)
    for candidate in CANDIDATES:
        with np.errstate(over="ignore", invalid="ignore"):  # a scale that float16 does not reach is never the best
            scale = (largest / np.float32(candidate)).astype(np.float16).astype(np.float32)
            apart = _rounded(w, scale)
            apart *= scale[:, None]
            apart -= w
            error = np.einsum("gkn,gkn->gn", apart, apart)
        better = error < best_error
        best_error[better], best_scale[better] = error[better], scale[better]
    if not np.isfinite(best_error).all():
        raise ValueError("a weight is too large")
    numbers = _rounded(w, best_scale)
    numbers += np.float32(ZERO)
    return numbers.astype(np.uint8), best_scale.astype(np.float16)


def _rounded(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """w / scale to the nearest of the levels -8..7; 0 where the scale is 0."""
    with np.errstate(divide="ignore"):
        per_step = np.where(scale == 0, np.float32(0), 1 / scale)
    levels = w * per_step[:, None]
    np.rint(levels, out=levels)
    return np.clip(levels, _LOW, _HIGH, out=levels)
