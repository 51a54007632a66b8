"""Report sections on an evaluation: scores, comparison, cases, every image, calibration, data."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pdrunet_jax.data import overlay
from pdrunet_jax.data.split import ALONE
from pdrunet_jax.evaluate import compare
from pdrunet_jax.evaluate.report.charts import curve
from pdrunet_jax.evaluate.report.html import Cell, Section, embedded, html_table, legend, note
from pdrunet_jax.evaluate.scores import METRICS, format_score, remarks, score_table
from pdrunet_jax.runtime.files import csv_name
from pdrunet_jax.runtime.opening import read_text

MOST_ROWS = 2_000  # in the table of every image: more would make the page too heavy for a phone
OPEN_ROWS = 40  # largest number of rows shown unfolded
SPLIT_TITLES = {"train": "training", "val": "validation"}

_NONE = "None yet. Scores are computed when training ends, or with `python -m pdrunet_jax.evaluate`."


@dataclass(frozen=True)
class EvaluationFolder:
    """Contents of a folder written by `write_evaluation`: summary.json, curves.json and comparison.json.

    Falsy if there are no scores.
    """

    folder: Path
    summary: Mapping[str, Any]
    curves: Mapping[str, Any]
    comparison: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "EvaluationFolder":
        """Read `folder`; missing files are empty."""
        paths = (folder / name for name in ("summary.json", "curves.json", "comparison.json"))
        return cls(folder, *(json.loads(read_text(path)) if path.is_file() else {} for path in paths))

    def __bool__(self) -> bool:
        return bool(self.summary)

    @property
    def split(self) -> str:
        """The split in words, for example "validation"."""
        return SPLIT_TITLES.get(self.summary["split"], self.summary["split"])

    @property
    def classes(self) -> list[str]:
        """Foreground classes of the dataset."""
        return list(self.summary["dataset"]["classes"])

    @property
    def has_patients(self) -> bool:
        """Whether patients are known, rather than each image counting as one."""
        return bool(self.summary["dataset"].get("patients_from") != ALONE)


def score_sections(scored: EvaluationFolder) -> list[Section]:
    """The sections of an evaluation, in order. Without scores they say so."""
    sections = [
        ("scores", f"Scores on the {scored.split} images" if scored else "Scores", _scores),
        *([("comparison", "Comparison", _comparison)] if scored.comparison else []),
        ("cases", "Best, median and worst cases", _cases),
        ("images", "Every image", _every_image),
        ("calibration", "Calibration and threshold", _calibration),
        ("data", "Data", _data),
    ]
    return [(name, heading, content(scored) if scored else note(_NONE)) for name, heading, content in sections]


def key_numbers(scored: EvaluationFolder) -> list[tuple[str, str]]:
    """Mean Dice and number of images, each with its description, for the top of the page."""
    if not scored:
        return []
    dice = scored.summary["macro"]["dice"]
    patients = f" of {scored.summary['patients']} patients" if scored.has_patients else ""
    bounds = f"{format_score(dice['low'])} to {format_score(dice['high'])}"
    return [
        (format_score(dice["mean"]), f"{scored.split} Dice, 95% interval {bounds}"),
        (f"{scored.summary['images']}", f"{scored.split} images{patients}"),
    ]


def _scores(scored: EvaluationFolder) -> str:
    head, *rows = score_table(scored.summary)
    drawn = "patients" if scored.has_patients else "images, as no patients are known"
    notes = [
        f"Scores at each image's own resolution, without ignored pixels. Interval of the mean: bootstrap over {drawn}.",
        *(f"{remark}." for remark in remarks(scored.summary)),
    ]
    if cleaning := {name: value for name, value in scored.summary["about"].get("cleaning", {}).items() if value}:
        notes.append(f"Masks were cleaned: {', '.join(f'{key} = {value}' for key, value in cleaning.items())}.")
    return html_table(head, rows, words=2) + "".join(map(note, notes))


def _comparison(scored: EvaluationFolder) -> str:
    head, *rows = compare.comparison_table(scored.comparison)
    changed_head, *changed = compare.changed_table(scored.comparison)
    most = html_table(changed_head, changed, words=1) if changed else ""
    return html_table(head, rows, words=2) + note(compare.caption(scored.comparison)) + most


def _cases(scored: EvaluationFolder) -> str:
    if not scored.summary.get("cases"):
        return note("None: no image has a defined Dice.")
    parts = [legend("Difference:", overlay.LEGEND)]
    if len(scored.classes) > 1:
        colours = ((name, overlay.colour_of(index)) for index, name in enumerate(scored.classes, 1))
        parts.append(legend("Classes:", colours))
    for case in scored.summary["cases"]:
        panels = "".join(
            f'<figure><img alt="{name}" src="{embedded(scored.folder / file)}"><figcaption>{name}</figcaption></figure>'
            for name, file in zip(overlay.PANELS, case["panels"], strict=True)
        )
        head = f"<b>{escape(case['kind'])}</b>, Dice {format_score(case['dice'])}"
        parts.append(
            f'<div class="case">{head} <span class="quiet">{escape(case["image"])}</span><div>{panels}</div></div>'
        )
    return "".join(parts)


def _every_image(scored: EvaluationFolder) -> str:
    """The sortable table of all images, or of those with the lowest Dice if there are very many."""
    path = scored.folder / "per_image.csv"
    if not path.is_file():
        return note("per_image.csv is missing.")
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    rows = [[csv_name(cell) for cell in row] for row in rows]
    images, limit = len({row[0] for row in rows}), ""
    if len(rows) > MOST_ROWS:
        dice = head.index("dice")
        rows = sorted(rows, key=lambda row: 0.0 if row[dice] == "nan" else float(row[dice]))[:MOST_ROWS]
        limit = note(f"The {MOST_ROWS:,} rows with the lowest Dice; per_image.csv has all.")
    same = {"class": len(scored.summary["classes"]) < 2, "patient": not scored.has_patients}
    columns = [number for number, name in enumerate(head) if not same.get(name)]
    names = [head[column] for column in columns]
    cells: list[list[Cell]] = [
        [float(row[column]) if head[column] in METRICS else row[column] for column in columns] for row in rows
    ]
    words = sum(name in ("image", "patient", "class") for name in names)
    table = html_table([name.replace("_", " ") for name in names], cells, words, sortable=True)
    opened = " open" if len(rows) <= OPEN_ROWS else ""
    return f"<details{opened}><summary>{images} images</summary>{limit}{table}</details>"


def _calibration(scored: EvaluationFolder) -> str:
    """Reliability diagram and Dice at each threshold of every class, with notes."""
    if "predictions" in scored.summary["about"]:
        return note("None: the predictions are masks, without probabilities.")
    if not any(each["reliability"] for each in scored.curves.values()):
        return note("None: there are no pixels to compute them from.")
    several = len(scored.curves) > 1
    used = scored.summary["about"].get("threshold", 0.5)
    overlap = scored.summary["dataset"].get("multilabel", False)
    charts, notes = [], []
    for place, (name, each) in enumerate(scored.curves.items()):
        if not (bins := each["reliability"]):
            continue
        title = f": {name}" if several else ""
        observed = [(item["probability"], item["frequency"]) for item in bins]
        shares = [(item["low"], item["high"], item["share"]) for item in bins]
        marks: dict[str, Any] = {"axis": "predicted probability", "reference": [(0, 0), (1, 1)], "bars": shares}
        charts.append(curve(f"Calibration{title}", {"observed": observed}, 1.0, **marks))
        points = [point for point in zip(each["thresholds"], each["dice"], strict=True) if point[1] is not None]
        here = float(used[place] if isinstance(used, list) else used)
        at = None if several and not overlap else (here, f"used: {here:g}")
        if points:
            charts.append(curve(f"Dice at each threshold{title}", {"Dice": points}, 1.0, axis="threshold", at=at))
        error, pixels = each["expected_calibration_error"], each["pixels"]
        notes.append(f"{name}: expected calibration error {error:.4f} over {pixels:,} pixels.")
    notes.append(
        "Calibration: share of pixels that belong to the class among those of similar predicted probability, in ten "
        "bins. On the dashed line, probabilities are accurate. Bars: share of all pixels in each bin. Dice at each "
        "threshold: mean over images, before any cleaning of masks."
    )
    return f'<div class="charts">{"".join(charts)}</div>' + "".join(map(note, [*notes, *_threshold_notes(scored)]))


def _threshold_notes(scored: EvaluationFolder) -> list[str]:
    if scored.summary["dataset"].get("multilabel", False):
        return ["Classes overlap: each has a threshold of its own, and each is compared with the rest of the image."]
    if len(scored.curves) > 1:
        return ["Each class is compared with the rest. Prediction takes the most probable class, without a threshold."]
    curve = next(iter(scored.curves.values()))
    dice = dict(zip(curve["thresholds"], curve["dice"], strict=True))
    notes = []
    if chosen := scored.summary["about"].get("validation_threshold"):
        notes.append(
            f"Best threshold on the validation images: {chosen:g} (--threshold validation). On these {scored.split} "
            f"images it scores Dice {format_score(dice.get(chosen))}, and 0.5 scores {format_score(dice[0.5])}."
        )
    if scored.summary["split"] in ("test", "out-of-fold"):
        notes.append("Do not choose a threshold from this curve: on the images it was chosen on, its score is biased.")
    return notes


def _data(scored: EvaluationFolder) -> str:
    dataset = scored.summary["dataset"]
    counted = ["images", "patients"] if scored.has_patients else ["images"]
    rows = [[name, *(str(split[what]) for what in counted)] for name, split in dataset["splits"].items()]
    notes = [f"Classes: {', '.join(scored.classes)}", *dataset["notes"]]
    return html_table(["split", *counted], rows, words=1) + "".join(map(note, notes))
