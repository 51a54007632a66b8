"""Scores of one image: a row for each class, and the rows of a split as per_image.csv. docs/metrics.md defines them.

Statistics of per-image scores: means with intervals that respect patients, per class and over classes.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.evaluate import metrics, surface
from pdrunet_jax.evaluate.intervals import interval
from pdrunet_jax.runtime.errors import UserError

OVERLAP = ("dice", "iou", "precision", "recall", "specificity")
METRICS = (*OVERLAP, "hd95", "assd", "nsd", "area_error")
RANGES = {"hd95": (0.0, math.inf), "assd": (0.0, math.inf), "area_error": (-1.0, math.inf)}
"""Where a metric lies, if not from 0 to 1."""


@dataclass(frozen=True)
class ScoringOptions:
    """What scores depend on beside the masks."""

    unit: str = "pixels"
    """Of distances: "pixels" or "mm"."""
    tolerance: float = 2.0
    """Distance, in `unit`, within which `nsd` counts a boundary as right."""
    empty_dice: float = 1.0
    """Dice and IoU of a class that neither truth nor prediction has; NaN leaves it out of means."""


@dataclass(frozen=True)
class ImageScores:
    """Scores of one class in one image; NaN where a score is undefined. Pixels marked as ignored are left out."""

    image: str
    patient: str
    class_name: str
    dice: float
    iou: float
    precision: float
    recall: float
    specificity: float
    hd95: float
    """In the unit of the rules, as `assd`."""
    assd: float
    nsd: float
    area_error: float
    pixels_true: int
    pixels_predicted: int


CSV_COLUMNS = tuple("class" if item.name == "class_name" else item.name for item in fields(ImageScores))


def score(
    image: str,
    patient: str,
    predicted: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str],
    rules: ScoringOptions,
    spacing: tuple[float, float] | None = None,
) -> list[ImageScores]:
    """A row for each of the classes `names`.

    Args:
        image: Its id.
        patient: Whose image it is.
        predicted: Class indices (H, W).
        truth: Class indices (H, W), `IGNORE` where a pixel counts nowhere.
        names: Foreground classes; they have the indices 1 to their number.
        rules: See `ScoringOptions`.
        spacing: mm from one row to the next and from one column to the next, for distances in mm; None for pixels.
    """
    valid = truth != IGNORE
    counts = metrics.confusion(predicted[None], truth[None], valid[None], len(names))
    overlap = {
        name: getattr(metrics, name)(counts, **({"empty": rules.empty_dice} if name in ("dice", "iou") else {}))[0]
        for name in OVERLAP
    }
    rows = []
    for number, name in enumerate(names):
        ours, theirs = (predicted == number + 1) & valid, truth == number + 1
        apart = surface.distances(ours, theirs, spacing=spacing, tolerance=rules.tolerance)
        rows.append(
            ImageScores(
                image,
                patient,
                name,
                **{metric: float(values[number]) for metric, values in overlap.items()},
                hd95=apart.hd95,
                assd=apart.assd,
                nsd=apart.nsd,
                area_error=surface.area_error(ours, theirs),
                pixels_true=int(np.count_nonzero(theirs)),
                pixels_predicted=int(np.count_nonzero(ours)),
            )
        )
    return rows


def to_csv(rows: Iterable[ImageScores]) -> str:
    """The text of per_image.csv: `CSV_COLUMNS`, then a line for each row; six decimals, nan where undefined."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        cells = [getattr(row, item.name) for item in fields(row)]
        writer.writerow([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells])
    return file.getvalue()


def read_csv(path: Path) -> list[ImageScores]:
    """The rows of a per_image.csv. Raises `UserError` that names the file, and the line if one is wrong."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in CSV_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path} has no column {', '.join(missing)}: evaluate those weights again, or give the weights"
                )
            rows = []
            for line in reader:
                try:
                    rows.append(_row(line))
                except (TypeError, ValueError):
                    raise UserError(f"{path}: line {reader.line_num} is no row of scores") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return rows


def _row(line: dict[str, str]) -> ImageScores:
    return ImageScores(
        line["image"],
        line["patient"],
        line["class"],
        **{metric: float(line[metric]) for metric in METRICS},
        pixels_true=int(line["pixels_true"]),
        pixels_predicted=int(line["pixels_predicted"]),
    )


@dataclass(frozen=True)
class Statistic:
    """One metric over images: NaN where there is nothing to compute it from.

    `low` and `high` bound the 95 % interval of the mean; `images` and `patients` are those on which the metric is
    defined.
    """

    mean: float
    median: float
    std: float
    low: float
    high: float
    images: int
    patients: int


@dataclass(frozen=True)
class Summary:
    """Statistics of every metric: `classes[name][metric]`, and `macro[metric]` over the per-image class means.

    `empty[name]` counts the images in which truth and prediction of a class are both empty, `one_empty[name]` those in
    which one of them is; `images` and `patients` count all. `unit`, `tolerance` and `empty_dice` are those of the
    `ScoringOptions`.
    """

    unit: str
    tolerance: float
    empty_dice: float
    classes: dict[str, dict[str, Statistic]]
    macro: dict[str, Statistic]
    empty: dict[str, int]
    one_empty: dict[str, int]
    images: int
    patients: int

    @property
    def rules(self) -> ScoringOptions:
        """What the scores were scored by."""
        return ScoringOptions(self.unit, self.tolerance, self.empty_dice)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries ready for JSON, with None for NaN."""
        values: dict[str, Any] = without_nan(asdict(self))
        return values


def summarise(rows: Sequence[ImageScores], rules: ScoringOptions, seed: int = 0) -> Summary:
    """The statistics of `rows`, one for each image and class, scored by `rules`. Intervals are drawn with `seed`.

    Macro scores are averaged over the classes of an image first (leaving undefined ones out), then over images.
    """
    names = list(dict.fromkeys(row.class_name for row in rows))
    per_class = {name: [row for row in rows if row.class_name == name] for name in names}
    patient_of = {row.image: row.patient for row in rows}
    images = list(patient_of)

    def statistics(scores: dict[str, float], metric: str) -> Statistic:
        defined = [image for image in images if not math.isnan(scores.get(image, math.nan))]
        values, patients = [scores[image] for image in defined], [patient_of[image] for image in defined]
        return statistic(values, patients, seed, RANGES.get(metric, (0.0, 1.0)))

    classes = {
        name: {metric: statistics({row.image: getattr(row, metric) for row in rows}, metric) for metric in METRICS}
        for name, rows in per_class.items()
    }
    one = len(names) == 1  # whose mean it then is; thousands of patients take seconds
    return Summary(
        **asdict(rules),
        classes=classes,
        macro=classes[names[0]] if one else {name: statistics(image_means(rows, name), name) for name in METRICS},
        empty={
            name: sum(row.pixels_true == row.pixels_predicted == 0 for row in rows) for name, rows in per_class.items()
        },
        one_empty={
            name: sum((row.pixels_true == 0) != (row.pixels_predicted == 0) for row in rows)
            for name, rows in per_class.items()
        },
        images=len(images),
        patients=len(set(patient_of.values())),
    )


def image_means(rows: Iterable[ImageScores], metric: str = "dice") -> dict[str, float]:
    """For each image the mean of `metric` over the classes on which it is defined; NaN if on none."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.image, []).append(getattr(row, metric))
    means = {}
    for image, scores in values.items():
        defined = [score for score in scores if not math.isnan(score)]
        means[image] = sum(defined) / len(defined) if defined else math.nan
    return means


def statistic(
    values: Sequence[float], patients: Sequence[str], seed: int = 0, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Statistic:
    """Mean, median, sample standard deviation and 95 % interval of `values`, each belonging to a patient.

    `bounds` are where the mean can lie.
    """
    scores = np.asarray(values, np.float64)
    if not scores.size:
        return Statistic(math.nan, math.nan, math.nan, math.nan, math.nan, images=0, patients=0)
    low, high = interval(scores, patients, seed, bounds=bounds)
    std = float(scores.std(ddof=1)) if scores.size > 1 else math.nan
    return Statistic(
        float(scores.mean()), float(np.median(scores)), std, low, high, images=scores.size, patients=len(set(patients))
    )


def dice_line(split: str, summary: Summary) -> str:
    """The line that scripts may read, for example `test dice 0.934 (95% 0.921-0.945, 24 images, 24 patients)`.

    The words never change; without an interval (one patient) its bounds read nan.
    """
    dice = summary.macro["dice"]
    return (
        f"{split} dice {dice.mean:.3f} (95% {dice.low:.3f}-{dice.high:.3f}, "
        f"{summary.images} images, {summary.patients} patients)"
    )


def label(metric: str, unit: str, tolerance: float) -> str:
    """A metric with what its figures are in, for example `hd95 (mm)` or `nsd (within 2 pixels)`."""
    if metric in ("hd95", "assd"):
        return f"{metric} ({unit})"
    return f"nsd (within {tolerance:g} {unit})" if metric == "nsd" else metric


def text_table(summary: Summary) -> str:
    """The statistics as an aligned text table, a line for each class and metric; macro lines when classes differ."""
    groups = dict(summary.classes)
    if len(groups) > 1:
        groups["mean of classes"] = summary.macro
    lines = [("class", "metric", "mean", "95% interval", "median", "std", "images")]
    for name, statistics in groups.items():
        for metric, s in statistics.items():
            title = label(metric, summary.unit, summary.tolerance)
            bounds = f"{s.low:.3f} to {s.high:.3f}"
            lines.append((name, title, f"{s.mean:.3f}", bounds, f"{s.median:.3f}", f"{s.std:.3f}", str(s.images)))
    return aligned(lines, words=2)


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What has to be said of empty masks, a line for each class that has some; `summary` as in summary.json."""
    dice = summary["empty_dice"]
    both = "left out of Dice, IoU and distances" if dice is None else f"Dice {dice:g} there, left out of distances"
    outcomes = {
        "empty": f"truth and prediction are both empty: {both}",
        "one_empty": "one of truth and prediction is empty: Dice and nsd 0 there, left out of other distances",
    }
    return [
        f"{name}: in {count} of {summary['images']} images {outcome}"
        for kind, outcome in outcomes.items()
        for name, count in summary[kind].items()
        if count
    ]


def aligned(lines: Sequence[Sequence[str]], words: int) -> str:
    """Lines of cells as text: the first `words` columns to the left, the others, being numbers, to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def without_nan(value: Any) -> Any:
    """Nested dictionaries with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
