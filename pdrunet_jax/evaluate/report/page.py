"""report.html of a run folder or of an evaluation: one page that needs nothing but itself."""

import base64
import hashlib
import statistics
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from pdrunet_jax.evaluate.report import charts as curves
from pdrunet_jax.evaluate.report.html import Cell, figures, html_table, note, pairs, score
from pdrunet_jax.evaluate.report.sections import (
    EvaluationFolder,
    calibration_of,
    cases_of,
    comparison_of,
    data_of,
    every_image,
    figures_of,
    read_scored,
    scores_of,
)
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import atomic_write
from pdrunet_jax.runtime.run_folder import RunFolder

EVALUATION = Path("evaluation")
"""Where in the run folder the scores of each split are."""

Section = tuple[str, str, str]
"""Id, heading and content."""


def write_report(run_folder: str | Path) -> Path:
    """Write report.html from what lies in `run_folder`, and return its path.

    The scores are those of the test images, or of the validation images where there are no others. Parts that are not
    there yet (scores before the run has ended) are named as missing. Raises `UserError` if the folder holds no run,
    `RunError` if it cannot be written.
    """
    run = RunFolder(run_folder)
    if not run.config.is_file():
        raise UserError(f"{run.path} is no run folder: it has no config.toml")
    config = tomllib.loads(run.config.read_text(encoding="utf-8"))
    environment = config.pop("environment", {})
    metrics = curves.read_metrics(run.metrics)
    scored = read_scored(run.path / EVALUATION / "test") or read_scored(run.path / EVALUATION / "val")
    sections = _of_scores(scored)
    sections.insert(1, ("curves", "Learning curves", _learning(metrics)))
    sections += [
        ("speed", "Speed", _speed(metrics, environment)),
        ("configuration", "Configuration", _configuration(config)),
        ("environment", "Environment", _environment(environment)),
    ]
    subtitle = [
        f"PDR-UNet on {scored.summary['dataset']['name']}" if scored else "PDR-UNet",
        str(environment.get("started", "")).replace("T", " "),
        str(environment.get("device", "")),
    ]
    numbers = [*figures_of(scored), *_progress(metrics)]
    return _write(run.report, run.path.resolve().name, subtitle, numbers, sections)


def write_evaluation_report(folder: str | Path) -> Path:
    """Write report.html into the folder that `write_evaluation` has written, from what lies there; returns its path.

    Raises `UserError` if there are no scores in it, `RunError` if it cannot be written.
    """
    folder = Path(folder)
    scored = read_scored(folder)
    if not scored:
        raise UserError(f"{folder} holds no evaluation: it has no summary.json")
    about, environment = scored.summary["about"], scored.summary.get("environment", {})
    rows: list[list[Cell]] = []
    if seconds := about.get("seconds"):
        rows = [
            ["images per second, with reading and scoring", f"{scored.summary['images'] / seconds:.3g}"],
            ["seconds in all", f"{seconds:.1f}"],
        ]
    sections = [
        *_of_scores(scored),
        ("speed", "Speed", html_table([], rows, text=1) if rows else note("Not measured.")),
        ("configuration", "Settings", f'<div class="sections">{pairs(about)}</div>'),
        ("environment", "Environment", _environment(environment)),
    ]
    dataset = scored.summary["dataset"]["name"]
    subtitle = [
        str(about.get("weights", "")),
        str(environment.get("started", "")).replace("T", " "),
        str(environment.get("device", "")),
    ]
    return _write(folder / "report.html", f"{dataset}, {scored.images}", subtitle, figures_of(scored), sections)


def _of_scores(scored: EvaluationFolder) -> list[Section]:
    """The sections that an evaluation has, in a run or by itself."""
    heading = f"Scores of the {scored.images}" if scored else "Scores"
    comparison = [("comparison", "Comparison", comparison_of(scored))] if scored.comparison else []
    return [
        ("scores", heading, scores_of(scored)),
        *comparison,
        ("cases", "Best, median and worst cases", cases_of(scored)),
        ("images", "Every image", every_image(scored)),
        ("calibration", "Calibration and threshold", calibration_of(scored)),
        ("data", "Data", data_of(scored)),
    ]


def _write(
    path: Path, title: str, subtitle: Iterable[str], numbers: Iterable[tuple[str, str]], sections: Sequence[Section]
) -> Path:
    templates = resources.files("pdrunet_jax.evaluate.report").joinpath("templates")
    script = templates.joinpath("sort.js").read_text(encoding="utf-8")
    page = Template(templates.joinpath("report.html").read_text(encoding="utf-8"))
    text = page.substitute(
        title=escape(title),
        subtitle=escape(" · ".join(part for part in subtitle if part)),
        figures=figures(numbers),
        sections="\n".join(
            f'<section id="{name}"><h2>{escape(heading)}</h2>{content}</section>' for name, heading, content in sections
        ),
        script=script,
        # No other script runs, whatever a name that is shown may hold, and nothing is loaded from anywhere.
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    try:
        atomic_write(path, text)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def _progress(metrics: Mapping[str, curves.Points]) -> list[tuple[str, str]]:
    """The numbers at the top that a run adds."""
    numbers = []
    if validation := metrics.get("val/dice"):
        step, best = max(validation, key=lambda point: point[1])
        numbers.append((score(best), f"best validation Dice, at step {step:,.0f}"))
    if loss := metrics.get("train/loss"):
        numbers.append((f"{loss[-1][0]:,.0f}", "training steps"))
    return numbers


def _learning(metrics: Mapping[str, curves.Points]) -> str:
    charts = []
    for title, name, top in (("Loss", "loss", None), ("Dice", "dice", 1.0)):
        series = {"training": metrics.get(f"train/{name}", []), "validation": metrics.get(f"val/{name}", [])}
        if any(series.values()):
            charts.append(curves.curve(title, series, top))
    if not charts:
        return note("None yet: metrics.jsonl has no values.")
    return f'<div class="charts">{"".join(charts)}</div>'


def _speed(metrics: Mapping[str, curves.Points], environment: Mapping[str, Any]) -> str:
    rows: list[list[Cell]] = []
    if rates := [value for _, value in metrics.get("time/images_per_second", [])]:
        rows.append(["training, images per second (median)", f"{statistics.median(rates):.3g}"])
    if waits := [value for _, value in metrics.get("time/data_wait", [])]:
        rows.append(["share of step time spent waiting for data (median)", f"{statistics.median(waits):.1%}"])
    if not rows:
        return note("Not measured yet.")
    if device := environment.get("device"):
        rows.append(["device", str(device)])
    return html_table([], rows, text=1)


def _configuration(config: Mapping[str, Any]) -> str:
    top = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sections = {"": top} | {key: value for key, value in config.items() if isinstance(value, dict)}
    tables = "".join(pairs(values, name) for name, values in sections.items() if values)
    return f'<div class="sections">{tables}</div>'


def _environment(environment: Mapping[str, Any]) -> str:
    if not environment:
        return note("Not recorded.")
    facts = {key: value for key, value in environment.items() if key != "restarts"}
    if restarts := environment.get("restarts"):
        facts["restarts"] = len(restarts)
    return f'<div class="sections">{pairs(facts)}</div>'
