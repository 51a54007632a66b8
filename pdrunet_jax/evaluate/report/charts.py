"""Charts as SVG in the colours of the page: curves, and means with intervals; metrics.jsonl as curves."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from pdrunet_jax.runtime.run_folder import read_entries

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 466, 34, 260  # frame of the curves
_LONGEST_TITLE = 36
_ROW = 44  # height of a mean with its interval, and of its label above
_MOST_POINTS = 400
COLOURS = 7
"""Lines of different colours; further ones are dashed."""
_MOST_DOTS = 40  # largest number of points drawn as dots too, such as the validations of a run


def read_metrics(path: Path) -> dict[str, Points]:
    """Values of every key of metrics.jsonl by step; the last one if a resumed run wrote a step again.

    Values that are not finite, or too small or too large to draw, are left out. A missing file has no values.
    """
    values: dict[str, dict[float, float]] = {}
    for entry in filter(None, read_entries(path)):
        for key, value in entry.items():
            if key != "step" and isinstance(value, int | float) and (value == 0 or 1e-100 < abs(value) < 1e100):
                values.setdefault(key, {})[entry["step"]] = value
    return {key: sorted(points.items()) for key, points in values.items()}


def curve(
    title: str,
    series: Mapping[str, Points],
    top: float | None = None,
    *,
    axis: str = "step",
    at: tuple[float, str] | None = None,
    reference: Sequence[tuple[float, float]] = (),
    bars: Sequence[tuple[float, float, float]] = (),
    key: bool = True,
) -> str:
    """Draw one chart as an SVG element: a polyline of class `line-0`, `line-1`, ... for each of `series`.

    Args:
        title: Heading of the chart, and its accessible name.
        series: Label to points (step, value). At least one has points.
        top: Upper end of the value axis; None for the largest value. The axis is then logarithmic if the smallest
            value is positive and below a tenth of the largest, so that the end of training stays readable.
        axis: Title of the horizontal axis.
        at: Position and label of a vertical line.
        reference: Points of a dashed line to compare the curves with.
        bars: (from, to, height) of bars behind the curves.
        key: Name the curves next to the title, which has room for two; `key_of` names any number below the chart.
    """
    points = [point for line in (*series.values(), reference) for point in line]
    low, high = min(y for _, y in points), max(y for _, y in points)
    logarithmic = top is None and 0 < low < 0.1 * high
    values = _log_ticks(low, high) if logarithmic else _ticks(low, high if top is None else top)
    right = max(1.0, *(x for x, _ in points))
    scale = math.log if logarithmic else float
    bottom, span = scale(values[0]), scale(values[-1]) - scale(values[0])

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (_RIGHT - _LEFT) * x / right, _BOTTOM - (_BOTTOM - _TOP) * (scale(y) - bottom) / span

    def polyline(style: str, line: Sequence[tuple[float, float]]) -> str:
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        return f'<polyline class="{style}" points="{path}"/>'

    heading = title if len(title) <= _LONGEST_TITLE else f"{title[: _LONGEST_TITLE - 1]}…"
    parts = [_text(_LEFT, 20, heading, "start", "title")]
    for start, end, tall in bars:
        (x, y), (x_end, y_end) = place(start, tall), place(end, values[0])
        size = f'width="{x_end - x - 1:.1f}" height="{y_end - y:.1f}"'
        parts.append(f'<rect class="bar" x="{x + 0.5:.1f}" y="{y:.1f}" {size}/>')

    # Axes.
    for value in values:
        _, y = place(0, value)
        parts += [_line("grid", (_LEFT, y), (_RIGHT, y)), _text(_LEFT - 6, y + 4, f"{value:g}", "end")]
    for step in _ticks(0, right):
        if step <= right:
            short = f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"
            parts.append(_text(place(step, values[0])[0], _HEIGHT - 22, short))
    parts.append(_text((_LEFT + _RIGHT) / 2, _HEIGHT - 5, axis))

    # Annotations.
    if reference:
        parts.append(polyline("reference", reference))
    if at is not None:
        x, y = place(at[0], values[0])
        side, shift = ("start", 5) if at[0] < right / 2 else ("end", -5)
        parts += [_line("reference", (x, _TOP), (x, y)), _text(x + shift, y - 8, at[1], side)]

    # Curves, with the legend in the upper right corner, from right to left.
    legend = float(_RIGHT)
    for number, (label, line) in reversed(list(enumerate(series.items()))):
        if not line:
            continue
        parts.append(polyline(f"line {_tone(number)}", _thinned(line)))
        for x, y in line if len(line) <= _MOST_DOTS else ():
            parts.append('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>'.format(_tone(number), *place(x, y)))
        if not key:
            continue
        parts.append(_text(legend, 20, label, "end"))
        legend -= 7.4 * len(label) + 8
        parts.append(_line(f"line {_tone(number)}", (legend - 14, 16), (legend, 16)))
        legend -= 26
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
    return f"{head}{''.join(parts)}</svg>"


def key_of(names: Sequence[str]) -> str:
    """A key for curves or intervals of these names, as an HTML paragraph."""
    keys = (
        f'<span class="key"><svg viewBox="0 0 20 10"><path class="line {_tone(number)}" d="M0 5H20"/></svg>'
        f"{escape(name)}</span>"
        for number, name in enumerate(names)
    )
    return f'<p class="quiet keys">{" ".join(keys)}</p>'


def intervals(
    title: str, rows: Sequence[tuple[str, float, float, float, Sequence[float]]], *, first: int = 0, zero: bool = False
) -> str:
    """Draw means with their intervals below each other as an SVG element, in the colours of `curve`.

    Args:
        title: Heading of the chart, and its accessible name.
        rows: Label, mean, lower and upper end of the interval (NaN for none), and further values as hollow dots.
        first: Number of the first colour.
        zero: Draw a line at 0.
    """
    values = [value for _, *numbers, dots in rows for value in (*numbers, *dots) if math.isfinite(value)]
    ticks = _ticks(min([*values, 0.0] if zero else values), max([*values, 0.0] if zero else values))
    bottom = _TOP + _ROW * len(rows)

    def place(value: float) -> float:
        return 24 + (_RIGHT - 24) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [_text(24, 20, title, "start", "title")]
    for tick in ticks:
        at = place(tick)
        parts.append(_line("reference" if zero and tick == 0 else "grid", (at, _TOP), (at, bottom)))
        parts.append(_text(at, bottom + 18, f"{tick:g}"))
    for number, (label, mean, low, high, dots) in enumerate(rows):
        tone, y = _tone(first + number), _TOP + _ROW * number + 30
        parts.append(_text(30, y - 14, label, "start"))
        if math.isfinite(low) and math.isfinite(high):
            parts.append(_line(f"line {tone}", (place(low), y), (place(high), y)))
        parts += [f'<circle class="seed {tone}" cx="{place(dot):.1f}" cy="{y}" r="3"/>' for dot in dots]
        parts.append(f'<circle class="dot {tone}" cx="{place(mean):.1f}" cy="{y}" r="4.5"/>')
    head = f'<svg viewBox="0 0 {_WIDTH} {bottom + 28}" role="img" aria-label="{escape(title)}">'
    return f"{head}{''.join(parts)}</svg>"


def _tone(number: int) -> str:
    """Class of a line: its colour, dashed once all are used."""
    return f"line-{number % COLOURS}" + (" dashed" if number >= COLOURS else "")


def _text(x: float, y: float, words: str, anchor: str = "middle", style: str = "label") -> str:
    return f'<text class="{style}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _line(style: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{style}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _thinned(points: Points) -> Points:
    """About `_MOST_POINTS` points at most, each the mean of its neighbours; a screen shows no more."""
    group = math.ceil(len(points) / _MOST_POINTS)
    chunks = [points[start : start + group] for start in range(0, len(points), group)]
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _ticks(low: float, high: float) -> Sequence[float]:
    """About five round numbers, from at or below `low` to at or above `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / 5
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> Sequence[float]:
    """1, 2 and 5 times powers of ten around `low` and `high`; only powers of ten beyond three decades."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
    first = max(number for number, tick in enumerate(ticks) if tick <= low)
    last = min((number for number, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[first : last + 1]
