"""What a report shows of an evaluation: scores, every image, cases, calibration, data; from the folder it left."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pdrunet_jax.data import overlay as pictures
from pdrunet_jax.evaluate.compare import compared_label
from pdrunet_jax.evaluate.report import charts as curves
from pdrunet_jax.evaluate.report.html import Cell, bounds, embedded, html_table, legend, note, score, signed
from pdrunet_jax.evaluate.scores import METRICS, label, remarks

MOST_ROWS = 2_000
"""Rows of the table of every image: a page of more would be too heavy for a phone, and per_image.csv has all."""
OPEN_ROWS = 40
"""So many are shown without being asked for."""
SPLIT_TITLES = {"train": "training", "val": "validation", "test": "test", "all": "all"}

_NONE = "None yet: they are computed when the run ends, or by python -m pdrunet_jax.evaluate."


@dataclass(frozen=True)
class EvaluationFolder:
    """What `write_evaluation` has left in `folder`: summary.json, curves.json and comparison.json as they are."""

    folder: Path
    summary: Mapping[str, Any]
    curves: Mapping[str, Any]
    comparison: Mapping[str, Any]

    def __bool__(self) -> bool:
        return bool(self.summary)

    @property
    def images(self) -> str:
        """The split in words: "test images"."""
        split = str(self.summary["split"])
        return f"{SPLIT_TITLES.get(split, split)} images"


def read_scored(folder: Path) -> EvaluationFolder:
    """The scores in `folder`; empty, and false, if there are none."""

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return content

    return EvaluationFolder(folder, read("summary.json"), read("curves.json"), read("comparison.json"))


def figures_of(scored: EvaluationFolder) -> list[tuple[str, str]]:
    """The numbers at the top of the page."""
    if not scored:
        return []
    dice = scored.summary["macro"]["dice"]
    split = scored.images.removesuffix(" images")
    return [
        (score(dice["mean"]), f"{split} Dice, 95 % interval {bounds(dice)}"),
        (f"{scored.summary['images']}", f"{scored.images} of {scored.summary['patients']} patients"),
    ]


def scores_of(scored: EvaluationFolder) -> str:
    """The statistics of every metric."""
    if not scored:
        return note(_NONE)
    summary = scored.summary
    groups = dict(summary["classes"])
    if len(groups) > 1:
        groups["mean of classes"] = summary["macro"]
    rows: list[list[Cell]] = [
        [
            name,
            label(metric, summary["unit"], summary["tolerance"]),
            s["mean"],
            bounds(s),
            s["median"],
            s["std"],
            str(s["images"]),
        ]
        for name, values in groups.items()
        for metric, s in values.items()
    ]
    head = ["class", "metric", "mean", "95 % interval", "median", "std", "images"]
    cleaning = {name: value for name, value in summary["about"].get("cleaning", {}).items() if value}
    notes = [
        "At each image's own resolution, ignored pixels left out. Intervals of the mean: bootstrap over patients.",
        *(f"{remark}." for remark in remarks(summary)),
        *(
            [f"Masks were cleaned: {', '.join(f'{key} = {value}' for key, value in cleaning.items())}."]
            if cleaning
            else []
        ),
    ]
    return html_table(head, rows, text=2) + "".join(map(note, notes))


def every_image(scored: EvaluationFolder) -> str:
    """The table of all images, which sorts; of very many those with the lowest Dice."""
    path = scored.folder / "per_image.csv"
    if not scored or not path.is_file():
        return note(_NONE)
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    images, words = len({row[0] for row in rows}), ""
    if len(rows) > MOST_ROWS:
        dice = head.index("dice")
        rows = sorted(rows, key=lambda row: _number(row[dice]) or 0.0)[:MOST_ROWS]
        words = note(f"The {MOST_ROWS:,} rows with the lowest Dice; per_image.csv has all.")
    columns = [number for number, name in enumerate(head) if name != "class" or len(scored.summary["classes"]) > 1]
    words_end = sum(head[column] in ("image", "patient", "class") for column in columns)
    cells = [[_cell(head[column], row[column]) for column in columns] for row in rows]
    shown = html_table([head[column].replace("_", " ") for column in columns], cells, text=words_end, sortable=True)
    opened = " open" if len(rows) <= OPEN_ROWS else ""
    return f"<details{opened}><summary>{images} images</summary>{words}{shown}</details>"


def cases_of(scored: EvaluationFolder) -> str:
    """Image, truth, prediction and difference of the best, median and worst cases."""
    if not scored.summary.get("cases"):
        return note("None yet: they come with the scores.")
    parts = [f'<p class="quiet">Difference:{legend(pictures.LEGEND)}</p>']
    classes = scored.summary["dataset"]["classes"]
    if len(classes) > 1:
        colours = [(name, pictures.colour_of(index)) for index, name in enumerate(classes, 1)]
        parts.append(f'<p class="quiet">Classes:{legend(colours)}</p>')
    for case in scored.summary["cases"]:
        sources = [embedded(scored.folder / file) for file in case["panels"]]
        panels = "".join(
            f'<figure><img alt="{panel}" src="{source}"><figcaption>{panel}</figcaption></figure>'
            for panel, source in zip(pictures.PANELS, sources, strict=True)
        )
        head = f"<b>{escape(case['kind'])}</b>, Dice {score(case['dice'])}"
        parts.append(
            f'<div class="case">{head} <span class="quiet">{escape(case["image"])}</span><div>{panels}</div></div>'
        )
    return "".join(parts)


def calibration_of(scored: EvaluationFolder) -> str:
    """Reliability and threshold curve of each class, with what they say in words."""
    drawn = {name: each for name, each in scored.curves.items() if each["reliability"]}
    if not drawn:
        return note("None yet: they come with the scores.")
    several = len(scored.curves) > 1
    used = None if several else float(scored.summary["about"].get("threshold", 0.5))
    charts, notes = [], []
    for name, each in drawn.items():
        label = f": {name}" if several else ""
        bins = each["reliability"]
        charts.append(
            curves.curve(
                f"Calibration{label}",
                {"observed": [(item["probability"], item["frequency"]) for item in bins]},
                1.0,
                curves.Marks(
                    axis="predicted probability",
                    reference=[(0, 0), (1, 1)],
                    bars=[(item["low"], item["high"], item["share"]) for item in bins],
                ),
            )
        )
        points = [point for point in zip(each["thresholds"], each["dice"], strict=True) if point[1] is not None]
        marks = curves.Marks(axis="threshold", at=None if used is None else (used, f"used: {used:g}"))
        if points:
            charts.append(curves.curve(f"Dice at each threshold{label}", {"Dice": points}, 1.0, marks))
        notes.append(
            f"{name}: expected calibration error {each['expected_calibration_error']:.4f} "
            f"over {each['pixels']:,} pixels."
        )
    notes += [
        "Calibration: the share of pixels that are true among those of about the same predicted probability, in ten "
        "bins; on the thin line a probability means what it says. Bars: the share of all pixels in each bin. "
        "The threshold curve is the mean over images, before any cleaning of masks.",
        *_thresholds(scored, several),
    ]
    return f'<div class="charts">{"".join(charts)}</div>' + "".join(map(note, notes))


def _thresholds(scored: EvaluationFolder, several: bool) -> list[str]:
    if several:
        return ["Each class against the rest; of competing classes the likeliest is taken, and no threshold is used."]
    curve = next(iter(scored.curves.values()))
    dice = dict(zip(curve["thresholds"], curve["dice"], strict=True))
    notes = []
    if chosen := scored.summary["about"].get("validation_threshold"):
        notes.append(
            f"The validation images chose the threshold {chosen:g}, which --threshold validation takes: "
            f"Dice {score(dice.get(chosen))} on these {scored.images}, {score(dice[0.5])} at 0.5."
        )
    if scored.summary["split"] == "test":
        notes.append("The best point of this curve is not to be used: chosen on test images, it would flatter them.")
    return notes


def comparison_of(scored: EvaluationFolder) -> str:
    """The differences to another evaluation, and the images that changed most."""
    found = scored.comparison
    groups = dict(found["classes"])
    if len(groups) > 1:
        groups["mean of classes"] = found["macro"]
    rows: list[list[Cell]] = [
        [
            name,
            compared_label(metric, found["unit"], found["tolerance"]),
            *(d["this"], d["other"], signed(d["mean"]), f"{signed(d['low'])} to {signed(d['high'])}"),
            "n/a" if d["p"] is None else f"{d['p']:.2g}",
            *(str(d[count]) for count in ("better", "worse", "equal")),
        ]
        for name, values in groups.items()
        for metric, d in values.items()
    ]
    head = ["class", "metric", "this", "other", "difference", "95 % interval", "p", "better", "worse", "equal"]
    about = (
        f"This minus other ({found['against']}), on the same {found['images']} images of {found['patients']} patients. "
        "p: sign-flip test of the patients' sums, not corrected for the number of metrics."
    )
    changed: list[list[Cell]] = [
        [case["image"], case["this"], case["other"], signed(case["this"] - case["other"])] for case in found["changed"]
    ]
    most = html_table(["changed most", "Dice here", "there", "difference"], changed, text=1) if changed else ""
    return html_table(head, rows, text=2) + note(about) + most


def data_of(scored: EvaluationFolder) -> str:
    """Splits, classes and notes of the dataset."""
    if not scored:
        return note("The splits are written with the scores.")
    dataset = scored.summary["dataset"]
    rows: Sequence[Sequence[Cell]] = [
        [name, str(split["images"]), str(split["patients"])] for name, split in dataset["splits"].items()
    ]
    notes = [f"Classes: {', '.join(dataset['classes'])}", *dataset["notes"]]
    return html_table(["split", "images", "patients"], rows, text=1) + "".join(map(note, notes))


def _cell(name: str, cell: str) -> Cell:
    """A cell of per_image.csv: scores as numbers, all else as it is."""
    return _number(cell) if name in METRICS else cell


def _number(cell: str) -> float | None:
    """A score; None where it is not defined."""
    value = float(cell)
    return None if value != value else value
