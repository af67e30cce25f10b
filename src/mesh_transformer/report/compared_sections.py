"""The sections of a report that set two models beside each other."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

import numpy as np

from mesh_transformer.report.comparing import Estimate, Moved, compare_losses, most_moved
from mesh_transformer.report.observing import Copied, Material, Observation
from mesh_transformer.report.sections import compared_rows, estimate, paragraph, section, table, text

Decode = Callable[[Sequence[int]], str]
_MOVED = 15  # tokens in each direction


def losses(before: Observation | None, after: Observation) -> str:
    """Loss on held-out sequences, before and after."""
    found = compare_losses(before, after)
    if not found:
        return section("Held-out loss", paragraph("The run has no validation set: data.validation is empty."))
    n = max(len(values) for values in after.log_probs.values())
    words = (
        f"Mean cross-entropy in nats a token over at most {n} sequences of each set, with one standard error over "
        "sequences. The change is over pairs of the same sequence, which is why its error is smaller."
    )
    head = ["set", "before", "after", "change", "before above after"]
    rows = [[text(one.name), *cells] for one, cells in zip(found, compared_rows(found), strict=True)]
    return section("Held-out loss", paragraph(words), table(head, rows, numbers=(1, 2, 3)))


def samples(before: Observation | None, after: Observation, material: Material, decode: Decode) -> str:
    """Continuations of the same beginnings, side by side."""
    parts = [paragraph("Continuations at temperature 0.8, top-p 0.95, with the same seeds.")]
    for i, prompt in enumerate(material.prompts):
        texts = [("after", after.samples[i])]
        if before is not None:
            texts = [("before", before.samples[i]), *texts]
        columns = "".join(
            f"<div><h3>{name}</h3><div class=text><span class=quiet>{text(decode(prompt))}</span>"
            f"{text(decode(tokens))}</div></div>"
            for name, tokens in texts
        )
        parts.append(f"<div class=pair>{columns}</div>")
    return section("Samples", *parts)


def moved(before: Observation, after: Observation, material: Material, decode: Decode) -> str:
    """The tokens whose probability changed most."""
    gained, lost = most_moved(material, before, after, _MOVED)
    if not gained and not lost:
        why = "there is no held-out sequence to look at" if not material.held_out else "no probability changed"
        return section("Tokens that moved most", paragraph(f"None: {why}."))
    words = "Tokens of held-out sequences, in their places, by the change of their log-probability in nats."
    parts = [paragraph(words)]
    for title, found, kind in (("More likely", gained, "gain"), ("Less likely", lost, "loss")):
        rows = [
            [_probability(one.before), _probability(one.after), f"{one.change:+.2f}", _in_place(one, kind, decode)]
            for one in found
        ]
        if rows:
            parts.append(f"<h3>{title}</h3>" + table(["before", "after", "change", "where"], rows, numbers=(0, 1, 2)))
    return section("Tokens that moved most", *parts)


def _probability(log_probability: float) -> str:
    return f"{math.exp(log_probability):.3g}"


def _in_place(one: Moved, kind: str, decode: Decode) -> str:
    """The token within its context, line breaks shown by a sign."""
    context, token, rest = (decode(ids).replace("\n", "\u21b5") for ids in (one.context, [one.token], one.rest))
    return f'<span class=inline>{text(context)}<mark class="{kind}">{text(token)}</mark>{text(rest)}</span>'


def memorised(before: Observation | None, after: Observation, material: Material, decode: Decode) -> str:
    """How much of its training rows the model writes by itself, against rows that it has never seen."""
    if not after.copied["training"]:
        return section("Verbatim copies", paragraph("None: no row of the training data could be continued."))
    head = ["rows", "number", "mean, before", "mean, after", "longest, after", "complete, after"]
    rows = []
    for name, now in after.copied.items():
        if now:
            then = before.copied[name] if before else []
            complete = sum(one.longest == len(one.truth) for one in now)
            rows.append(
                [
                    text("training" if name == "training" else f"held out: {name}"),
                    str(len(now)),
                    estimate(_shared(then)) if then else "&ndash;",
                    estimate(_shared(now)),
                    str(max(one.longest for one in now)),
                    str(complete),
                ]
            )
    words = (
        "Each row is cut in half; the model goes on greedily from the first half, and the longest run of tokens that "
        "it shares with the true continuation (64 tokens at most) is counted. Rows of the training data that score far "
        "above held-out rows are memorised; held-out rows show how much of the text can be foreseen."
    )
    parts = [paragraph(words), table(head, rows, numbers=(1, 2, 3, 4, 5))]
    longest = max(after.copied["training"], key=lambda one: one.longest)
    if longest.longest:
        parts.append(_longest(longest, decode))
    return section("Verbatim copies", *parts)


def _shared(copied: Sequence[Copied]) -> Estimate:
    return Estimate.of(np.array([one.longest for one in copied], np.float64))


def _longest(one: Copied, decode: Decode) -> str:
    columns = "".join(
        f"<div><h3>{html.escape(title)}</h3><div class=text>{text(decode(ids))}</div></div>"
        for title, ids in (("the row goes on", one.truth), ("the model goes on", one.written))
    )
    return f"<h3>The longest copy of a training row: {one.longest} tokens</h3><div class=pair>{columns}</div>"
