"""The error budget as JSON and as one page that needs nothing else."""

import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parity_tests.support.budget import Budget
from pdrunet_jax.runtime.run_folder import environment

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6a7b; --line: #d9dee5; --page: #fff; --good: #1f7a4d;
  --bad: #b3261e; --a: #1f5fbf; --b: #c25e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa7b8; --line: #323b48; --page: #12161c;
  --good: #5cc48f; --bad: #ff8a80; --a: #7fb0ff; --b: #ffab5e; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  padding: 1.5rem; max-width: 72rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p, li { max-width: 46rem; } .soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif; } svg line { stroke: var(--line); }
.float64 { fill: var(--a); } .float32 { fill: var(--b); }
"""

TITLES = {
    "activations, eval": "Activations in evaluation mode, in the order of the forward pass (largest over all cases)",
    "activations, train": "Activations in training mode, in the order of the forward pass (largest over all cases)",
    "gradients": "Gradient of every parameter, as a share of its norm (largest over all cases)",
}


def write(path: Path, budget: Budget, devices: Mapping[str, str]) -> Path:
    """Write the budget to `path` as JSON and beside it as HTML; returns the page's path."""
    facts = {"torch": torch.__version__, **environment(), **{f"device of {k}": v for k, v in devices.items()}}
    facts["tolerances"] = "measured on CPUs" if Budget.measured_here else "the standard's"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": facts, **budget.as_dict()}, indent=1) + "\n", encoding="utf-8")
    page = path.with_suffix(".html")
    page.write_text(_page(budget, facts), encoding="utf-8")
    return page


def _page(budget: Budget, facts: Mapping[str, Any]) -> str:
    over = [row for row in budget.rows.values() if row.tolerance is not None and not row.measured <= row.tolerance]
    verdict = (
        f'<p class="bad">{len(over)} of {len(budget.rows)} comparisons are over their tolerance.</p>'
        if over
        else f'<p class="good">All {len(budget.rows)} comparisons are within their tolerance, over '
        f"{sum(row.cases for row in budget.rows.values()):,} cases.</p>"
    )
    environment_rows = "".join(f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in facts.items())
    controls = "".join(f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in budget.controls.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Parity of pdrunet-jax with PyTorch</title><style>{STYLE}</style></head><body>
<h1>Parity of pdrunet-jax with PyTorch</h1>
<p class="soft">The same weights and inputs in both frameworks: what was compared, the largest error measured, and what
it may be.</p>
{verdict}
{"".join(_picture(budget, comparison, title) for comparison, title in TITLES.items())}
<h2>Error budget</h2>
<div class="wide"><table><tr><th class="number">Level</th><th>Comparison</th><th>Type</th>
<th class="number">Measured</th><th class="number">Tolerance</th><th class="number">Cases</th><th>Worst</th></tr>
{"".join(map(_row, budget.sorted_rows()))}</table></div>
<h2>Negative controls</h2>
<p>Each known way to get the port wrong, done on purpose, and the check that failed for it.</p>
<div class="wide"><table><tr><th>What was broken</th><th>What caught it</th></tr>{controls}</table></div>
<h2>Measured with</h2>
<div class="wide"><table>{environment_rows}</table></div>
</body></html>
"""


def _row(row: Any) -> str:
    if row.tolerance is None:
        tolerance, mark = "none", ""
    else:
        tolerance = "bit-equal" if row.tolerance == 0 else f"{row.tolerance:.1e}"
        mark = "good" if row.measured <= row.tolerance else "bad"
    return (
        f'<tr><td class="number">{row.level}</td><td>{_text(row.comparison)}</td><td>{row.dtype}</td>'
        f'<td class="number {mark}">{row.measured:.1e}</td><td class="number">{tolerance}</td>'
        f'<td class="number">{row.cases}</td><td class="soft">{_text(row.worst)}</td></tr>'
    )


def _picture(budget: Budget, comparison: str, title: str) -> str:
    """Errors by layer on a logarithmic scale, a dot for each dtype."""
    series = {dtype: errors for (_, name, dtype), errors in budget.layers.items() if name == comparison}
    if not series:
        return ""
    names = list(dict.fromkeys(name for errors in series.values() for name in errors))
    exponents = [math.log10(e) for errors in series.values() for e in errors.values() if 0 < e < math.inf]
    low, high = math.floor(min(exponents, default=-16)), math.ceil(max(exponents, default=0))
    step, height, left = 13 if len(names) < 80 else 9, 200, 44
    width = left + step * len(names)

    def across(exponent: float) -> float:
        return 10 + height * (high - exponent) / max(high - low, 1)

    parts = []
    for exponent in range(low, high + 1, max(1, (high - low) // 7)):
        y = across(exponent)
        parts.append(f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 3:.1f}" text-anchor="end">1e{exponent}</text>')
    for dtype, errors in series.items():
        for number, name in enumerate(names):
            error = errors.get(name, 0.0)
            if 0 < error < math.inf:
                x, y = left + step * (number + 0.5), across(math.log10(error))
                label = f"<title>{_text(name)}, {dtype}: {error:.1e}</title>"
                parts.append(f'<circle class="{dtype}" cx="{x:.1f}" cy="{y:.1f}" r="3">{label}</circle>')
    blocks: dict[str, int] = {}
    for number, name in enumerate(names):
        block = ".".join(name.split(".")[:2]) if name.startswith("bottleneck") else name.split(".")[0]
        blocks.setdefault(block, number)
    for block, number in blocks.items():
        x = left + step * number
        parts.append(f'<line x1="{x}" x2="{x}" y1="10" y2="{height + 16}"/>')
        turned = f'transform="rotate(60 {x + 3} {height + 22})"'
        parts.append(f'<text x="{x + 3}" y="{height + 22}" {turned}>{_text(block)}</text>')
    legend = " ".join(
        f'<svg width="10" height="10"><circle class="{dtype}" cx="5" cy="5" r="4"/></svg> {dtype}' for dtype in series
    )
    size = f'width="{width + 50}" height="{height + 80}"'
    drawing = f'<svg {size} role="img" aria-label="{_text(title)}">{"".join(parts)}</svg>'
    return f'<h2>{_text(title)}</h2><p class="soft">{legend}</p><div class="wide">{drawing}</div>'


def _text(value: Any) -> str:
    return html.escape(str(value))
