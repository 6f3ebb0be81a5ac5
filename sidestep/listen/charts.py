"""Curves as HTML and inline SVG: the plot stretches with the page, its words keep their size. Loads no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
_MOST_POINTS = 400
_TICKS = 4
_SMOOTHING = 0.9
_LEAST_TO_SMOOTH = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of a chart: (step, value) in rising steps. Few points get dots; `is_noisy` adds a smoothed line."""

    name: str
    points: Sequence[Point]
    colour: str = "first"
    is_noisy: bool = False


def chart(title: str, curves: Sequence[Curve]) -> str:
    """Return a figure of these curves over the steps; empty when none has two points yet."""
    curves = [curve for curve in curves if len(curve.points) > 1]
    steps = [step for curve in curves for step, _ in curve.points]
    if len(set(steps)) < 2:
        return ""
    values = [value for curve in curves for _, value in curve.points]
    first, last = min(steps), max(steps)
    ticks = nice_ticks(min(values), max(values))
    low, high = min(ticks[0], min(values)), max(ticks[-1], max(values))

    def at(point: Point) -> tuple[float, float]:
        return 1000 * (point[0] - first) / (last - first), 1000 * (high - point[1]) / (high - low)

    lines = [f'<line class="grid" x1="0" x2="1000" y1="{at((0, t))[1]:.1f}" y2="{at((0, t))[1]:.1f}"/>' for t in ticks]
    lines += [_drawn(curve, [at(point) for point in thinned(curve.points)]) for curve in curves]
    for curve in curves:
        if curve.is_noisy and len(curve.points) >= _LEAST_TO_SMOOTH:
            lines.append(_line(curve, [at(point) for point in thinned(smoothed(curve.points))], "curve"))
    labels = [f'<span class="y" style="top:{at((0, t))[1] / 10:.2f}%">{_number(t)}</span>' for t in ticks]
    marks = sorted({round(first + (last - first) * share) for share in (0, 0.5, 1)})
    labels += [f'<span class="x" style="left:{at((m, 0))[0] / 10:.2f}%">{_place(m, marks)}</span>' for m in marks]
    keys = "".join(f'<span class="key" style="--colour:var(--{c.colour})">{escape(c.name)}</span>' for c in curves)
    told = "; ".join(f"{c.name} {_number(c.points[0][1])} to {_number(c.points[-1][1])}" for c in curves)
    data = {
        "first": first,
        "last": last,
        "series": [{"name": curve.name, "points": thinned(curve.points)} for curve in curves],
    }
    return (
        f'<figure class="chart card"><figcaption><b>{escape(title)}</b>{keys if len(curves) > 1 else ""}</figcaption>'
        f'<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{title}: {told}")}">{"".join(lines)}</svg>{"".join(labels)}</div>'
        f'<div class="reading">{escape(told)}</div>'
        f'<script type="application/json">{json.dumps(data)}</script></figure>'
    )


def _drawn(curve: Curve, points: Sequence[Point]) -> str:
    is_raw = curve.is_noisy and len(curve.points) >= _LEAST_TO_SMOOTH
    line = _line(curve, points, "curve raw" if is_raw else "curve")
    if len(points) > _LEAST_TO_SMOOTH:
        return line
    dots = (f'<path class="dot" style="--colour:var(--{curve.colour})" d="M{x:.1f} {y:.1f}h0.001"/>' for x, y in points)
    return line + "".join(dots)


def _line(curve: Curve, points: Sequence[Point], kind: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" style="--colour:var(--{curve.colour})" points="{path}"/>'


def nice_ticks(low: float, high: float) -> list[float]:
    """Return round numbers that span the values from `low` to `high`, about four of them."""
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / _TICKS
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough)
    count = math.ceil(high / step) - math.floor(low / step)
    return [round((math.floor(low / step) + place) * step, 12) for place in range(count + 1)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return a moving average that forgets at 0.9, unbiased at its start."""
    total, weight, result = 0.0, 0.0, []
    for step, value in points:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        result.append((step, total / weight))
    return result


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most 400 of the points, the first and the last among them."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    return [points[round(at * (len(points) - 1) / (_MOST_POINTS - 1))] for at in range(_MOST_POINTS)]


def _number(value: float) -> str:
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _place(mark: float, marks: Sequence[float]) -> str:
    return f"step {mark:g}" if mark == marks[-1] else f"{mark:g}"
