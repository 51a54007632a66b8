"""compare.html: the results of a comparison as one self-contained page."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pdrunet_jax.compare import tables
from pdrunet_jax.data import overlay
from pdrunet_jax.evaluate.report.charts import Points, curve, intervals, key_of
from pdrunet_jax.evaluate.report.html import Cell, Section, embedded, html_table, legend, note, render_page, settings
from pdrunet_jax.evaluate.scores import format_score
from pdrunet_jax.runtime.files import atomic_write, writing

MOST_ROWS = 2_000
"""Images in the table of every image."""
OPEN_ROWS = 40
"""Largest number of images shown unfolded."""
KINDS = {"hard": "hard for all networks", "apart": "networks differ most"}


def write_page(
    folder: Path,
    values: Mapping[str, Any],
    curves: Mapping[str, Points],
    images: Sequence[Sequence[Cell]],
    common: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write compare.html in `folder` and return its path.

    Args:
        folder: The folder of the comparison, with the pictures of the cases.
        values: The content of compare.json.
        curves: Validation Dice of each network by step.
        images: Image, patient, and the Dice of each network.
        common: Settings that all networks share, by section.

    Raises:
        RunError: it cannot be written.
    """
    sections: list[Section] = [
        ("scores", "Scores", _scores(values)),
        ("differences", "Differences", _differences(values)),
        ("cost", "Time and memory", _cost(values)),
        ("curves", "Validation during training", _curves(values, curves)),
        ("cases", "Images to look at", _cases(folder, values)),
        ("images", "Every image", _images(values, images)),
        ("configuration", "Settings of all networks", settings(common)),
        ("environment", "Environment", settings({"": values["environment"]})),
    ]
    best = max(values["models"], key=lambda model: _dice(model, values)["mean"] or -math.inf)
    numbers = [
        (format_score(_dice(best, values)["mean"]), f"best mean Dice: {best['network']}"),
        (f"{values['images']}", f"images of {values['patients']} patients"),
        (f"{len(values['models'])}", "networks"),
        (f"{len(values['seeds'])}", "seeds" if len(values["seeds"]) > 1 else "seed"),
    ]
    subtitle = [tables.caption(values), values["environment"]["started"].replace("T", " "), values["device"]]
    title = f"Networks compared on {values['dataset']}"
    path = folder / "compare.html"
    with writing(path):
        atomic_write(path, render_page(title, subtitle, numbers, sections))
    return path


def _dice(model: Mapping[str, Any], values: Mapping[str, Any]) -> Mapping[str, Any]:
    statistics: Mapping[str, Any] = model["scores"][values["overall"]]["dice"]
    return statistics


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _row(name: str, each: Mapping[str, Any]) -> tuple[str, float, float, float, list[float]]:
    """A row of `intervals`; seeds are shown if there are several."""
    seeds = [value for value in each["by_seed"] if value is not None] if len(each["by_seed"]) > 1 else []
    return name, _number(each["mean"]), _number(each["low"]), _number(each["high"]), seeds


def _table(table: tables.Table, words: int) -> str:
    return html_table(table[0], table[1:], words)


def _scores(values: Mapping[str, Any]) -> str:
    means = [_row(model["network"], _dice(model, values)) for model in values["models"]]
    dice = [each for each in tables.from_first(values) if each["metric"] == "dice"]
    apart = [_row(each["network"], each) for each in dice]
    charts = ""
    if all(math.isfinite(row[1]) for row in (*means, *apart)):
        against = intervals(f"Dice minus {values['models'][0]['network']}", apart, first=1, zero=True)
        charts = f'<div class="charts">{intervals("Dice", means)}{against}</div>'
        dots = ", small: each seed" if len(values["seeds"]) > 1 else ""
        charts += note(f"Large dots: mean, with 95% interval{dots}.")
    table = _table(tables.score_table(values), tables.score_words(values))
    return charts + table + "".join(map(note, tables.notes(values)))


def _differences(values: Mapping[str, Any]) -> str:
    pairs = note("Dice of every pair, with 95% interval:") + _table(tables.pair_table(values), 1)
    return _table(tables.difference_table(values), 2) + note(tables.difference_note(values)) + pairs


def _cost(values: Mapping[str, Any]) -> str:
    return _table(tables.cost_table(values), 1) + note(tables.COST_NOTE)


def _curves(values: Mapping[str, Any], curves: Mapping[str, Points]) -> str:
    if not all(curves.values()):
        return note("None: the trainings have no common validations.")
    seconds = {model["network"]: model["step_seconds"] for model in values["models"]}
    timed = {name: [(step * seconds[name], dice) for step, dice in points] for name, points in curves.items()}
    charts = [
        curve("Validation Dice", curves, 1.0, key=False),
        curve("Validation Dice", timed, 1.0, axis="seconds of training", key=False),
    ]
    words = (
        "Mean over seeds and folds, at the resolution of training. Seconds: steps times the measured time of a step."
    )
    return f'<div class="charts">{"".join(charts)}</div>{key_of(list(curves))}{note(words)}'


def _cases(folder: Path, values: Mapping[str, Any]) -> str:
    if not values["cases"]:
        return note("None: no image has a defined Dice.")
    parts = [legend("Masks of the networks:", overlay.LEGEND)]
    if len(values["classes"]) > 1:
        colours = ((name, overlay.colour_of(index)) for index, name in enumerate(values["classes"], 1))
        parts.append(legend("Classes of the truth:", colours))
    for case in values["cases"]:
        names = ["image", "truth"]
        names += [
            f"{model['network']}, Dice {format_score(case['dice'][model['network']])}" for model in values["models"]
        ]
        panels = "".join(
            f'<figure><img alt="{escape(name)}" src="{embedded(folder / file)}"><figcaption>{escape(name)}</figcaption>'
            "</figure>"
            for name, file in zip(names, case["panels"], strict=True)
        )
        head = f'<b>{KINDS[case["kind"]]}</b> <span class="quiet">{escape(case["image"])}</span>'
        parts.append(f'<div class="case">{head}<div>{panels}</div></div>')
    words = f"Masks and their Dice are of seed {values['seeds'][0]}; images are chosen by the mean over all seeds."
    return "".join(parts) + note(words)


def _images(values: Mapping[str, Any], images: Sequence[Sequence[Cell]]) -> str:
    head = ["image", "patient", *(model["network"] for model in values["models"])]
    limit = note(f"The first {MOST_ROWS:,}; compare.csv has all.") if len(images) > MOST_ROWS else ""
    table = html_table(head, images[:MOST_ROWS], 2, sortable=True)
    opened = " open" if len(images) <= OPEN_ROWS else ""
    words = note("Dice, mean over classes and seeds.")
    return f"<details{opened}><summary>{len(images)} images</summary>{words}{limit}{table}</details>"
