"""Draws the pictures of docs/parallelism.md, as SVG beside itself: what each mesh axis divides, and what is sent when.

python docs/images/axes.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

HERE = Path(__file__).parent
N = 4  # devices, layers, stages and microbatches of the pictures
WIDTH, MARGIN, GAP = 760, 16, 12
PANEL = (WIDTH - 2 * MARGIN - (N - 1) * GAP) / N
LABEL, BAR = 92, 16  # of a panel: width of the words, height of a bar

# Readable on a light and on a dark page: the picture brings its own ground and follows the reader's setting.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #222 }
.title { font-weight: 600 } .small { font-size: 11px } .middle { text-anchor: middle }
.on { fill: #fff }
.ground { fill: #fff } .panel { fill: #f3f4f6; stroke: #c8ccd2 } .empty { fill: #fff; stroke: #b4bac2 }
.batch { fill: #c99a2e } .weights { fill: #3b73b9 } .moments { fill: #6b8e4e } .work { fill: #dfe3e8; stroke: #b4bac2 }
.send { fill: #c4442f } .idle { fill: none; stroke: #b4bac2; stroke-dasharray: 3 3 }
.line { stroke: #c4442f; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e6ea } .ground { fill: #16181c } .panel { fill: #22262c; stroke: #444a52 }
  .empty { fill: #16181c; stroke: #565d67 } .work { fill: #39404a; stroke: #565d67 } .idle { stroke: #565d67 }
  .batch { fill: #d5aa48 } .weights { fill: #6f9fdb } .moments { fill: #8db36e } .send, .line { fill: #e8715d }
  .line { fill: none; stroke: #e8715d } .on { fill: #16181c }
}
"""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A picture: which part of each bar every device holds, and the order of work and sending within a step.

    A bar is "part" (a device has its own quarter) or "whole". Of a time line, capital words are work and the others
    are sending; "|" begins a new group.
    """

    name: str
    title: str
    bars: tuple[tuple[str, str, str], ...]  # word, colour, "part" or "whole"
    time: str
    sent: tuple[str, ...]


SEQUENCES, PARAMETERS, MOMENTS = "sequences", "parameters", "moments"
STRATEGIES = (
    Strategy(
        "data",
        "mesh.data = 4: every device has the whole model and a quarter of the batch",
        ((SEQUENCES, "batch", "part"), (PARAMETERS, "weights", "whole"), (MOMENTS, "moments", "whole")),
        "F1 F2 F3 F4 | B4 B3 B2 B1 | sum | UPDATE",
        ("sum: gradients of all devices are added, and each gets the sum, once a step (all-reduce)",),
    ),
    Strategy(
        "fsdp-zero-1",
        "mesh.fsdp = 4, zero = 1: the moments are divided too; each device updates a quarter",
        ((SEQUENCES, "batch", "part"), (PARAMETERS, "weights", "whole"), (MOMENTS, "moments", "part")),
        "F1 F2 F3 F4 | B4 B3 B2 B1 | scatter | UPDATE | gather",
        (
            "scatter: gradients are added, and each device gets the quarter that it updates (reduce-scatter)",
            "gather: the updated quarters go to all (all-gather)",
        ),
    ),
    Strategy(
        "fsdp-zero-3",
        "mesh.fsdp = 4, zero = 3: everything is divided; a layer is whole only while it is computed with",
        ((SEQUENCES, "batch", "part"), (PARAMETERS, "weights", "part"), (MOMENTS, "moments", "part")),
        "g F1 g F2 g F3 g F4 | g B4 s g B3 s g B2 s g B1 s | UPDATE",
        (
            "g: the layer's parameters are gathered from all, forward and again backward (all-gather)",
            "s: the layer's gradients are added, and each device keeps its quarter (reduce-scatter)",
        ),
    ),
    Strategy(
        "tensor",
        "mesh.tensor = 4: every device has a quarter of the heads and columns, and sees every sequence",
        ((SEQUENCES, "batch", "whole"), (PARAMETERS, "weights", "part"), (MOMENTS, "moments", "part")),
        "F1 + F2 + F3 + F4 + | B4 + B3 + B2 + B1 + | UPDATE",
        (
            "+: partial results of the layer are added (all-reduce). What is sent are activations, not parameters:",
            "it grows with the batch, and does not depend on the width of the feed-forward",
        ),
    ),
)


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{words}</text>'


def box(x: float, y: float, w: float, h: float, kind: str, radius: float = 2) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{radius}" class="{kind}"/>'


def panels(strategy: Strategy, top: float) -> list[str]:
    """The devices side by side, each with its bars; a bar has N cells, those that the device holds are filled."""
    drawn = []
    for device in range(N):
        x = MARGIN + device * (PANEL + GAP)
        drawn.append(box(x, top, PANEL, 34 + len(strategy.bars) * (BAR + 8), "panel", 6))
        drawn.append(text(x + 10, top + 18, f"device {device}", "title"))
        for row, (word, colour, how) in enumerate(strategy.bars):
            y = top + 30 + row * (BAR + 8)
            drawn.append(text(x + 10, y + 12, word, "small"))
            cell = (PANEL - LABEL - 8) / N
            for part in range(N):
                held = how == "whole" or part == device
                drawn.append(box(x + LABEL - 8 + part * cell, y, cell - 2, BAR, colour if held else "empty"))
    return drawn


def time_line(line: str, top: float) -> list[str]:
    """A step from left to right: grey boxes are work, red ones sending."""
    words = line.split()
    weights = {word: 0.35 if len(word) == 1 else 1.6 if word.isupper() and len(word) > 2 else 1.0 for word in words}
    weights |= {word: 1.3 for word in words if word.islower() and len(word) > 1} | {"|": 0.25}
    unit = (WIDTH - 2 * MARGIN) / sum(weights[word] for word in words)
    drawn, x = [], float(MARGIN)
    for word in words:
        w = weights[word] * unit
        if word != "|":
            sending = not word[0].isupper()
            drawn.append(box(x, top, w - 2, 26, "send" if sending else "work"))
            label = word.lower() if len(word) > 2 else word
            drawn.append(text(x + w / 2 - 1, top + 17, label, "small middle on" if sending else "small middle"))
        x += w
    return drawn


def picture(title: str, height: float, drawn: list[str]) -> str:
    """A whole SVG; the title is also what a screen reader says."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img">'
    ground = box(0, 0, WIDTH, height, "ground", 0)
    body = [f"<title>{title}</title>", f"<style>{STYLE}</style>", ground, text(MARGIN, 24, title, "title"), *drawn]
    return "\n".join([head, *body, "</svg>", ""])


def of_strategy(strategy: Strategy) -> str:
    drawn = panels(strategy, 38)
    top = 38 + 34 + len(strategy.bars) * (BAR + 8) + 14
    drawn.append(text(MARGIN, top + 10, "one step: F forward and B backward through layers 1 to 4", "small"))
    drawn += time_line(strategy.time, top + 18)
    lines = [text(MARGIN, top + 64 + 16 * i, words, "small") for i, words in enumerate(strategy.sent)]
    return picture(strategy.title, top + 60 + 16 * len(lines) + 6, drawn + lines)


def pipeline() -> str:
    """Stages over ticks: microbatches go down, one stage a tick, and the corners idle."""
    ticks = 2 * N - 1
    left, top, cell, row = MARGIN + 152.0, 62.0, 78.0, 34.0
    drawn = [text(left + tick * cell + cell / 2, top - 8, f"tick {tick + 1}", "small middle") for tick in range(ticks)]
    for stage in range(N):
        y = top + stage * row
        drawn.append(text(MARGIN, y + 19, f"device {stage}: layer {stage + 1}", "title"))
        for tick in range(ticks):
            x, number = left + tick * cell, tick - stage
            if 0 <= number < N:
                drawn += [
                    box(x, y, cell - 14, 26, "weights"),
                    text(x + cell / 2 - 7, y + 17, f"{number + 1}", "middle on"),
                ]
                if stage + 1 < N:
                    drawn.append(f'<path class="line" d="M{x + cell - 14:.0f} {y + 20:.0f} l14 {row - 12:.0f}"/>')
            else:
                drawn.append(box(x, y, cell - 14, 26, "idle"))
    y = top + N * row + 12
    words = (
        "A number is a microbatch; a red line, its activations sent to the next stage. Dashed: the device waits, for",
        "(S - 1) / (M + S - 1) of the time with S stages and M microbatches: 3 of 7 ticks here, 3 of 19 with M = 16.",
        "The backward pass is the same, from the last stage to the first. Parameters are not sent.",
    )
    drawn += [text(MARGIN, y + 4 + 16 * i, line, "small") for i, line in enumerate(words)]
    title = "mesh.pipeline = 4: every device has a quarter of the layers; microbatches pass through"
    return picture(title, y + 16 * len(words), drawn)


def main() -> None:
    for strategy in STRATEGIES:
        (HERE / f"axis-{strategy.name}.svg").write_text(of_strategy(strategy), encoding="utf-8")
    (HERE / "axis-pipeline.svg").write_text(pipeline(), encoding="utf-8")


if __name__ == "__main__":
    main()
