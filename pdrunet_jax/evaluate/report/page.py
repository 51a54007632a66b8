"""report.html of a run folder or of an evaluation: one self-contained page."""

import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdrunet_jax.evaluate.report.charts import Points, curve, read_metrics
from pdrunet_jax.evaluate.report.html import Cell, Section, html_table, note, render_page, settings
from pdrunet_jax.evaluate.report.sections import EvaluationFolder, key_numbers, score_sections
from pdrunet_jax.evaluate.scores import format_score
from pdrunet_jax.model.folds import fold_folder
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write, writing
from pdrunet_jax.runtime.opening import read_text
from pdrunet_jax.runtime.run_folder import RunFolder


def write_report(run_folder: str | Path) -> Path:
    """Write report.html from the files in `run_folder`; returns its path.

    The scores are from the test images, or else from the validation images. Sections without data yet (scores before
    training ends) say so. Raises `UserError` if the folder is not a run, `RunError` if it cannot be written.
    """
    run = RunFolder(run_folder)
    if not run.config_file.is_file():
        raise UserError(f"{run.path} is not a run folder: config.toml is missing")
    config = tomllib.loads(read_text(run.config_file))
    environment = config.pop("environment", {})
    metrics = read_metrics(run.metrics)
    folders = (run.evaluation / split for split in ("test", "val"))
    scored = next(filter(None, map(EvaluationFolder.read, folders)), EvaluationFolder(run.path, {}, {}, {}))

    top = {key: value for key, value in config.items() if not isinstance(value, dict)}
    groups = {key: value for key, value in config.items() if isinstance(value, dict)}
    sections = score_sections(scored)
    sections.insert(1, ("curves", "Learning curves", _learning_curves(metrics)))
    sections += [
        ("speed", "Speed", _training_speed(metrics)),
        ("configuration", "Configuration", settings({"": top} | groups)),
    ]
    subtitle = f"PDR-UNet on {scored.summary['dataset']['name']}" if scored else "PDR-UNet"
    early = bool(scored) and "stopped_early" in scored.summary["about"]
    numbers = key_numbers(scored) + _training_numbers(metrics, early)
    return _write(run.report, run.path.resolve().name, subtitle, environment, numbers, sections)


def write_evaluation_report(folder: str | Path) -> Path:
    """Write report.html from the files that `write_evaluation` left in `folder`; returns its path.

    Raises `UserError` if the folder has no scores, `RunError` if it cannot be written.
    """
    folder = Path(folder)
    scored = EvaluationFolder.read(folder)
    if not scored:
        raise UserError(f"{folder} is not an evaluation: summary.json is missing")
    about, environment = dict(scored.summary["about"]), scored.summary.get("environment", {})
    folds = about.pop("folds", [])
    speed = note("Not measured.")
    if seconds := about.get("seconds"):
        rate = f"{scored.summary['images'] / seconds:.3g}"
        rows = [["images per second, including reading and scoring", rate], ["total seconds", f"{seconds:.1f}"]]
        speed = html_table([], rows, words=1)
    sections = [
        *score_sections(scored),
        *([("folds", "Folds", _folds(folds, Path(str(about.get("weights", folder)))))] if folds else []),
        ("speed", "Speed", speed),
        ("configuration", "Settings", settings({"": about})),
    ]
    title = f"{scored.summary['dataset']['name']}, {scored.split} images"
    subtitle = str(about.get("weights", about.get("predictions", "")))
    return _write(folder / "report.html", title, subtitle, environment, key_numbers(scored), sections)


def _folds(folds: Sequence[Mapping[str, Any]], parent: Path) -> str:
    """Test scores and best validation score of each fold in the folder `parent`."""
    rows: list[list[Cell]] = []
    for each in folds:
        run = fold_folder(parent, each["fold"])
        points = read_metrics(run.metrics).get("val/dice", [])
        step, best = max(points, key=lambda point: point[1]) if points else (None, None)
        bounds = f"{format_score(each['low'])} to {format_score(each['high'])}"
        counts = str(each["fold"]), str(each["images"]), str(each["patients"])
        rows.append([*counts, each["dice"], bounds, best, "" if step is None else f"{step:,.0f}"])
    head = ["fold", "images", "patients", "Dice", "95% interval", "best validation Dice", "at step"]
    words = (
        "Each image was scored by the fold that tests on it and was trained on none of its patient's images. Every "
        "fold has a report of its own: fold_1/report.html and so on."
    )
    return html_table(head, rows, words=1) + note(words)


def _write(
    path: Path,
    title: str,
    subtitle: str,
    environment: Mapping[str, Any],
    numbers: list[tuple[str, str]],
    sections: list[Section],
) -> Path:
    started, device = str(environment.get("started", "")).replace("T", " "), str(environment.get("device", ""))
    with writing(path):
        text = render_page(title, [subtitle, started, device], numbers, [*sections, _environment(environment)])
        atomic_write(path, text)
    return path


def _training_numbers(metrics: Mapping[str, Points], early: bool) -> list[tuple[str, str]]:
    """Best validation Dice and number of steps, each with its description, for the top of the page."""
    numbers = []
    if validation := metrics.get("val/dice"):
        step, best = max(validation, key=lambda point: point[1])
        numbers.append((format_score(best), f"best validation Dice, at step {step:,.0f}"))
    if loss := metrics.get("train/loss"):
        numbers.append((f"{loss[-1][0]:,.0f}", "training steps, stopped early" if early else "training steps"))
    return numbers


def _learning_curves(metrics: Mapping[str, Points]) -> str:
    charts = []
    for title, name, top in (("Loss", "loss", None), ("Dice", "dice", 1.0)):
        series = {"training": metrics.get(f"train/{name}", []), "validation": metrics.get(f"val/{name}", [])}
        if any(series.values()):
            charts.append(curve(title, series, top))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else note("None yet: metrics.jsonl has no values.")


def _training_speed(metrics: Mapping[str, Points]) -> str:
    rows: list[list[Cell]] = []
    if rates := [value for _, value in metrics.get("time/images_per_second", [])]:
        rows.append(["training images per second (median)", f"{statistics.median(rates):.3g}"])
    if waits := [value for _, value in metrics.get("time/data_wait", [])]:
        rows.append(["share of step time spent waiting for data (median)", f"{statistics.median(waits):.1%}"])
    return html_table([], rows, words=1) if rows else note("Not measured yet.")


def _environment(environment: Mapping[str, Any]) -> Section:
    facts = dict(environment)
    if "restarts" in facts:
        facts["restarts"] = len(facts["restarts"])
    return "environment", "Environment", settings({"": facts}) if facts else note("Not recorded.")
