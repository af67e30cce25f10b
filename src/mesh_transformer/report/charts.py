"""Line charts and intervals as SVG that stands in the page itself and takes its colours from it."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence

from mesh_transformer.report.comparing import Estimate

_WIDTH, _HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 12, 12, 40
_MOST_POINTS = 600  # of a line; more would not be seen, and make the page heavy
_COLOURS = 6  # classes c0 to c5 of the page's style


@dataclasses.dataclass(frozen=True)
class Line:
    """Points (x, y) in the order of x. marks: each is shown by a dot; errors: half the length of a bar at each."""

    name: str
    points: Sequence[tuple[float, float]]
    marks: bool = False
    errors: Sequence[float | None] | None = None


def line_chart(title: str, lines: Sequence[Line], *, x: str, y: str, logarithmic: bool = False) -> str:
    """An SVG of some lines; empty text where no line has a point that can be drawn.

    Args:
        x, y: what the axes say.
        logarithmic: of the vertical axis; what is not positive is left out.
    """
    drawn = [_thinned(_drawable(line, logarithmic)) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    horizontal = _Scale.linear([p[0] for line in drawn for p in line.points], _LEFT, _WIDTH - _RIGHT, whole=True)
    make = _Scale.logarithmic if logarithmic else _Scale.linear
    vertical = make(list(_extents(drawn)), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}: {html.escape(y)} against {html.escape(x)}">'
    ]
    parts += _axes(horizontal, vertical, x, y)
    for number, line in enumerate(drawn):
        parts.append(_curve(line, horizontal, vertical, number % _COLOURS))
    parts.append("</svg>")
    if len(drawn) > 1:
        keys = (f'<span class="key c{i % _COLOURS}">{html.escape(line.name)}</span>' for i, line in enumerate(drawn))
        parts.append(f'<div class="legend">{"".join(keys)}</div>')
    return "".join([*parts, "</figure>"])


def interval(before: Estimate | None, after: Estimate) -> str:
    """Two dots with bars of one standard error over one another, before above after."""
    shown = [e for e in (before, after) if e is not None and math.isfinite(e.mean)]
    if not shown:
        return ""
    ends = [e.mean + sign * (e.error or 0.0) for e in shown for sign in (-1, 1)]
    low, high = min(ends), max(ends)
    room = (high - low) or max(abs(high), 1.0) * 0.1
    low, high = low - 0.08 * room, high + 0.08 * room
    parts = ['<svg class="interval" viewBox="0 0 160 32" role="img" aria-label="before above after">']
    for estimate, level, colour in ((before, 9, 0), (after, 23, 1)):
        if estimate is None or not math.isfinite(estimate.mean):
            continue
        at, left, right = (
            8 + 144 * (value - low) / (high - low)
            for value in (
                estimate.mean,
                estimate.mean - (estimate.error or 0.0),
                estimate.mean + (estimate.error or 0.0),
            )
        )
        parts.append(
            f'<g class="c{colour}"><path d="M{left:.1f} {level}H{right:.1f}"/>'
            f'<circle cx="{at:.1f}" cy="{level}" r="4"/></g>'
        )
    return "".join([*parts, "</svg>"])


@dataclasses.dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float  # of the axis, in units of the picture
    end: float
    ticks: tuple[float, ...]
    is_log: bool = False

    @classmethod
    def linear(cls, values: list[float], start: float, end: float, *, whole: bool = False) -> _Scale:
        low, high = min(values), max(values)
        if low == high:
            low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
        step = _round_step((high - low) / 5)
        if whole:
            step = max(1.0, step)
        ticks = tuple(step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))
        return cls(low, high, start, end, ticks)

    @classmethod
    def logarithmic(cls, values: list[float], start: float, end: float) -> _Scale:
        low, high = math.log10(min(values)), math.log10(max(values))
        if high - low < 0.2:
            low, high = low - 0.2, high + 0.2
        every = max(1, math.ceil((high - low) / 6))
        powers = [float(n) for n in range(math.ceil(low), math.floor(high) + 1, every)]
        if len(powers) < 2:  # less than a decade: some of its multiples too
            powers = [n + math.log10(k) for n in range(math.floor(low), math.ceil(high) + 1) for k in (1, 2, 5)]
        return cls(low, high, start, end, tuple(10**p for p in powers if low <= p <= high), is_log=True)

    def at(self, value: float) -> float:
        """Where a value lies in the picture."""
        place = math.log10(value) if self.is_log else value
        return self.start + (self.end - self.start) * (place - self.low) / (self.high - self.low)


def _drawable(line: Line, logarithmic: bool) -> Line:
    keep = [i for i, (_, y) in enumerate(line.points) if math.isfinite(y) and (y > 0 or not logarithmic)]
    errors = [line.errors[i] for i in keep] if line.errors is not None else None
    return dataclasses.replace(line, points=[line.points[i] for i in keep], errors=errors)


def _thinned(line: Line) -> Line:
    """With at most `_MOST_POINTS` points, each the mean of as many neighbours; the ends stay where they are."""
    n = len(line.points)
    if n <= _MOST_POINTS or line.errors is not None:
        return line
    size = math.ceil(n / _MOST_POINTS)
    groups = [line.points[i : i + size] for i in range(0, n, size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return dataclasses.replace(line, points=[line.points[0], *means[1:-1], line.points[-1]])


def _extents(lines: Iterable[Line]) -> Iterable[float]:
    for line in lines:
        for i, (_, y) in enumerate(line.points):
            error = (line.errors[i] or 0.0) if line.errors is not None else 0.0
            yield from (y - error, y + error)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(k * power for k in (1, 2, 5, 10) if k * power >= step * (1 - 1e-9))


def _axes(horizontal: _Scale, vertical: _Scale, x: str, y: str) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for tick in vertical.ticks:
        at = vertical.at(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in horizontal.ticks:
        at = horizontal.at(tick)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{_WIDTH - _RIGHT}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(x)}</text>')
    turned = f'transform="translate(14 {(_TOP + bottom) / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{html.escape(y)}</text>')
    return parts


def _curve(line: Line, horizontal: _Scale, vertical: _Scale, colour: int) -> str:
    places = [(horizontal.at(x), vertical.at(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<g class="c{colour}"><path class="line" d="M{path}"/>']
    for i, ((x, y), (_, value)) in enumerate(zip(places, line.points, strict=True)):
        error = line.errors[i] if line.errors is not None else None
        if error:
            parts.append(f'<path d="M{x:.1f} {vertical.at(value - error):.1f}V{vertical.at(value + error):.1f}"/>')
        if line.marks or len(places) == 1:
            label = f"{line.name}, {number(line.points[i][0])}: {number(value)}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{html.escape(label)}</title></circle>')
    return "".join([*parts, "</g>"])


def number(value: float) -> str:
    """Short and readable: 4 digits that count, thousands set apart, powers of ten for what is very large or small."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-3 <= abs(value) < 1e6:
        digits = max(0, 3 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.3g}"
