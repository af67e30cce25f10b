"""Answers of a load run made into figures."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from mesh_transformer.bench.load_client import DONE, REFUSED, VANISHED, Answer

# Memory is flat if the median of the run's last fifth is above that of its first by no more than the larger of these.
FLAT_SHARE, FLAT_BYTES = 0.02, 16 * 2**20


def summary(answers: Sequence[Answer], begun: float) -> dict[str, Any]:
    """Counts by kind, tokens a second from `begun` to the last answer's end, and times in seconds.

    time_to_first_token: from before connecting to the first text, waiting in the queue included. time_per_token: of a
    completion, from its first text to its last over its tokens but one. time_between_pieces: of all streams together;
    what other requests do to a running one shows in its largest.
    """
    by_kind = collections.Counter(a.kind for a in answers)
    whole = [a for a in answers if a.kind == DONE]
    streamed = [a for a in answers if a.kind in (DONE, VANISHED) and a.pieces]
    n_tokens = sum(a.n_tokens for a in answers)
    seconds = max((a.ended for a in answers), default=begun) - begun
    return {
        "seconds": seconds,
        "requests": len(answers),
        "done": by_kind[DONE],
        "vanished": by_kind[VANISHED],
        "refused": by_kind[REFUSED],
        "failed": sum(a.failed for a in answers),
        "failures": dict(collections.Counter(a.kind for a in answers if a.failed)),
        "output_tokens": n_tokens,
        "cached_prompt_tokens": sum(a.n_cached for a in answers),
        "tokens_per_second": n_tokens / seconds if seconds > 0 else 0.0,
        "time_to_first_token": quantiles([a.pieces[0] - a.begun for a in streamed]),
        "time_per_token": quantiles(
            [(a.pieces[-1] - a.pieces[0]) / (a.n_tokens - 1) for a in whole if len(a.pieces) > 1]
        ),
        "time_between_pieces": quantiles(
            [later - earlier for a in streamed for earlier, later in zip(a.pieces, a.pieces[1:], strict=False)]
        ),
    }


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 99th percentile and largest; None of nothing."""
    if not values:
        return None
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "max": max(values)}


def memory(samples: Sequence[int]) -> dict[str, Any] | None:
    """Resident bytes over a run, sampled evenly: medians of the first and last fifth, and whether flat."""
    if len(samples) < 5:
        return None
    fifth = len(samples) // 5
    first, last = (float(np.median(part)) for part in (samples[:fifth], samples[-fifth:]))
    flat = last - first <= max(FLAT_BYTES, FLAT_SHARE * first)
    return {"first_fifth": first, "last_fifth": last, "flat": flat, "samples": list(samples)}
