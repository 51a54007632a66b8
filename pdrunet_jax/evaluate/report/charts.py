"""Curves drawn as SVG that takes its colours from the page, and those of training read from metrics.jsonl."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 34, 40
_LONGEST_TITLE = 36
_MOST_POINTS = 400


def read_metrics(path: Path) -> dict[str, Points]:
    """The finite values of every key over `step`, in order; the last one where a resumed run wrote a step again.

    A half-written last line, which a killed run may leave, is passed over. A file that is not there has no values.
    """
    values: dict[str, dict[float, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(entry, dict) or not _number(entry.get("step")):
            continue
        for key, value in entry.items():
            if key != "step" and _number(value):
                values.setdefault(key, {})[entry["step"]] = value
    return {key: sorted(points.items()) for key, points in values.items()}


@dataclass(frozen=True)
class Marks:
    """What a chart shows beside its curves.

    Attributes:
        axis: Name of the horizontal axis.
        at: A vertical line, and the words beside it.
        reference: Points of a thin line that the curves are to be held against.
        bars: (from, to, height), in the units of the axes, drawn behind everything.
    """

    axis: str = "step"
    at: tuple[float, str] | None = None
    reference: Points = field(default_factory=list)
    bars: Sequence[tuple[float, float, float]] = ()


def curve(title: str, series: Mapping[str, Points], top: float | None = None, marks: Marks | None = None) -> str:
    """One chart as an SVG element: a polyline for each of `series`, of class `line-0`, `line-1`, ...

    Args:
        title: Above the chart, and its accessible name.
        series: Label to points (step, value). At least one is not empty.
        top: Upper end of the value axis; the largest value when None. Values that fall to less than a tenth then get
            a logarithmic axis, on which the end of training can still be read.
        marks: What else is drawn.
    """
    marks = marks or Marks()
    points = [point for line in (*series.values(), marks.reference) for point in line]
    low, high = min(y for _, y in points), max(y for _, y in points)
    logarithmic = top is None and 0 < low < 0.1 * high
    values = _log_ticks(low, high) if logarithmic else _ticks(low, high if top is None else top, 5)
    right = max(1.0, *(x for x, _ in points))
    steps = [step for step in _ticks(0, right, 5) if step <= right]

    def height(y: float) -> float:
        return math.log(y) if logarithmic else y

    bottom, span = height(values[0]), height(values[-1]) - height(values[0])

    def place(x: float, y: float) -> tuple[float, float]:
        up = (height(y) - bottom) / span
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / right, _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * up

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="{_LEFT}" y="20">{escape(_shortened(title))}</text>')
    for start, end, tall in marks.bars:
        (x, y), (x_end, y_end) = place(start, tall), place(end, values[0])
        size = f'width="{x_end - x - 1:.1f}" height="{y_end - y:.1f}"'
        parts.append(f'<rect class="bar" x="{x + 0.5:.1f}" y="{y:.1f}" {size}/>')
    for value in values:
        _, y = place(0, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{value:g}</text>')
    for step in steps:
        x, _ = place(step, values[0])
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{_HEIGHT - 22}">{_short(step)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick" text-anchor="middle" x="{middle}" y="{_HEIGHT - 5}">{escape(marks.axis)}</text>')
    if marks.reference:
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in marks.reference)
        parts.append(f'<polyline class="reference" points="{path}"/>')
    if marks.at is not None:
        x, y = place(marks.at[0], values[0])
        side, shift = ("start", 5) if marks.at[0] < right / 2 else ("end", -5)
        parts.append(f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{y:.1f}"/>')
        where = f'text-anchor="{side}" x="{x + shift:.1f}" y="{y - 8:.1f}"'
        parts.append(f'<text class="label" {where}>{escape(marks.at[1])}</text>')
    legend = float(_WIDTH - _RIGHT)
    for number, (label, line) in reversed(list(enumerate(series.items()))):
        if not line:
            continue
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in _thinned(line))
        parts.append(f'<polyline class="line line-{number}" points="{path}"/>')
        if len(line) <= 40:  # few enough to see each validation
            parts += [
                '<circle class="dot line-{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>'.format(number, *place(x, y))
                for x, y in line
            ]
        parts.append(f'<text class="label" text-anchor="end" x="{legend:.0f}" y="20">{escape(label)}</text>')
        legend -= 7.4 * len(label) + 8
        parts.append(f'<line class="line line-{number}" x1="{legend - 14:.0f}" x2="{legend:.0f}" y1="16" y2="16"/>')
        legend -= 26
    return "".join(parts) + "</svg>"


def _shortened(title: str) -> str:
    return title if len(title) <= _LONGEST_TITLE else f"{title[: _LONGEST_TITLE - 1]}…"


def _thinned(points: Points) -> Points:
    """At most about `_MOST_POINTS` points, each the mean of its neighbours: a screen shows no more."""
    group = math.ceil(len(points) / _MOST_POINTS)
    chunks = [points[start : start + group] for start in range(0, len(points), group)]
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _ticks(low: float, high: float, wanted: int) -> Sequence[float]:
    """Round numbers from at or below `low` to at or above `high`, about `wanted` of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / wanted
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> Sequence[float]:
    """1, 2 and 5 times powers of ten around `low` and `high`; powers of ten alone over more than three of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
    first = max(number for number, tick in enumerate(ticks) if tick <= low)
    last = min((number for number, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[first : last + 1]


def _short(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
