"""report.html of a run folder: one page that needs nothing but itself."""

import base64
import csv
import json
import statistics
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from pdrunet_jax import curves, pictures
from pdrunet_jax.errors import RunError, UserError
from pdrunet_jax.files import atomic_write
from pdrunet_jax.rows import METRICS
from pdrunet_jax.runfolder import RunFolder
from pdrunet_jax.scores import label, remarks

EVALUATION = Path("evaluation") / "test"
"""Where in the run folder the scores of the test split are."""


def write_report(run_folder: str | Path) -> Path:
    """Write report.html from what lies in `run_folder`, and return its path.

    Parts that are not there yet (scores before the run has ended) are named as missing. Raises `UserError` if the
    folder holds no run, `RunError` if it cannot be written.
    """
    run = RunFolder(run_folder)
    if not run.config.is_file():
        raise UserError(f"{run.path} is no run folder: it has no config.toml")
    config = tomllib.loads(run.config.read_text(encoding="utf-8"))
    environment = config.pop("environment", {})
    metrics = curves.read_metrics(run.metrics)
    folder = run.path / EVALUATION
    summary = _read_summary(folder)
    page = Template(resources.files("pdrunet_jax").joinpath("templates", "report.html").read_text(encoding="utf-8"))
    text = page.substitute(
        title=escape(run.path.resolve().name),
        subtitle=_subtitle(summary, environment),
        figures=_figures(summary, metrics),
        scores=_scores(summary, folder),
        curves=_curves(metrics),
        cases=_cases(summary, folder),
        data=_data(summary),
        speed=_speed(metrics, environment),
        configuration=_configuration(config),
        environment=_environment(environment),
    )
    try:
        atomic_write(run.report, text)
    except OSError as error:
        raise RunError(f"{run.report}: cannot be written ({error.strerror})") from None
    return run.report


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def _subtitle(summary: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    parts = [
        f"PDR-UNet on {summary['dataset']['name']}" if summary else "PDR-UNet",
        str(environment.get("started", "")).replace("T", " "),
        str(environment.get("device", "")),
    ]
    return escape(" · ".join(part for part in parts if part))


def _figures(summary: Mapping[str, Any], metrics: Mapping[str, curves.Points]) -> str:
    """The few numbers at the top."""
    figures = []
    if summary:
        dice = summary["macro"]["dice"]
        figures.append((_score(dice["mean"]), f"test Dice, 95 % interval {_bounds(dice)}"))
        figures.append((f"{summary['images']}", f"test images of {summary['patients']} patients"))
    if validation := metrics.get("val/dice"):
        step, best = max(validation, key=lambda point: point[1])
        figures.append((_score(best), f"best validation Dice, at step {step:,.0f}"))
    if loss := metrics.get("train/loss"):
        figures.append((f"{loss[-1][0]:,.0f}", "training steps"))
    return "".join(
        f'<div class="figure"><b>{escape(number)}</b><span>{escape(what)}</span></div>' for number, what in figures
    )


def _scores(summary: Mapping[str, Any], folder: Path) -> str:
    if not summary:
        return _missing("None yet: they are computed when the run ends, or by python -m pdrunet_jax.evaluate.")
    groups = dict(summary["classes"])
    if len(groups) > 1:
        groups["mean of classes"] = summary["macro"]
    rows = [
        [
            name,
            label(metric, summary["unit"], summary["tolerance"]),
            _score(s["mean"]),
            _bounds(s),
            _score(s["median"]),
            _score(s["std"]),
            str(s["images"]),
        ]
        for name, values in groups.items()
        for metric, s in values.items()
    ]
    head = ["class", "metric", "mean", "95 % interval", "median", "std", "images"]
    notes = [
        "At each image's own resolution, ignored pixels left out. Intervals of the mean: bootstrap over patients.",
        *(f"{remark}." for remark in remarks(summary)),
    ]
    return _table(head, rows, text=2) + "".join(_missing(note) for note in notes) + _per_image(folder)


def _per_image(folder: Path) -> str:
    path = folder / "per_image.csv"
    if not path.is_file():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    columns = [name in METRICS for name in head]
    short = [[_score(float(cell)) if score else cell for cell, score in zip(row, columns, strict=True)] for row in rows]
    title = f"<summary>Every image ({len({row[0] for row in rows})})</summary>"
    return f"<details>{title}{_table([name.replace('_', ' ') for name in head], short, text=3)}</details>"


def _curves(metrics: Mapping[str, curves.Points]) -> str:
    charts = []
    for title, name, top in (("Loss", "loss", None), ("Dice", "dice", 1.0)):
        series = {"training": metrics.get(f"train/{name}", []), "validation": metrics.get(f"val/{name}", [])}
        if any(series.values()):
            charts.append(curves.curve(title, series, top))
    if not charts:
        return _missing("None yet: metrics.jsonl has no values.")
    return f'<div class="charts">{"".join(charts)}</div>'


def _cases(summary: Mapping[str, Any], folder: Path) -> str:
    if not summary.get("cases"):
        return _missing("None yet: they come with the test scores.")
    parts = [f'<p class="quiet">Difference:{_legend(pictures.LEGEND)}</p>']
    classes = summary["dataset"]["classes"]
    if len(classes) > 1:
        colours = [(name, pictures.colour_of(index)) for index, name in enumerate(classes, 1)]
        parts.append(f'<p class="quiet">Classes:{_legend(colours)}</p>')
    for case in summary["cases"]:
        figures = "".join(
            f'<figure><img alt="{panel}" src="{_embedded(folder / file)}"><figcaption>{panel}</figcaption></figure>'
            for panel, file in zip(pictures.PANELS, case["panels"], strict=True)
        )
        head = f"<b>{escape(case['kind'])}</b>, Dice {_score(case['dice'])}"
        parts.append(
            f'<div class="case">{head} <span class="quiet">{escape(case["image"])}</span><div>{figures}</div></div>'
        )
    return "".join(parts)


def _legend(colours: Iterable[tuple[str, tuple[int, int, int]]]) -> str:
    return " ".join(
        f'<span class="key"><i style="background: rgb{colour}"></i>{escape(name)}</span>' for name, colour in colours
    )


def _data(summary: Mapping[str, Any]) -> str:
    if not summary:
        return _missing("The splits are written with the test scores.")
    dataset = summary["dataset"]
    rows = [[name, str(split["images"]), str(split["patients"])] for name, split in dataset["splits"].items()]
    notes = [f"Classes: {', '.join(dataset['classes'])}", *dataset["notes"]]
    return _table(["split", "images", "patients"], rows, text=1) + "".join(_missing(note) for note in notes)


def _speed(metrics: Mapping[str, curves.Points], environment: Mapping[str, Any]) -> str:
    rows = []
    if rates := [value for _, value in metrics.get("time/images_per_second", [])]:
        rows.append(["training, images per second (median)", f"{statistics.median(rates):.3g}"])
    if waits := [value for _, value in metrics.get("time/data_wait", [])]:
        rows.append(["share of step time spent waiting for data (median)", f"{statistics.median(waits):.1%}"])
    if not rows:
        return _missing("Not measured yet.")
    if device := environment.get("device"):
        rows.append(["device", str(device)])
    return _table([], rows, text=1)


def _configuration(config: Mapping[str, Any]) -> str:
    top = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sections = {"": top} | {key: value for key, value in config.items() if isinstance(value, dict)}
    tables = "".join(_pairs(values, name) for name, values in sections.items() if values)
    return f'<div class="sections">{tables}</div>'


def _environment(environment: Mapping[str, Any]) -> str:
    if not environment:
        return _missing("Not recorded.")
    facts = {key: value for key, value in environment.items() if key != "restarts"}
    if restarts := environment.get("restarts"):
        facts["restarts"] = len(restarts)
    return f'<div class="sections">{_pairs(facts, "")}</div>'


def _pairs(values: Mapping[str, Any], caption: str) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "none"
        if isinstance(value, dict):
            return ", ".join(f"{key} = {item}" for key, item in value.items()) or "none"
        return str(value)

    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(shown(value))}</td></tr>" for key, value in values.items())
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}{rows}</table>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int) -> str:
    """A table whose first `text` columns hold words and the others numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        styled = (
            f"<{tag}>{escape(cell)}</{tag}>" if column < text else f'<{tag} class="number">{escape(cell)}</{tag}>'
            for column, cell in enumerate(cells)
        )
        return f"<tr>{''.join(styled)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th") if head else ""}{body}</table></div>'


def _score(value: float | None) -> str:
    return "n/a" if value is None or value != value else f"{value:.3f}"


def _bounds(statistic: Mapping[str, Any]) -> str:
    return f"{_score(statistic['low'])} to {_score(statistic['high'])}"


def _missing(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def _embedded(path: Path) -> str:
    """The picture as a data URL; a transparent pixel where the file is gone."""
    if not path.is_file():
        return "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
