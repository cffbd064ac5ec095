"""Charts as SVG elements: lines over the iterations, and calibration. Colors come from the page's style sheet.

Classes: `s0`, `s1` … are the series, `grid`, `axis` and `muted` the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

POINTS = 400
"""A longer line is drawn with this number of points, each a mean."""


@dataclass(frozen=True)
class Line:
    """A series: `number` chooses its color, `dots` marks every point."""

    number: int
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """A panel of a chart, with its own y axis."""

    title: str
    lines: Sequence[Line]
    unit: str = ""


def panels_svg(panels: Sequence[Panel], xlabel: str, label: str, *, width: int, height: int = 190) -> str:
    """Return panels of `height` below each other that share the x axis, `width` units wide; `label` says it in words.

    Values that are not finite are left out.
    """
    xs = [x for panel in panels for line in panel.lines for x, _ in line.points]
    ticks = nice_ticks(xs, max(width // 90, 2), whole=True)
    left, right, top = 46, 14, 30
    across = _scale(ticks, left, width - right)
    parts = []
    for number, panel in enumerate(panels):
        above, below = number * height + top, (number + 1) * height - 14
        y_ticks = nice_ticks([y for line in panel.lines for _, y in line.points], 4)
        down = _scale(y_ticks, below, above)
        parts.append(f'<text class="title" x="0" y="{above - 14}">{escape(panel.title)}</text>')
        for y in y_ticks:
            parts.append(f'<path class="grid" d="M{left} {down(y):.1f}H{width - right}"/>')
            parts.append(f'<text x="{left - 7}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}{panel.unit}</text>')
        for line in panel.lines:
            points = [(across(x), down(y)) for x, y in thinned(line.points)]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            parts.append(f'<path class="line s{line.number}" d="M{path}"/>' if path else "")
            if line.dots or len(points) == 1:  # a single point has no line
                parts += [f'<circle class="dot s{line.number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    bottom = len(panels) * height
    for x in ticks:
        parts.append(f'<path class="axis" d="M{across(x):.1f} {bottom - 14}v5"/>')
        parts.append(f'<text x="{across(x):.1f}" y="{bottom + 6}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<path class="axis" d="M{left} {bottom - 14}H{width - right}"/>')
    middle = f'x="{(left + width - right) / 2:.0f}" y="{bottom + 26}" text-anchor="middle"'
    parts.append(f"<text {middle}>{escape(xlabel)}</text>")
    return _svg(parts, width, bottom + 32, label)


def calibration_svg(
    counts: Sequence[int], confidence: Sequence[float | None], accuracy: Sequence[float | None], label: str
) -> str:
    """Return the reliability diagram: accuracy over confidence, and the share of pixels in each bin as columns."""
    size, left, right, top = 330, 46, 310, 14
    across, down = _scale([0, 1], left, right), _scale([0, 1], size - 44, top)
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path class="grid" d="M{left} {down(share):.1f}H{right}"/>')
        parts.append(f'<text x="{left - 7}" y="{down(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        parts.append(f'<text x="{across(share):.1f}" y="{size - 26}" text-anchor="middle">{share:.0%}</text>')
    total, step = max(sum(counts), 1), 1 / max(len(counts), 1)
    for number, count in enumerate(counts):
        x, y = across(number * step), down(count / total)
        parts.append(f'<rect class="column" x="{x + 1:.1f}" y="{y:.1f}" width="{across(step) - left - 2:.1f}" '
                     f'height="{down(0) - y:.1f}"/>')  # fmt: skip
    parts.append(f'<path class="axis dashed" d="M{across(0)} {down(0)}L{across(1)} {down(1)}"/>')
    known = [(c, a) for c, a in zip(confidence, accuracy, strict=True) if c is not None and a is not None]
    points = [f"{across(c):.1f} {down(a):.1f}" for c, a in known]
    parts.append(f'<path class="line s0" d="M{"L".join(points)}"/>' if points else "")
    parts += [f'<circle class="dot s0" cx="{across(c):.1f}" cy="{down(a):.1f}" r="3"/>' for c, a in known]
    parts.append(f'<text x="{(left + right) / 2:.0f}" y="{size - 6}" text-anchor="middle">confidence</text>')
    return _svg(parts, size, size, label)


def _svg(parts: Iterable[str], width: int, height: int, label: str) -> str:
    head = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return f"{head}{''.join(parts)}</svg>"


def _scale(ticks: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = ticks[0], ticks[-1]
    return lambda value: start + (value - low) / (high - low) * (end - start)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most POINTS finite points: means of neighbors."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= POINTS:
        return finite
    return [(float(x), float(y)) for x, y in (part.mean(0) for part in np.array_split(np.array(finite), POINTS))]


def nice_ticks(values: Sequence[float], count: int, whole: bool = False) -> list[float]:
    """Return round numbers, or `whole` ones, about `count`, from below the least to above the greatest finite value."""
    finite = [float(value) for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if high - low <= 1e-9 * max(1, abs(low), abs(high)):
        low, high = (low, low + 1) if low >= 0 else (high - 1, high)
    rough = max((high - low) / count, 1 if whole else 0)
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
