"""The error budget as JSON and as a self-contained HTML page."""

import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import torch

from parity_tests.support.budget import Budget, Row
from pdrunet_jax.evaluate.report.html import Section, html_table, note, render_page, settings
from pdrunet_jax.runtime.run_folder import environment

TITLES = {
    "activations, eval": "Activations in evaluation mode, in order of the forward pass (maximum over all cases)",
    "activations, train": "Activations in training mode, in order of the forward pass (maximum over all cases)",
    "gradients": "Gradient of each parameter, relative to its norm (maximum over all cases)",
}


def write(path: Path, budget: Budget, devices: Mapping[str, str]) -> Path:
    """Write the budget to `path` as JSON and next to it as HTML; returns the page's path."""
    facts = {"torch": torch.__version__, **environment(), **{f"device of {k}": v for k, v in devices.items()}}
    facts["tolerances"] = "measured on CPUs" if Budget.measured_here else "the standard's"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": facts, **budget.as_dict()}, indent=1) + "\n", encoding="utf-8")
    page = path.with_suffix(".html")
    page.write_text(_page(budget, facts), encoding="utf-8")
    return page


def _page(budget: Budget, facts: Mapping[str, Any]) -> str:
    rows = list(budget.sorted_rows())
    over = sum(_verdict(row) == "over" for row in rows)
    numbers = [
        (f"{len(rows)}", f"comparisons over {sum(row.cases for row in rows):,} cases"),
        (f"{over}" if over else "none", "over tolerance"),
    ]
    head = ["comparison", "type", "verdict", "worst case", "level", "measured", "tolerance", "cases"]
    cells = [
        [
            *(row.comparison, row.dtype, _verdict(row), row.worst, f"{row.level}"),
            *(f"{row.measured:.1e}", _tolerance(row), f"{row.cases}"),
        ]
        for row in rows
    ]
    drawn = [
        (comparison.replace(", ", "-"), title, _picture(budget, comparison, title))
        for comparison, title in TITLES.items()
    ]
    about = note("Each known porting mistake, made on purpose, and the check that detected it.")
    controls = html_table(["mistake", "detected by"], budget.controls.items(), words=2)
    sections: list[Section] = [
        *(section for section in drawn if section[2]),
        ("budget", "Error budget", html_table(head, cells, words=4)),
        ("controls", "Negative controls", about + controls),
        ("environment", "Environment", settings({"": facts})),
    ]
    subtitle = "The same weights and inputs in both frameworks: largest error measured, and its tolerance."
    return render_page("Parity of pdrunet-jax with PyTorch", [subtitle], numbers, sections)


def _verdict(row: Row) -> str:
    if row.tolerance is None:
        return ""
    return "within" if row.measured <= row.tolerance else "over"  # NaN is over


def _tolerance(row: Row) -> str:
    if row.tolerance is None:
        return "none"
    return "bit-equal" if row.tolerance == 0 else f"{row.tolerance:.1e}"


def _picture(budget: Budget, comparison: str, title: str) -> str:
    """Dot plot of the error by layer, on a logarithmic scale, one colour per dtype; empty without errors."""
    series = {dtype: errors for (_, name, dtype), errors in budget.layers.items() if name == comparison}
    if not series:
        return ""
    names = list(dict.fromkeys(name for errors in series.values() for name in errors))
    exponents = [math.log10(e) for errors in series.values() for e in errors.values() if 0 < e < math.inf]
    low, high = math.floor(min(exponents, default=-16)), math.ceil(max(exponents, default=0))
    step, height, left = 13 if len(names) < 80 else 9, 200, 48
    width = left + step * len(names)

    def place(number: int, exponent: float) -> tuple[float, float]:
        return left + step * (number + 0.5), 30 + height * (high - exponent) / max(high - low, 1)

    # Axis of errors, with the legend above it.
    parts = []
    for exponent in range(low, high + 1, max(1, (high - low) // 7)):
        _, y = place(0, exponent)
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">1e{exponent}</text>')
    for index, (dtype, errors) in enumerate(series.items()):
        x = left + 90 * index
        parts.append(
            f'<circle class="dot line-{index}" cx="{x}" cy="12" r="4"/><text x="{x + 8}" y="16">{dtype}</text>'
        )
        for number, name in enumerate(names):
            if 0 < (error := errors.get(name, 0.0)) < math.inf:
                x_dot, y = place(number, math.log10(error))
                label = f"<title>{escape(name)}, {dtype}: {error:.1e}</title>"
                parts.append(f'<circle class="dot line-{index}" cx="{x_dot:.1f}" cy="{y:.1f}" r="3">{label}</circle>')

    # Axis of layers: the first layer of each block is labelled.
    blocks: dict[str, int] = {}
    for number, name in enumerate(names):
        block = ".".join(name.split(".")[:2]) if name.startswith("bottleneck") else name.split(".")[0]
        blocks.setdefault(block, number)
    for block, number in blocks.items():
        x = left + step * number
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="30" y2="{height + 36}"/>')
        turned = f'transform="rotate(60 {x + 3} {height + 44})"'
        parts.append(f'<text x="{x + 3}" y="{height + 44}" {turned}>{escape(block)}</text>')
    # Not scaled to the page: the plot scrolls.
    size = f'style="width: {width + 50}px" viewBox="0 0 {width + 50} {height + 135}"'
    return f'<div class="wide"><svg {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></div>'
